"""Who may attend to whom, from one number or two per position.

A mask is never a square: it is the positions and segment ids of queries and keys, compared where
and when a block is computed. Segments with equal ids see each other; a negative id is padding,
which sees nothing and is seen by nothing. Every implementation in this room reads masks through
this file, and so does the benchmark that counts blocks.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

PADDING = -1


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Side:
    """Positions and segment ids of the queries or of the keys."""

    positions: Int[Array, "*batch seq"]
    segments: Int[Array, "*batch seq"]


def side(
    positions: Int[Array, "*batch seq"], segments: Int[Array, "*batch seq"] | None = None
) -> Side:
    """A side whose tokens all share a segment unless told otherwise."""
    return Side(
        positions=positions,
        segments=jnp.zeros_like(positions) if segments is None else segments,
    )


def allowed(query: Side, key: Side, *, causal: bool) -> Bool[Array, "*batch queries keys"]:
    """The square for one block, or in the reference for everything."""
    query_segments, key_segments = query.segments[..., :, None], key.segments[..., None, :]
    mask = (query_segments == key_segments) & (key_segments >= 0)
    if causal:
        mask &= query.positions[..., :, None] >= key.positions[..., None, :]
    return mask


def pad(side: Side, length: int) -> Side:
    """Grows the last axis to `length` with padding."""
    extra = [(0, 0)] * (side.positions.ndim - 1) + [(0, length - side.positions.shape[-1])]
    return Side(
        positions=jnp.pad(side.positions, extra),
        segments=jnp.pad(side.segments, extra, constant_values=PADDING),
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Ranges:
    """Least and greatest position and segment of the real tokens of each block; empty where all is
    padding."""

    first_position: Int[Array, "*blocks"]
    last_position: Int[Array, "*blocks"]
    first_segment: Int[Array, "*blocks"]
    last_segment: Int[Array, "*blocks"]


def ranges(side: Side) -> Ranges:
    """Ranges of a side already cut into blocks, [..., blocks, block]."""
    real = side.segments >= 0
    most = jnp.iinfo(jnp.int32).max
    return Ranges(
        first_position=jnp.where(real, side.positions, most).min(axis=-1),
        last_position=jnp.where(real, side.positions, -1).max(axis=-1),
        first_segment=jnp.where(real, side.segments, most).min(axis=-1),
        last_segment=jnp.where(real, side.segments, -1).max(axis=-1),
    )


def needed(query: Ranges, key: Ranges, *, causal: bool) -> Bool[Array, "*blocks"]:
    """Whether a pair of blocks holds an allowed pair of tokens; broadcasts over blocks.

    Exact where segments are contiguous and each block's positions form a run, as in packed rows
    and in zigzag shards; otherwise it may name a block too many, never one too few.
    """
    meet = (query.first_segment <= key.last_segment) & (key.first_segment <= query.last_segment)
    if causal:
        meet &= key.first_position <= query.last_position
    return meet
