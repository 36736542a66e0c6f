"""Convert a checkpoint into our format or Hugging Face's: `lwm convert`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from lwm.core.errors import CheckpointError, ConfigError
from lwm.core.files import refuse_existing
from lwm.core.progress import say


def convert(
    source: str,
    dest: Path,
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
    part_bytes: int = 4 << 30,
) -> None:
    """Convert a checkpoint, one tensor at a time.

    Args:
        source: Any MODEL.
        dest: Directory to create.
        format: The format of lwm, or the one that transformers loads as LlamaForCausalLM.
        config: Settings of an original checkpoint: a size such as 7b, or a JSON file.
        tokenizer: Tokenizer to save beside the weights; defaults to the source's.
        dtype: Type of the converted weights; defaults to bfloat16 if the source has it.
        add_vision: Add vision tokens to a text model; their weights are random until trained.
        vision_codes: Codes of the VQGAN, with --add-vision; defaults to --vqgan's, or 8192.
        vision_codes_per_frame: Codes per image, likewise; defaults to --vqgan's, or 256.
        vqgan: VQGAN to save too: a directory, a training run, or the original's pickle.
        vqgan_config: JSON file with the settings of a pickled VQGAN.
        seed: Seed of the random weights of --add-vision.
        part_bytes: Size from which weights are split into several files.
    """
    refuse_existing(dest)
    if part_bytes < 1:
        raise ConfigError(f"--part-bytes is {part_bytes}; it must be at least 1")
    if vqgan_config is not None and vqgan is None:
        raise ConfigError(f"--vqgan-config {vqgan_config} needs --vqgan; add that option")
    from lwm.checkpoints import add_vision as extension
    from lwm.checkpoints.formats.vqgan import read_vqgan
    from lwm.checkpoints.open import open_checkpoint
    from lwm.checkpoints.write import write_checkpoint
    from lwm.generation.load import open_tokenizer
    from lwm.models.vqgan import VQGANConfig

    checkpoint = open_checkpoint(source, config=config)
    codec = None if vqgan is None else read_vqgan(vqgan, vqgan_config)
    if add_vision:
        sizes = VQGANConfig() if codec is None else codec[0]
        vision = extension.vocabulary_for(
            sizes.codebook_size if vision_codes is None else vision_codes,
            sizes.codes_per_frame if vision_codes_per_frame is None else vision_codes_per_frame,
        )
        checkpoint = extension.add_vision(checkpoint, vision, seed=seed)
    elif vision_codes is not None or vision_codes_per_frame is not None:
        raise ConfigError(
            "--vision-codes and --vision-codes-per-frame need --add-vision; add it or omit them"
        )
    if codec is not None:
        extension.require_codebook(codec[0], str(vqgan), checkpoint.config, source)
    elif checkpoint.vqgan is not None:
        codec = read_vqgan(checkpoint.vqgan)
    saved, missing = None, f"{source} has no tokenizer"
    try:
        saved = open_tokenizer(checkpoint, tokenizer)
    except CheckpointError as error:  # the weights are converted without it
        if tokenizer is not None:
            raise
        missing = str(error)
    write_checkpoint(
        checkpoint,
        dest,
        form=format,
        dtype=dtype or ("bfloat16" if checkpoint.stored_dtype == "bfloat16" else "float32"),
        save_tokenizer=(lambda directory: None) if saved is None else saved.save,
        vqgan=codec,
        part_bytes=part_bytes,
    )
    if saved is None:
        say(f"{dest} has no tokenizer ({missing}); text will need --tokenizer")
    print(dest)
