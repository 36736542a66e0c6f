"""Represent quantized kernels: 8-bit integers with a scale, and optionally an offset, per block.

Decoding on a CPU is bound by the memory traffic of the weights, of which they take about a third.
Products equal the dequantized kernel's except for the order of sums, which are float32.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int8

from lwm.core.pytree import pytree

LANES = 8
"""Outputs stored side by side: the float32 numbers of a CPU's vector."""

QUANTIZED_ROWS = 4
"""The most rows whose product is as fast with a quantized kernel as with float32 (docs/log.md)."""


class BlockFormat(NamedTuple):
    """Describe the blocks of a quantized kernel."""

    block_size: int  # inputs that share a scale
    offsets: bool

    def bytes(self, numbers: int) -> int:
        """Return the size of a quantized kernel of `numbers` elements."""
        return numbers + numbers // self.block_size * (2 if self.offsets else 1) * 4


def common_format(formats: Iterable[BlockFormat]) -> BlockFormat:
    """Return the coarsest format for kernels of all `formats`; block sizes are powers of two."""
    sizes, offsets = zip(*formats, strict=True)
    return BlockFormat(min(sizes), any(offsets))


class QuantizedTensor(NamedTuple):
    """Hold a kernel as a file stores it: `values * scales + offsets`."""

    values: Int8[np.ndarray, "out into"]
    scales: Float32[np.ndarray, "out blocks"]
    offsets: Float32[np.ndarray, "out blocks"] | None

    @property
    def block_format(self) -> BlockFormat:
        """Return the format of the blocks."""
        size = self.values.shape[1] // self.scales.shape[1]
        return BlockFormat(size, self.offsets is not None)

    def with_format(self, block_format: BlockFormat) -> "QuantizedTensor":
        """Return the same kernel with smaller blocks, or with offsets of zero."""
        repeats = self.block_format.block_size // block_format.block_size
        offsets = self.offsets
        if offsets is None and block_format.offsets:
            offsets = np.zeros_like(self.scales)
        offsets = None if offsets is None else offsets.repeat(repeats, axis=1)
        return QuantizedTensor(self.values, self.scales.repeat(repeats, axis=1), offsets)


@pytree
class QuantizedKernel:
    """Hold a quantized kernel (out, in) on a device, in the order in which it is multiplied."""

    values: Int8[Array, "blocks groups block lanes"]
    scales: Float[Array, "blocks groups lanes"]
    offsets: Float[Array, "blocks groups lanes"] | None

    @property
    def shape(self) -> tuple[int, int]:
        """Return (out, in)."""
        blocks, groups, block, lanes = self.values.shape
        return groups * lanes, blocks * block

    def dequantize(self) -> Float[Array, "out into"]:
        """Return the kernel as float32."""

        # Transpose the int8 values, a quarter of the bytes, before they become float32.
        kernel = self.values.transpose(1, 3, 0, 2).astype(jnp.float32)
        kernel *= self.scales.transpose(1, 2, 0)[..., None]
        if self.offsets is not None:
            kernel += self.offsets.transpose(1, 2, 0)[..., None]
        return kernel.reshape(self.shape)

    def rows(self, index: Int[Array, "*places"]) -> Float[Array, "*places into"]:
        """Return some rows as float32, as a look-up in a table of embeddings."""
        group, lane = index // LANES, index % LANES
        rows = self.values[:, group, :, lane].astype(jnp.float32)
        # The axes of `index` come first in `rows`, then blocks and the places in each.
        by_index = (*range(1, index.ndim + 1), 0)
        rows *= self.scales[:, group, lane].transpose(by_index)[..., None]
        if self.offsets is not None:
            rows += self.offsets[:, group, lane].transpose(by_index)[..., None]
        return rows.reshape(*index.shape, -1)


def concatenate(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """Concatenate the outputs of kernels of the same inputs, in their common format."""
    block_format = common_format(part.block_format for part in parts)
    fields = zip(*(part.with_format(block_format) for part in parts), strict=True)
    return QuantizedTensor(*(None if x[0] is None else np.concatenate(x) for x in fields))  # type: ignore[arg-type]


def lay_out(kernel: QuantizedTensor) -> QuantizedKernel:
    """Reorder a kernel for multiplication; the arrays remain numpy arrays."""
    out, into = kernel.values.shape
    groups, blocks = out // LANES, kernel.scales.shape[1]

    def by_block(x: np.ndarray) -> Any:
        return np.ascontiguousarray(x.reshape(groups, LANES, blocks).transpose(2, 0, 1))

    values: Any = kernel.values.reshape(groups, LANES, blocks, into // blocks)
    return QuantizedKernel(
        values=np.ascontiguousarray(values.transpose(2, 0, 3, 1)),  # type: ignore[arg-type]
        scales=by_block(kernel.scales),
        offsets=None if kernel.offsets is None else by_block(kernel.offsets),
    )


def has_quantized(weights: Any) -> bool:
    """Return whether a tree of weights contains a quantized kernel."""
    leaves = jax.tree.leaves(weights, is_leaf=lambda x: isinstance(x, QuantizedKernel))
    return any(isinstance(leaf, QuantizedKernel) for leaf in leaves)


def multiply_quantized(
    x: Float[Array, "rows into"], kernel: QuantizedKernel
) -> Float[Array, "rows out"]:
    """Compute `x @ kernel.dequantize().T` from the quantized values, one row at a time."""
    if len(x) == 1:
        return _multiply_row(x[0], kernel)[None]
    # Without the barrier the compiler would dequantize the whole kernel before the loop.
    return jax.lax.map(lambda row: _multiply_row(*jax.lax.optimization_barrier((row, kernel))), x)


def _multiply_row(x: Float[Array, " into"], kernel: QuantizedKernel) -> Float[Array, " out"]:
    blocks, _, block, _ = kernel.values.shape
    cut = x.reshape(blocks, block)
    # Unrolled over the places of a block, because XLA then vectorizes over outputs; a reduction
    # would be vectorized over blocks, with bytes gathered one by one.
    parts = sum(
        cut[:, place, None, None] * kernel.values[:, :, place].astype(jnp.float32)
        for place in range(block)
    )
    parts *= kernel.scales
    if kernel.offsets is not None:
        parts += cut.sum(axis=-1)[:, None, None] * kernel.offsets
    # A matrix product, because a sum would be fused with the code above.
    return jnp.ones(blocks) @ parts.reshape(blocks, -1)
