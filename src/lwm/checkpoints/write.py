"""Writing a model directory from an open checkpoint, without ever holding the model."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from lwm.checkpoints.checkpoint import VQGAN, Checkpoint
from lwm.checkpoints.formats import huggingface, lwm
from lwm.checkpoints.formats.safetensors import PART_BYTES, write
from lwm.checkpoints.formats.vqgan import read_vqgan, write_vqgan
from lwm.checkpoints.names import HUGGINGFACE, NATIVE, named_specs, outward, rows
from lwm.core.files import new_directory
from lwm.core.params import cast
from lwm.core.progress import progress

Format = Literal["lwm", "huggingface"]


def write_checkpoint(
    checkpoint: Checkpoint,
    destination: Path,
    *,
    form: Format,
    dtype: str,
    save_tokenizer: Callable[[Path], None],
    vqgan: Path | None = None,
    vqgan_config: Path | None = None,
    part_bytes: int = PART_BYTES,
) -> None:
    """Writes `destination`, whole or not at all.

    Args:
        dtype: of the numbers written, `float32` or `bfloat16`.
        save_tokenizer: writes the tokenizer's files into a directory.
        vqgan: one to write beside the weights, in any form; `vqgan_config` as for `read_vqgan`.

    Raises:
        InputError: the destination exists.
    """
    table = HUGGINGFACE if form == "huggingface" else NATIVE
    names = rows(table, checkpoint.config)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        with progress(
            f"converting {checkpoint.source}", len(named_specs(checkpoint.config))
        ) as step:
            for ours, array in checkpoint.read():
                for theirs, turned in outward(names[ours], array, checkpoint.config.head_dim):
                    yield theirs, np.asarray(turned, dtype=cast(dtype))
                step()

    with new_directory(destination) as directory:
        save_tokenizer(directory)
        if vqgan is not None:
            write_vqgan(directory / VQGAN, *read_vqgan(vqgan, vqgan_config))
        if form == "huggingface":
            huggingface.write_config(directory, checkpoint.config, dtype)
        else:
            lwm.write_config(directory, checkpoint.config)
        write(directory, tensors(), part_bytes=part_bytes)
