"""`lwm convert`: any checkpoint into our directory or Hugging Face's."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from lwm.core.errors import CheckpointError, ConfigError
from lwm.core.files import refuse_existing
from lwm.core.progress import say

if TYPE_CHECKING:
    from lwm.checkpoints.checkpoint import Checkpoint


def convert(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")],
    /,
    format: Literal["lwm", "huggingface"] = "lwm",
    config: str | None = None,
    tokenizer: str | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    add_vision: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    vision_codes: int | None = None,
    vision_codes_per_frame: int | None = None,
    vqgan: Path | None = None,
    vqgan_config: Path | None = None,
    seed: int = 0,
) -> None:
    """Convert a checkpoint, tensor by tensor.

    Args:
        source: Any MODEL.
        destination: A directory to make.
        format: Ours, or the one that transformers loads as LlamaForCausalLM.
        config: For the original's checkpoints: a size (7b) or a JSON file of settings.
        tokenizer: A tokenizer to put beside the weights, where the source brings none.
        dtype: Type of the numbers written; bfloat16 if the source is, else float32.
        add_vision: Give a text model ids of vision, random until they are trained.
        vision_codes: With --add-vision: codes of the VQGAN; 8192 unless --vqgan says otherwise.
        vision_codes_per_frame: With --add-vision: codes of a picture; 256 unless --vqgan says
            otherwise.
        vqgan: A VQGAN to put beside the weights: a directory, a run, or the original's pickle.
        vqgan_config: For the original's pickle of a VQGAN: a JSON file of its settings.
        seed: With --add-vision: of the random numbers.
    """
    refuse_existing(destination)
    from lwm.checkpoints.add_vision import require_codebook
    from lwm.checkpoints.formats.vqgan import read_vqgan
    from lwm.checkpoints.open import open_checkpoint
    from lwm.checkpoints.write import write_checkpoint
    from lwm.generation.load import open_tokenizer

    checkpoint = open_checkpoint(source, config=config)
    if add_vision:
        checkpoint = _with_vision(
            checkpoint, vision_codes, vision_codes_per_frame, vqgan, vqgan_config, seed
        )
    elif vision_codes is not None or vision_codes_per_frame is not None:
        raise ConfigError(
            "--vision-codes and --vision-codes-per-frame describe the ids that --add-vision adds; "
            "add it or leave them out"
        )
    if vqgan is not None:
        require_codebook(read_vqgan(vqgan, vqgan_config)[0], str(vqgan), checkpoint.config, source)
    found, missing = None, f"{source} brings no tokenizer"
    try:
        found = open_tokenizer(checkpoint, tokenizer)
    except CheckpointError as error:
        if tokenizer is not None:
            raise
        missing = str(error)
    write_checkpoint(
        checkpoint,
        destination,
        form=format,
        dtype=dtype or ("bfloat16" if checkpoint.stored == "bfloat16" else "float32"),
        save_tokenizer=(lambda directory: None) if found is None else found.save,
        vqgan=vqgan or checkpoint.vqgan,
        vqgan_config=vqgan_config,
    )
    if found is None:
        say(f"{destination} has no tokenizer ({missing}); text will need --tokenizer")
    print(destination)


def _with_vision(
    checkpoint: "Checkpoint",
    codes: int | None,
    codes_per_frame: int | None,
    vqgan: Path | None,
    vqgan_config: Path | None,
    seed: int,
) -> "Checkpoint":
    from lwm.checkpoints.add_vision import add_vision, vocabulary_for
    from lwm.checkpoints.formats.vqgan import read_vqgan
    from lwm.models.vqgan import VQGANConfig

    usual = VQGANConfig() if vqgan is None else read_vqgan(vqgan, vqgan_config)[0]
    vision = vocabulary_for(
        usual.codebook_size if codes is None else codes,
        usual.codes_per_frame if codes_per_frame is None else codes_per_frame,
    )
    return add_vision(checkpoint, vision, seed=seed)
