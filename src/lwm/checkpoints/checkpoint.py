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
from lwm.models.quantized import LANES, Codes, Grain, common

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


class CodedTensors(Protocol):
    """Tensors of a quantised file, some of which can be had as they are kept."""

    def grain(self, name: str) -> Grain | None: ...

    def codes(self, name: str) -> Codes: ...


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model in some format.

    Args:
        source: what the user called it, for messages.
        stored: how the file keeps its numbers, for people: `float32`, `Q4_1`.
        coded: the same tensors as codes, where the file keeps some so.
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
    coded: CodedTensors | None = None
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

    def kept_codes(self) -> dict[str, Grain]:
        """Which kernels, by our name, an engine can keep as the file's codes, and in which grain.
        What is fused is kept so as a whole, in a grain that suits all its parts, or not at all."""
        if self.coded is None:
            return {}
        found = {}
        for ours, parts in rows(self.table, self.config).items():
            if len(parts) == 1 and parts[0].shape[0] % LANES == 0:
                found[ours] = self.coded.grain(parts[0].theirs)
        for i in range(self.config.num_layers):
            for fused in FUSED.values():
                names = [f"layers.{i}.{part}" for part in fused]
                grains = [found.get(name) for name in names]
                known = [grain for grain in grains if grain is not None]
                joint = common(known) if len(known) == len(grains) else None
                found |= dict.fromkeys(names, joint)
        return {name: grain for name, grain in found.items() if grain is not None}

    def code_reader(self) -> Callable[[str], Codes]:
        """Reads one of `kept_codes`, (out, in)."""
        assert self.coded is not None
        coded, table = self.coded, rows(self.table, self.config)
        return lambda ours: coded.codes(table[ours][0].theirs)

    def weight_bytes(self, dtype: str, *, keep_codes: bool) -> int:
        """What the weights take in memory, codes as they are or made wide."""
        total, specs = weight_bytes(self.config, dtype), named_specs(self.config)
        for name, grain in self.kept_codes().items() if keep_codes else ():
            numbers = math.prod(specs[name].shape)
            total += grain.bytes(numbers) - numbers * BYTES[dtype]
        return total

    def read(self) -> Iterator[tuple[str, np.ndarray]]:
        """Our names and arrays in our layout, in the order of the model's tree, one at a time."""
        read = self.reader()
        for ours in named_specs(self.config):
            yield ours, read(ours)
