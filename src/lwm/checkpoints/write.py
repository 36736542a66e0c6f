"""Write a model directory from an open checkpoint, one tensor at a time."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from lwm.checkpoints.checkpoint import VQGAN_DIRECTORY, Checkpoint
from lwm.checkpoints.formats.huggingface import HUGGINGFACE_NAMES, write_huggingface_config
from lwm.checkpoints.formats.lwm import write_lwm_config
from lwm.checkpoints.formats.safetensors import PART_BYTES, write_safetensors
from lwm.checkpoints.formats.vqgan import write_vqgan
from lwm.checkpoints.names import LWM_NAMES, NameTable, named_specs, stored_tensors, to_stored
from lwm.core.files import new_directory
from lwm.core.params import cast
from lwm.core.progress import progress
from lwm.models.llama import LlamaConfig
from lwm.models.vqgan import VQGAN, VQGANConfig

Format = Literal["lwm", "huggingface"]

WRITERS: dict[Format, tuple[NameTable, Callable[[Path, LlamaConfig, str], None]]] = {
    "lwm": (LWM_NAMES, write_lwm_config),
    "huggingface": (HUGGINGFACE_NAMES, write_huggingface_config),
}
"""The names of each format that can be written, and the function that writes its `config.json`."""


def write_checkpoint(
    checkpoint: Checkpoint,
    destination: Path,
    *,
    form: Format,
    dtype: str,
    save_tokenizer: Callable[[Path], None],
    vqgan: tuple[VQGANConfig, VQGAN] | None = None,
    part_bytes: int = PART_BYTES,
) -> None:
    """Write a model directory completely or not at all, in `float32` or `bfloat16`.

    Args:
        save_tokenizer: writes the tokenizer's files into a directory.
    """
    names, write_config = WRITERS[form]
    stored = stored_tensors(names, checkpoint.config)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        total = len(named_specs(checkpoint.config))
        with progress(f"converting {checkpoint.source}", total) as advance:
            for name, array in checkpoint.read():
                for stored_name, part in to_stored(
                    stored[name], array, checkpoint.config.head_dim
                ):
                    yield stored_name, np.asarray(part, dtype=cast(dtype))
                advance()

    with new_directory(destination) as directory:
        save_tokenizer(directory)
        if vqgan is not None:
            write_vqgan(directory / VQGAN_DIRECTORY, *vqgan)
        write_config(directory, checkpoint.config, dtype)
        write_safetensors(directory, tensors(), part_bytes=part_bytes)
