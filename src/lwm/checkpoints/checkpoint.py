"""A checkpoint on disk, opened but not loaded: its configuration, and its tensors one at a time in
our layout.

Formats differ in the `Tensors` they bring and in their table of names; all checking happens here,
before anything is allocated.
"""

import math
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from lwm.checkpoints.names import Table, inward, named_specs, rows
from lwm.core.errors import CheckpointError
from lwm.core.vocabulary import Vocabulary
from lwm.models.costs import BYTES, weight_bytes
from lwm.models.llama import FUSED, LlamaConfig
from lwm.models.quantized import LANES, BlockFormat, QuantizedTensor, common_format

VQGAN = "vqgan"
"""Where a model directory keeps the VQGAN whose codes the model reads and writes."""


def vqgan_in(directory: Path) -> Path | None:
    """The VQGAN of a model directory, if it has one."""
    return directory / VQGAN if (directory / VQGAN).is_dir() else None


def forget_pages(mapped: np.memmap) -> None:
    """Gives back the memory of what was read from a mapped file so far; views stay valid.

    Without it the pages of a whole file would stay beside the model that was made of them.
    """
    handle = getattr(mapped, "_mmap", None)
    if handle is not None and hasattr(mmap, "MADV_DONTNEED"):
        handle.madvise(mmap.MADV_DONTNEED)


class Tensors(Protocol):
    """Tensors of a file or directory under their foreign names; `read` touches one tensor's bytes
    alone."""

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def read(self, name: str) -> np.ndarray: ...


class QuantizedTensors(Protocol):
    """Provide the tensors of a quantized file as the file stores them."""

    def block_format(self, name: str) -> BlockFormat | None: ...

    def quantized(self, name: str) -> QuantizedTensor: ...


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model in some format.

    Args:
        source: what the user called it, for messages.
        stored: how the file keeps its numbers, for people: `float32`, `Q4_1`.
        quantized: the same tensors as the file stores them, where it is quantized.
        vocabulary: where its tokenizer's files are, or the raw material of one, or None.
        vqgan: the directory of the VQGAN that belongs to it, if it brings one.
        ignorable: foreign tensors that carry nothing the model needs.
        path: where it is now; a run's latest checkpoint has another name tomorrow.
    """

    source: str
    format: str
    stored: str
    config: LlamaConfig
    table: Table
    tensors: Tensors
    quantized: QuantizedTensors | None = None
    vocabulary: Path | Vocabulary | None = None
    vqgan: Path | None = None
    ignorable: Callable[[str], bool] = lambda name: False
    path: Path | None = None

    @property
    def place(self) -> str:
        """A MODEL string that names this checkpoint from anywhere."""
        if self.path is not None:
            return str(self.path.resolve())
        return str(Path(self.source).resolve()) if Path(self.source).exists() else self.source

    def verify(self) -> None:
        """Compares names and shapes with what the configuration asks for.

        Raises:
            CheckpointError: names the first tensor that is missing, misshaped or unknown.
        """
        present = self.tensors.shapes()
        written = [row for parts in rows(self.table, self.config).values() for row in parts]
        for row in written:
            if row.theirs not in present:
                raise CheckpointError(
                    f"{self.source}: the tensor {row.theirs!r} is missing; the file is incomplete "
                    "or its configuration describes another model"
                )
            if present[row.theirs] != row.shape:
                raise CheckpointError(
                    f"{self.source}: the tensor {row.theirs!r} has shape "
                    f"{list(present[row.theirs])} but the configuration asks for "
                    f"{list(row.shape)}; correct --config or the file"
                )
        for name in present.keys() - {row.theirs for row in written}:
            if not self.ignorable(name):
                raise CheckpointError(
                    f"{self.source}: the tensor {name!r} has no place in this model; the "
                    "checkpoint is of another architecture"
                )

    def reader(self) -> Callable[[str], np.ndarray]:
        """Reads one array in our layout by our name."""
        table = rows(self.table, self.config)
        return lambda ours: inward(table[ours], self.tensors.read, self.config.head_dim)

    def quantized_names(self) -> dict[str, BlockFormat]:
        """Return, by our names, the kernels that an engine can use quantized, and their formats.

        The parts of a fused kernel are quantized in a common format, or none of them is.
        """
        if self.quantized is None:
            return {}
        formats = {}
        for ours, parts in rows(self.table, self.config).items():
            if len(parts) == 1 and parts[0].shape[0] % LANES == 0:
                formats[ours] = self.quantized.block_format(parts[0].theirs)
        for i in range(self.config.num_layers):
            for fused in FUSED.values():
                names = [f"layers.{i}.{part}" for part in fused]
                parts = [formats.get(name) for name in names]
                present = [part for part in parts if part is not None]
                joint = common_format(present) if len(present) == len(parts) else None
                formats |= dict.fromkeys(names, joint)
        return {name: each for name, each in formats.items() if each is not None}

    def quantized_reader(self) -> Callable[[str], QuantizedTensor]:
        """Return a function that reads one of `quantized_names`, (out, in)."""
        assert self.quantized is not None
        quantized, table = self.quantized, rows(self.table, self.config)
        return lambda ours: quantized.quantized(table[ours][0].theirs)

    def weight_bytes(self, dtype: str, *, keep_quantized: bool) -> int:
        """Return what the weights take in memory, quantized kernels as they are or as float32."""
        total, specs = weight_bytes(self.config, dtype), named_specs(self.config)
        for name, block_format in self.quantized_names().items() if keep_quantized else ():
            numbers = math.prod(specs[name].shape)
            total += block_format.bytes(numbers) - numbers * BYTES[dtype]
        return total

    def read(self) -> Iterator[tuple[str, np.ndarray]]:
        """Our names and arrays in our layout, in the order of the model's tree, one at a time."""
        read = self.reader()
        for ours in named_specs(self.config):
            yield ours, read(ours)
