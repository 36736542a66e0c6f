"""Sequences cut into blocks, for attention that goes block by block.

Queries whose heads share keys become rows of one matrix product. Knows arrays, positions and
segments; knows nothing of softmax.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lwm.attention.mask import PADDING, Ranges, Side, ranges


@dataclass(frozen=True)
class Cut:
    """How a sequence axis is cut: into `chunks` equal runs, each into blocks of equal size, padded
    at the end of each run.

    Chunks keep the two runs of a zigzag shard apart: a block across both would span nearly all
    positions and be needed by everybody.
    """

    length: int
    chunks: int
    block: int

    @staticmethod
    def of(length: int, block: int, chunks: int = 1) -> "Cut":
        """Blocks of at most `block` positions, evened out so that little is padded."""
        assert length % chunks == 0, (length, chunks)
        run = length // chunks
        return Cut(length, chunks, -(-run // -(-run // block)))

    def apply(self, x: Array, fill: int = 0) -> Array:
        """[batch, seq, ...] -> [batch, blocks, block, ...]"""
        run = self.length // self.chunks
        x = x.reshape(x.shape[0], self.chunks, run, *x.shape[2:])
        extra = [(0, 0), (0, 0), (0, -run % self.block)] + [(0, 0)] * (x.ndim - 3)
        x = jnp.pad(x, extra, constant_values=fill)
        return x.reshape(x.shape[0], -1, self.block, *x.shape[3:])

    def undo(self, x: Array) -> Array:
        """[batch, blocks, block, ...] -> [batch, seq, ...]"""
        run = self.length // self.chunks
        x = x.reshape(x.shape[0], self.chunks, -1, *x.shape[3:])[:, :, :run]
        return x.reshape(x.shape[0], self.length, *x.shape[3:])

    def side(self, side: Side) -> Side:
        return Side(
            positions=self.apply(side.positions), segments=self.apply(side.segments, PADDING)
        )

    def queries(
        self, x: Float[Array, "batch seq heads dim"], kv_heads: int
    ) -> Float[Array, "batch blocks kv_heads group block dim"]:
        """Heads that share keys become one matrix product's rows."""
        blocks = self.apply(x)
        blocks = blocks.reshape(*blocks.shape[:3], kv_heads, -1, x.shape[-1])
        return blocks.transpose(0, 1, 3, 4, 2, 5)

    def keys(
        self, x: Float[Array, "batch seq kv_heads dim"]
    ) -> Float[Array, "batch blocks kv_heads block dim"]:
        return self.apply(x).swapaxes(2, 3)

    def undo_queries(
        self, x: Float[Array, "batch blocks kv_heads group block dim"]
    ) -> Float[Array, "batch seq heads dim"]:
        x = x.transpose(0, 1, 4, 2, 3, 5)
        return self.undo(x.reshape(*x.shape[:3], -1, x.shape[-1]))

    def undo_keys(
        self, x: Float[Array, "batch blocks kv_heads block dim"]
    ) -> Float[Array, "batch seq kv_heads dim"]:
        return self.undo(x.swapaxes(2, 3))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Queries:
    """Query blocks, scaled by dim ** -0.5."""

    data: Float[Array, "*batch blocks kv_heads group block dim"]
    side: Side
    ranges: Ranges


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Keys:
    """Key and value blocks."""

    key: Float[Array, "*batch blocks kv_heads block dim"]
    value: Float[Array, "*batch blocks kv_heads block dim"]
    side: Side


def cut_queries(
    query: Float[Array, "batch seq heads dim"], side: Side, kv_heads: int, cut: Cut
) -> Queries:
    blocks = cut.side(side)
    scaled = (query * query.shape[-1] ** -0.5).astype(query.dtype)
    return Queries(data=cut.queries(scaled, kv_heads), side=blocks, ranges=ranges(blocks))


def cut_keys(
    key: Float[Array, "batch seq kv_heads dim"],
    value: Float[Array, "batch seq kv_heads dim"],
    side: Side,
    cut: Cut,
) -> Keys:
    return Keys(key=cut.keys(key), value=cut.keys(value), side=cut.side(side))
