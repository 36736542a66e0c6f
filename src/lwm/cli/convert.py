"""`lwm convert`: any checkpoint into our directory or Hugging Face's."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from lwm.core.errors import CheckpointError
from lwm.core.files import refuse_existing
from lwm.core.progress import say


def convert(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")],
    /,
    format: Literal["lwm", "huggingface"] = "lwm",
    config: str | None = None,
    tokenizer: str | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> None:
    """Convert a checkpoint, tensor by tensor.

    Args:
        source: Any MODEL.
        destination: A directory to make.
        format: Ours, or the one that transformers loads as LlamaForCausalLM.
        config: For the original's checkpoints: a size (7b) or a JSON file of settings.
        tokenizer: A tokenizer to put beside the weights, where the source brings none.
        dtype: Type of the numbers written; bfloat16 if the source is, else float32.
    """
    refuse_existing(destination)
    from lwm.checkpoints.resolve import open_checkpoint
    from lwm.checkpoints.write import write_checkpoint
    from lwm.inference.model import open_tokenizer

    checkpoint = open_checkpoint(source, config=config)
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
    )
    if found is None:
        say(f"{destination} has no tokenizer ({missing}); text will need --tokenizer")
    print(destination)
