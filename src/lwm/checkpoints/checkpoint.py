"""Represent a checkpoint that is open but not loaded: its configuration, and its tensors one at a
time in our layout.

A format provides a `Tensors` and a `NameTable`. Names and shapes are checked here, before any
tensor is allocated.
"""

import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from lwm.checkpoints.names import NameTable, from_stored, named_specs, stored_tensors
from lwm.core.errors import CheckpointError
from lwm.core.vocabulary import Vocabulary
from lwm.models.llama import FUSED, LlamaConfig
from lwm.models.quantized import LANES, BlockFormat, QuantizedTensor, common_format
from lwm.models.sizes import BYTES, weight_bytes

VQGAN_DIRECTORY = "vqgan"
"""The subdirectory of a model directory with the VQGAN that the model was trained with."""


def vqgan_in(directory: Path) -> Path | None:
    """Return the VQGAN of a model directory, or None."""
    vqgan = directory / VQGAN_DIRECTORY
    return vqgan if vqgan.is_dir() else None


def release_pages(mapped: np.memmap) -> None:
    """Release the pages read so far of a mapped file, which would stay in memory; keep views."""
    handle = getattr(mapped, "_mmap", None)
    if handle is not None and hasattr(mmap, "MADV_DONTNEED"):
        handle.madvise(mmap.MADV_DONTNEED)


class Tensors(Protocol):
    """Provide the tensors of a file by the file's names; `read` touches the bytes of one only."""

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def read(self, name: str) -> np.ndarray: ...


class QuantizedTensors(Protocol):
    """Provide the tensors of a quantized file as the file stores them."""

    def block_format(self, name: str) -> BlockFormat | None: ...

    def quantized(self, name: str) -> QuantizedTensor: ...


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Represent a model in some format."""

    source: str  # the MODEL string, for messages
    format: str
    stored_dtype: str  # of most numbers in the file, such as `float32` or `Q4_1`
    config: LlamaConfig
    table: NameTable
    tensors: Tensors
    quantized: QuantizedTensors | None = None
    vocabulary: Path | Vocabulary | None = None  # the tokenizer's directory, or its content
    vqgan: Path | None = None
    ignorable: Callable[[str], bool] = lambda name: False  # whether a tensor is superfluous
    path: Path | None = None  # of a run's checkpoint, because `source` may name another later

    @property
    def absolute_source(self) -> str:
        """Return a MODEL string that names this checkpoint from any directory."""
        path = Path(self.source) if self.path is None else self.path
        return str(path.resolve()) if path.exists() else self.source

    def verify(self) -> None:
        """Raise CheckpointError unless names and shapes are what the configuration implies."""
        stored = stored_tensors(self.table, self.config).values()
        expected = {tensor.name: tensor.shape for parts in stored for tensor in parts}
        require_shapes(self.source, expected, self.tensors.shapes(), self.ignorable)

    def reader(self) -> Callable[[str], np.ndarray]:
        """Return a function that reads one array, in our layout, by our name."""
        stored = stored_tensors(self.table, self.config)
        return lambda name: from_stored(stored[name], self.tensors.read, self.config.head_dim)

    def read(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield our names and arrays in our layout, in the order of the model's tree."""
        read = self.reader()
        for name in named_specs(self.config):
            yield name, read(name)

    def quantized_names(self) -> dict[str, BlockFormat]:
        """Return, by our names, the kernels that an engine can use quantized, and their formats.

        The parts of a fused kernel are quantized in a common format, or none of them is.
        """
        if self.quantized is None:
            return {}
        formats = {}
        for name, parts in stored_tensors(self.table, self.config).items():
            if len(parts) == 1 and parts[0].shape[0] % LANES == 0:
                formats[name] = self.quantized.block_format(parts[0].name)
        for layer in range(self.config.num_layers):
            for fused in FUSED.values():
                names = [f"layers.{layer}.{part}" for part in fused]
                quantized = [block for block in map(formats.get, names) if block is not None]
                joint = common_format(quantized) if len(quantized) == len(names) else None
                formats |= dict.fromkeys(names, joint)
        return {name: block for name, block in formats.items() if block is not None}

    def quantized_reader(self) -> Callable[[str], QuantizedTensor]:
        """Return a function that reads one of `quantized_names`, (out, in)."""
        assert self.quantized is not None
        quantized, stored = self.quantized, stored_tensors(self.table, self.config)

        def read(name: str) -> QuantizedTensor:
            part = stored[name][0]
            arrays = quantized.quantized(part.name)
            in_order = partial(part.layout.rows_from_file, head_dim=self.config.head_dim)
            offsets = None if arrays.offsets is None else in_order(arrays.offsets)
            return QuantizedTensor(in_order(arrays.values), in_order(arrays.scales), offsets)

        return read

    def weight_bytes(self, dtype: str, *, keep_quantized: bool) -> int:
        """Return the bytes that the weights take in memory, dequantized or not."""
        total, specs = weight_bytes(self.config, dtype), named_specs(self.config)
        for name, block_format in self.quantized_names().items() if keep_quantized else ():
            numbers = math.prod(specs[name].shape)
            total += block_format.bytes(numbers) - numbers * BYTES[dtype]
        return total


def require_shapes(
    source: str,
    expected: Mapping[str, tuple[int, ...]],
    present: Mapping[str, tuple[int, ...]],
    ignorable: Callable[[str], bool] = lambda name: False,
) -> None:
    """Refuse a file with missing, misshaped or unknown tensors; name the first of them."""
    for name, shape in expected.items():
        if name not in present:
            raise CheckpointError(
                f"{source}: the tensor {name!r} is missing; correct --config or the file"
            )
        if present[name] != shape:
            raise CheckpointError(
                f"{source}: the tensor {name!r} has shape {list(present[name])}, but the "
                f"configuration implies {list(shape)}; correct --config or the file"
            )
    for name in present:
        if name not in expected and not ignorable(name):
            raise CheckpointError(
                f"{source}: the tensor {name!r} has no place in this architecture; use a Llama"
            )
