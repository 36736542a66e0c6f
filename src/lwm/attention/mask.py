"""Decide which queries may attend to which keys, from a position and a segment per token.

Tokens attend within their own segment; a negative segment is padding, which neither attends nor is
attended to.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from lwm.core.pytree import pytree

PADDING = -1


@pytree
class Side:
    """Hold the positions and segments of the queries, or of the keys."""

    positions: Int[Array, "*batch seq"]
    segments: Int[Array, "*batch seq"]


def side(
    positions: Int[Array, "*batch seq"], segments: Int[Array, "*batch seq"] | None = None
) -> Side:
    """Make a side; segments default to one segment for all tokens."""
    if segments is None:
        segments = jnp.zeros_like(positions)
    return Side(positions=positions, segments=segments)


def allowed(query: Side, key: Side, *, causal: bool) -> Bool[Array, "*batch queries keys"]:
    """Return the mask of one block, or of everything in the reference implementation."""
    query_segments, key_segments = query.segments[..., :, None], key.segments[..., None, :]
    mask = (query_segments == key_segments) & (key_segments >= 0)
    if causal:
        mask &= query.positions[..., :, None] >= key.positions[..., None, :]
    return mask


def pad(side: Side, length: int) -> Side:
    """Extend the last axis to `length` with padding."""
    extra = [(0, 0)] * (side.positions.ndim - 1) + [(0, length - side.positions.shape[-1])]
    return Side(
        positions=jnp.pad(side.positions, extra),
        segments=jnp.pad(side.segments, extra, constant_values=PADDING),
    )


@pytree
class Ranges:
    """Hold the range of positions and segments of each block, empty if it is only padding."""

    first_position: Int[Array, "*blocks"]
    last_position: Int[Array, "*blocks"]
    first_segment: Int[Array, "*blocks"]
    last_segment: Int[Array, "*blocks"]


def ranges(side: Side) -> Ranges:
    """Return the ranges of a side that is split into blocks, [..., blocks, block]."""
    real = side.segments >= 0
    most = jnp.iinfo(jnp.int32).max
    return Ranges(
        first_position=jnp.where(real, side.positions, most).min(axis=-1),
        last_position=jnp.where(real, side.positions, -1).max(axis=-1),
        first_segment=jnp.where(real, side.segments, most).min(axis=-1),
        last_segment=jnp.where(real, side.segments, -1).max(axis=-1),
    )


def needed(query: Ranges, key: Ranges, *, causal: bool) -> Bool[Array, "*blocks"]:
    """Return whether a pair of blocks may hold an allowed pair of tokens; broadcast over blocks.

    The answer is exact if segments and each block's positions are contiguous, as in packed rows
    and zigzag shards. Otherwise it may include a block too many, never omit one.
    """
    overlap = (query.first_segment <= key.last_segment) & (key.first_segment <= query.last_segment)
    if causal:
        overlap &= key.first_position <= query.last_position
    return overlap
