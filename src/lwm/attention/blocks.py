"""Split queries and keys into blocks, so that attention never builds the whole square of scores.

Query heads that share a key-value head become rows of one matrix product.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lwm.attention.mask import PADDING, Ranges, Side, ranges


@dataclass(frozen=True)
class BlockLayout:
    """Describe how a sequence is split: into equal chunks, and each chunk into equal blocks.

    The last block of each chunk is padded. Chunks separate the two runs of positions of a zigzag
    shard: a block with both runs would span nearly all positions, and every query would need it.
    """

    length: int
    chunks: int
    block: int

    @staticmethod
    def of(length: int, block: int, chunks: int = 1) -> "BlockLayout":
        """Choose equal blocks of at most `block` positions, with as little padding as possible."""
        assert length % chunks == 0, (length, chunks)
        run = length // chunks
        return BlockLayout(length, chunks, -(-run // -(-run // block)))

    def split(self, x: Array, fill: int = 0) -> Array:
        """Split [batch, seq, ...] into [batch, blocks, block, ...]."""
        run = self.length // self.chunks
        x = x.reshape(x.shape[0], self.chunks, run, *x.shape[2:])
        extra = [(0, 0), (0, 0), (0, -run % self.block)] + [(0, 0)] * (x.ndim - 3)
        x = jnp.pad(x, extra, constant_values=fill)
        return x.reshape(x.shape[0], -1, self.block, *x.shape[3:])

    def join(self, x: Array) -> Array:
        """Join [batch, blocks, block, ...] to [batch, seq, ...]."""
        run = self.length // self.chunks
        x = x.reshape(x.shape[0], self.chunks, -1, *x.shape[3:])[:, :, :run]
        return x.reshape(x.shape[0], self.length, *x.shape[3:])

    def split_side(self, side: Side) -> Side:
        """Split positions and segments."""
        return Side(
            positions=self.split(side.positions), segments=self.split(side.segments, PADDING)
        )

    def split_queries(
        self, x: Float[Array, "batch seq heads dim"], kv_heads: int
    ) -> Float[Array, "batch blocks kv_heads group block dim"]:
        """Split queries, grouping the heads that share a key-value head."""
        blocks = self.split(x)
        blocks = blocks.reshape(*blocks.shape[:3], kv_heads, -1, x.shape[-1])
        return blocks.transpose(0, 1, 3, 4, 2, 5)

    def join_queries(
        self, x: Float[Array, "batch blocks kv_heads group block dim"]
    ) -> Float[Array, "batch seq heads dim"]:
        """Join blocks in the form of queries; the inverse of `split_queries`."""
        x = x.transpose(0, 1, 4, 2, 3, 5)
        return self.join(x.reshape(*x.shape[:3], -1, x.shape[-1]))

    def split_keys(
        self, x: Float[Array, "batch seq kv_heads dim"]
    ) -> Float[Array, "batch blocks kv_heads block dim"]:
        """Split keys or values."""
        return self.split(x).swapaxes(2, 3)

    def join_keys(
        self, x: Float[Array, "batch blocks kv_heads block dim"]
    ) -> Float[Array, "batch seq kv_heads dim"]:
        """Join blocks in the form of keys; the inverse of `split_keys`."""
        return self.join(x.swapaxes(2, 3))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Queries:
    """Hold query blocks, scaled by dim ** -0.5."""

    data: Float[Array, "*batch blocks kv_heads group block dim"]
    side: Side
    ranges: Ranges


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Keys:
    """Hold blocks of keys and values."""

    key: Float[Array, "*batch blocks kv_heads block dim"]
    value: Float[Array, "*batch blocks kv_heads block dim"]
    side: Side


def make_queries(
    query: Float[Array, "batch seq heads dim"], side: Side, kv_heads: int, layout: BlockLayout
) -> Queries:
    """Scale queries and split them into blocks."""
    blocks = layout.split_side(side)
    scaled = (query * query.shape[-1] ** -0.5).astype(query.dtype)
    return Queries(data=layout.split_queries(scaled, kv_heads), side=blocks, ranges=ranges(blocks))


def make_keys(
    key: Float[Array, "batch seq kv_heads dim"],
    value: Float[Array, "batch seq kv_heads dim"],
    side: Side,
    layout: BlockLayout,
) -> Keys:
    """Split keys and values into blocks."""
    return Keys(
        key=layout.split_keys(key),
        value=layout.split_keys(value),
        side=layout.split_side(side),
    )
