"""Read the tensors of a GGUF file, dequantized or quantized.

The gguf package parses the file and dequantizes; unpacking values and scales without dequantizing
is done here, because the package does not offer it.

Source: the block structures of ggml (ggml-common.h).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quantization
from gguf.quants import Q4_K

from lwm.checkpoints.checkpoint import release_pages
from lwm.core.errors import CheckpointError
from lwm.models.quantized import BlockFormat, QuantizedTensor

_FORMATS = {
    Quantization.Q8_0: BlockFormat(32, offsets=False),
    Quantization.Q4_0: BlockFormat(32, offsets=False),
    Quantization.Q4_1: BlockFormat(32, offsets=True),
    Quantization.Q4_K: BlockFormat(32, offsets=True),
    Quantization.Q5_K: BlockFormat(32, offsets=True),
    Quantization.Q6_K: BlockFormat(16, offsets=False),
}
"""Quantizations that an engine can compute with, at 8 bits or fewer."""

_SUPPORTED = {Quantization.F32, Quantization.F16, Quantization.BF16, *_FORMATS}

_CHUNK = 1 << 20
"""Numbers that are unpacked together; bounds the temporary arrays."""


class GgufReader(gguf.GGUFReader):
    """Parse the header with the gguf package, with bounds checks and less overhead.

    The package slices without comparing lengths with the file's, and slices of a memory map are
    several times slower than slices of a plain array over the same memory.
    """

    @property
    def data(self) -> np.ndarray:
        return self._plain

    @data.setter
    def data(self, value: np.ndarray) -> None:
        self.mapped = value
        self._plain = value.view(np.ndarray)

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self._plain):
            raise ValueError(f"{end:,} bytes are announced and the file has {len(self._plain):,}")
        return super()._get(offset, dtype, count, override_order)


class GgufTensors:
    """Provide the tensors of one file; refuse types that are not supported."""

    def __init__(self, tensors: Mapping[str, gguf.ReaderTensor], mapped: Any, source: str) -> None:
        self._tensors, self._mapped = tensors, mapped
        for tensor in tensors.values():
            if tensor.tensor_type not in _SUPPORTED:
                raise CheckpointError(
                    f"{source}: the tensor {tensor.name!r} is quantized as "
                    f"{tensor.tensor_type.name}, which is not supported; use one of "
                    f"{', '.join(sorted(kind.name for kind in _SUPPORTED))}"
                )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: _shape(tensor) for name, tensor in self._tensors.items()}

    def dtype(self) -> str:
        """Return the type that most tensors have."""
        kinds = [tensor.tensor_type.name for tensor in self._tensors.values()]
        return max(set(kinds), key=kinds.count)

    def read(self, name: str) -> np.ndarray:
        release_pages(self._mapped)
        tensor = self._tensors[name]
        out = np.empty(_shape(tensor), np.float32)
        # In chunks, because the package concatenates its parts into a second copy.
        step = max(1, _CHUNK // max(1, out[:1].size))
        for first in range(0, len(out), step):
            rows = slice(first, first + step)
            out[rows] = gguf.dequantize(tensor.data[rows], tensor.tensor_type)
        return out

    def block_format(self, name: str) -> BlockFormat | None:
        tensor = self._tensors[name]
        return _FORMATS.get(tensor.tensor_type) if len(tensor.shape) == 2 else None

    def quantized(self, name: str) -> QuantizedTensor:
        tensor, block_format = self._tensors[name], self.block_format(name)
        assert block_format is not None, name
        release_pages(self._mapped)
        out, into = _shape(tensor)
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        unpack = _small_blocks if block_size == 32 else _large_blocks
        scales_shape = (out, into // block_format.block_size)
        arrays = [np.empty((out, into), np.int8)]
        arrays += [np.empty(scales_shape, "f4") for _ in range(1 + block_format.offsets)]
        step = max(1, _CHUNK // max(1, into))
        for first in range(0, out, step):
            rows = slice(first, first + step)
            blocks = np.ascontiguousarray(tensor.data[rows]).reshape(-1, block_bytes)
            for array, part in zip(arrays, unpack(blocks, tensor.tensor_type), strict=True):
                array[rows] = part.reshape(array[rows].shape)
        return QuantizedTensor(*arrays, *[None] * (3 - len(arrays)))  # type: ignore[arg-type]


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    """Return the shape in numpy's order; ggml lists the fastest dimension first."""
    return tuple(int(n) for n in reversed(tensor.shape))


def _nibbles(packed: np.ndarray) -> np.ndarray:
    # [..., bytes] -> [..., 2, bytes]: the lower half of each byte, then the upper.
    return np.stack([packed & 15, packed >> 4], axis=-2)


def _float16s(blocks: np.ndarray, first: int, count: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, first : first + 2 * count]).view(np.float16).astype("f4")


def _small_blocks(blocks: np.ndarray, kind: Quantization) -> Sequence[np.ndarray]:
    """Unpack blocks of 32 numbers, one per row, to values, scales and perhaps offsets."""
    factors = _float16s(blocks, 0, 1 + _FORMATS[kind].offsets)
    packed = blocks[:, 2 * factors.shape[1] :]
    values = packed if kind == Quantization.Q8_0 else _nibbles(packed).reshape(-1, 32)
    values = values.view(np.int8)
    return values - np.int8(8) if kind == Quantization.Q4_0 else values, *factors.T


def _large_blocks(blocks: np.ndarray, kind: Quantization) -> Sequence[np.ndarray]:
    """Unpack blocks of 256 numbers, whose values are split into 4 bits and 1 or 2 further bits,
    and whose scales are quantized themselves."""
    count = len(blocks)
    if kind == Quantization.Q6_K:
        low, high, scales, _ = np.split(blocks, (128, 192, 208), axis=1)
        low = _nibbles(low.reshape(count, 2, 64)).reshape(count, 8, 32)
        high = high.reshape(count, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8) & 3
        values = (low | high.reshape(count, 8, 32) << 4).view(np.int8) - np.int8(32)
        return values, _float16s(blocks, 208, 1) * scales.view(np.int8)
    factors = _float16s(blocks, 0, 2)
    scales, offsets = Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
    values = _nibbles(blocks[:, -128:].reshape(count, 4, 32)).reshape(count, 8, 32)
    if kind == Quantization.Q5_K:
        values |= (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1) << 4
    return values.view(np.int8), factors[:, :1] * scales, -(factors[:, 1:] * offsets)
