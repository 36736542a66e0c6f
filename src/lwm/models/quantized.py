"""Kernels kept as the narrow codes of a quantised file: whole numbers of 8 bits, with a scale, and
an offset where the file has one, for every few inputs of an output.

A decode step on a CPU waits for weights, and these are about a third of the bytes. Products
are those of the dequantised kernel but for the order of sums, since codes and scales are the
file's own and all sums are float32. Knows arrays; knows no file and no model.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int8

LANES = 8
"""Outputs that lie side by side: as many float32 as a CPU's vector holds, so that codes are made
wide and multiplied a vector at a time."""


class Grain(NamedTuple):
    """How fine the scales of a kernel are."""

    block: int  # inputs that share a scale
    offsets: bool

    def bytes(self, numbers: int) -> int:
        """What a kernel of so many numbers takes as codes."""
        return numbers + numbers // self.block * (2 if self.offsets else 1) * 4


def common(grains: Iterable[Grain]) -> Grain:
    """The coarsest in which kernels of all of these can be written: blocks are powers of two."""
    blocks, offsets = zip(*grains, strict=True)
    return Grain(min(blocks), any(offsets))


class Codes(NamedTuple):
    """A kernel as a file has it: `codes * scales + offsets`."""

    codes: Int8[np.ndarray, "out into"]
    scales: Float32[np.ndarray, "out blocks"]
    offsets: Float32[np.ndarray, "out blocks"] | None

    @property
    def grain(self) -> Grain:
        return Grain(self.codes.shape[1] // self.scales.shape[1], self.offsets is not None)

    def refined(self, grain: Grain) -> "Codes":
        """The same kernel with finer scales, or with offsets of zero."""
        repeats = self.grain.block // grain.block
        scales, offsets = self.scales, self.offsets
        if offsets is None and grain.offsets:
            offsets = np.zeros_like(scales)
        finer = [None if x is None else np.repeat(x, repeats, axis=1) for x in (scales, offsets)]
        return Codes(self.codes, *finer)  # type: ignore[arg-type]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Narrow:
    """A kernel (out, in) as codes, in the order in which they are multiplied."""

    codes: Int8[Array, "blocks groups block lanes"]
    scales: Float[Array, "blocks groups lanes"]
    offsets: Float[Array, "blocks groups lanes"] | None

    @property
    def shape(self) -> tuple[int, int]:
        blocks, groups, block, lanes = self.codes.shape
        return groups * lanes, blocks * block

    def wide(self) -> Float[Array, "out into"]:
        """The kernel as float32."""

        def turned(x: Array) -> Array:  # [blocks, groups, lanes] beside codes of (out, in)
            return x.transpose(1, 2, 0)[..., None]

        # The codes are turned before they are made wide, being a quarter of the bytes.
        kernel = self.codes.transpose(1, 3, 0, 2).astype(jnp.float32) * turned(self.scales)
        if self.offsets is not None:
            kernel += turned(self.offsets)
        return kernel.reshape(self.shape)

    def rows(self, index: Int[Array, "*places"]) -> Float[Array, "*places into"]:
        """Some of the kernel's rows, as of a table of embeddings."""
        group, lane = index // LANES, index % LANES
        found = self.codes[:, group, :, lane].astype(jnp.float32)
        # The axes that are looked up come first, then blocks and the places in each.
        found *= self.scales[:, group, lane].transpose(*range(1, index.ndim + 1), 0)[..., None]
        if self.offsets is not None:
            offsets = self.offsets[:, group, lane]
            found += offsets.transpose(*range(1, index.ndim + 1), 0)[..., None]
        return found.reshape(*index.shape, -1)


def join(parts: list[Codes]) -> Codes:
    """Kernels of the same inputs as one, outputs one behind the other."""
    grain = common(part.grain for part in parts)
    codes, scales, offsets = zip(*(part.refined(grain) for part in parts), strict=True)
    return Codes(
        np.concatenate(codes),
        np.concatenate(scales),
        np.concatenate(offsets) if grain.offsets else None,
    )


def narrow(kernel: Codes) -> Narrow:
    """Lays a kernel out; arrays stay numpy's."""
    out, into = kernel.codes.shape
    groups, blocks = out // LANES, kernel.scales.shape[1]

    def turned(x: np.ndarray) -> Any:
        return np.ascontiguousarray(x.reshape(groups, LANES, blocks).transpose(2, 0, 1))

    codes: Any = kernel.codes.reshape(groups, LANES, blocks, into // blocks).transpose(2, 0, 3, 1)
    return Narrow(
        codes=np.ascontiguousarray(codes),  # type: ignore[arg-type]
        scales=turned(kernel.scales),
        offsets=None if kernel.offsets is None else turned(kernel.offsets),
    )


def multiply_narrow(x: Float[Array, "rows into"], kernel: Narrow) -> Float[Array, "rows out"]:
    """`x @ kernel.wide().T`, read from the codes, a row at a time."""
    if len(x) == 1:
        return _multiply_row(x[0], kernel)[None]

    def one(row: Array) -> Array:
        # Bound to the row, or the compiler would make the codes wide once before the loop.
        return _multiply_row(*jax.lax.optimization_barrier((row, kernel)))

    return jax.lax.map(one, x)


def _multiply_row(x: Float[Array, " into"], kernel: Narrow) -> Float[Array, " out"]:
    blocks, _, block, _ = kernel.codes.shape
    cut = x.reshape(blocks, block)
    # Written out place by place, because XLA turns these sums into vectors of outputs; a reduction
    # it would turn into vectors of blocks, gathered byte by byte.
    parts = sum(
        cut[:, place, None, None] * kernel.codes[:, :, place].astype(jnp.float32)
        for place in range(block)
    )
    parts *= kernel.scales
    if kernel.offsets is not None:
        parts += cut.sum(axis=-1)[:, None, None] * kernel.offsets
    # A product, because a sum would be fused with what is above.
    return jnp.ones(blocks) @ parts.reshape(blocks, -1)
