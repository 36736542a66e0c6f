"""Split queries and keys into blocks, and combine blocks under an online softmax.

Attention by blocks never builds the whole square of scores. Query heads that share a key-value
head become rows of one matrix product.

Source: Milakov & Gimelshein 2018 (arXiv 1805.02867) for the online softmax.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from lwm.attention.mask import PADDING, Ranges, Side, ranges
from lwm.core.pytree import pytree

# Finite, so that rows without any key yet give exp(-inf - _LOWEST) = 0 and never inf - inf.
_LOWEST = -1e30


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
        positions = self.split(side.positions)
        return Side(positions=positions, segments=self.split(side.segments, PADDING))

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
        """Invert `split_queries`."""
        x = x.transpose(0, 1, 4, 2, 3, 5)
        return self.join(x.reshape(*x.shape[:3], -1, x.shape[-1]))


@pytree
class Queries:
    """Hold query blocks, scaled by dim ** -0.5."""

    data: Float[Array, "*batch blocks kv_heads group block dim"]
    side: Side
    ranges: Ranges


@pytree
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
    key, value = (layout.split(x).swapaxes(2, 3) for x in (key, value))
    return Keys(key=key, value=value, side=layout.split_side(side))


@pytree
class Sums:
    """Hold running maxima, sums of exponentials and weighted values of rows, all float32."""

    maximum: Float[Array, "*batch kv_heads group block"]
    total: Float[Array, "*batch kv_heads group block"]
    values: Float[Array, "*batch kv_heads group block dim"]


def initial_sums(rows: tuple[int, ...], dim: int) -> Sums:
    """Return the sums over no keys, for rows [..., kv_heads, group, block]."""
    return Sums(
        maximum=jnp.full(rows, _LOWEST, jnp.float32),
        total=jnp.zeros(rows, jnp.float32),
        values=jnp.zeros((*rows, dim), jnp.float32),
    )


def add_scores(
    sums: Sums,
    scores: Float[Array, "*batch kv_heads group block keys"],
    weighted_values: Callable[[Array], Array],
) -> Sums:
    """Add keys by scores, -inf where masked, and a function from weights to summed values."""
    maximum = jnp.maximum(sums.maximum, scores.max(axis=-1))
    weights = jnp.exp(scores - maximum[..., None])
    shrink = jnp.exp(sums.maximum - maximum)
    values = weighted_values(weights)
    return Sums(
        maximum=maximum,
        total=sums.total * shrink + weights.sum(axis=-1),
        values=sums.values * shrink[..., None] + values,
    )


def normalize(sums: Sums) -> tuple[Array, Array]:
    """Return attention and its log-sum-exp; zeros and -inf for rows without keys."""
    nonempty = sums.total > 0
    total = jnp.where(nonempty, sums.total, 1.0)
    out = sums.values / total[..., None]
    return out, jnp.where(nonempty, sums.maximum + jnp.log(total), -jnp.inf)
