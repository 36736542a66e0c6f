"""A checkpoint on disk, opened but not loaded: its configuration, and its tensors one at a time in
our layout.

Formats differ in the `Tensors` they bring and in their table of names; all checking happens here,
before anything is allocated.
"""

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from lwm.checkpoints.names import Table, inward, named_specs, rows
from lwm.core.errors import CheckpointError
from lwm.core.vocabulary import Vocabulary
from lwm.models.llama import LlamaConfig
from lwm.models.narrow import Codes

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


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model in some format.

    Args:
        source: what the user called it, for messages.
        stored: how the file keeps its numbers, for people: `float32`, `Q4_1`.
        codes: a foreign tensor as narrow codes, None where the file does not have it so.
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
    codes: Callable[[str], Codes | None] = lambda name: None
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

    def code_reader(self) -> Callable[[str], Codes | None]:
        """Reads one kernel, (out, in), by our name as the file's codes; None where it has none."""
        table = rows(self.table, self.config)
        return lambda ours: self.codes(table[ours][0].theirs) if len(table[ours]) == 1 else None

    def read(self) -> Iterator[tuple[str, np.ndarray]]:
        """Our names and arrays in our layout, in the order of the model's tree, one at a time."""
        read = self.reader()
        for ours in named_specs(self.config):
            yield ours, read(ours)
