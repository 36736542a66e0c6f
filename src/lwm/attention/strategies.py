"""Compute attention on one device, or over a sequence that is sharded along one mesh axis.

A strategy decides what the devices exchange: keys and values around a ring, all keys and values,
or heads for sequence. It runs inside `shard_map`: every array is one device's part, shaped as for
`blockwise_attention`, and `axis` names the mesh axis. Its argument `attend` is
`blockwise_attention` with block sizes and causality bound. To add a strategy, write such a
function and name it in `api`.

Sources: Liu, Zaharia & Abbeel 2023 (arXiv 2310.01889) for the ring; Jacobs et al. 2023 (arXiv
2309.14509) for Ulysses.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from lwm.attention.blocks import BlockLayout, make_keys, make_queries
from lwm.attention.blockwise import OutputGradients
from lwm.attention.mask import Side
from lwm.attention.online_softmax import initial_sums, normalize
from lwm.attention.ring import ring_accumulate, ring_gradients
from lwm.core.errors import ConfigError

CHECKPOINT_NAME = "attention"
"""Name by which a rematerialization policy saves an output and its log-sum-exp: all that the
backward pass needs of the forward pass, besides queries, keys and values."""


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _attention(
    query: Array, key: Array, value: Array, query_side: Side, key_side: Side,
    axis: str | None, causal: bool, query_layout: BlockLayout, key_layout: BlockLayout,
) -> Array:  # fmt: skip
    return _forward(
        query, key, value, query_side, key_side, axis, causal, query_layout, key_layout
    )[0]


def _forward(
    query: Array, key: Array, value: Array, query_side: Side, key_side: Side,
    axis: str | None, causal: bool, query_layout: BlockLayout, key_layout: BlockLayout,
) -> tuple[Array, Any]:  # fmt: skip
    queries = make_queries(query, query_side, key.shape[2], query_layout)
    keys = make_keys(key, value, key_side, key_layout)
    sums = initial_sums(queries.data.shape[:-1], query.shape[-1])
    blocks, logsumexp = normalize(ring_accumulate(sums, queries, keys, axis, causal=causal))
    out = query_layout.join_queries(blocks).astype(query.dtype)
    out, logsumexp = (checkpoint_name(x, CHECKPOINT_NAME) for x in (out, logsumexp))
    return out, (query, key, value, query_side, key_side, out, logsumexp)


def _backward(
    axis: str | None, causal: bool, query_layout: BlockLayout, key_layout: BlockLayout,
    residuals: Any, gradient: Array,
) -> tuple[Any, ...]:  # fmt: skip
    query, key, value, query_side, key_side, out, logsumexp = residuals
    split = partial(query_layout.split_queries, kv_heads=key.shape[2])
    queries = make_queries(query, query_side, key.shape[2], query_layout)
    keys = make_keys(key, value, key_side, key_layout)
    outputs = OutputGradients.of(split(out), logsumexp, split(gradient))
    dq, dk, dv = ring_gradients(queries, outputs, keys, axis, causal=causal)
    dq = query_layout.join_queries(dq) * query.shape[-1] ** -0.5
    dk, dv = key_layout.join_keys(dk), key_layout.join_keys(dv)
    return dq.astype(query.dtype), dk.astype(key.dtype), dv.astype(value.dtype), None, None


_attention.defvjp(_forward, _backward)


def blockwise_attention(
    query: Float[Array, "batch queries heads dim"],
    key: Float[Array, "batch keys kv_heads dim"],
    value: Float[Array, "batch keys kv_heads dim"],
    query_side: Side,
    key_side: Side,
    *,
    causal: bool,
    query_block: int,
    key_block: int,
    chunks: tuple[int, int] = (1, 1),
    axis: str | None = None,
) -> Float[Array, "batch queries heads dim"]:
    """Compute attention in blocks of at most the given sizes.

    Args:
        chunks: equal runs of queries and of keys that blocks must not straddle (see
            `BlockLayout`).
        axis: mesh axis around which keys and values are passed; None to use only these.
    """
    query_layout = BlockLayout.of(query.shape[1], query_block, chunks[0])
    key_layout = BlockLayout.of(key.shape[1], key_block, chunks[1])
    return _attention(
        query, key, value, query_side, key_side, axis, causal, query_layout, key_layout
    )


def _runs(length: int) -> int:
    """Return how many runs of positions a shard has: a zigzag shard two, if its length is even."""
    return 2 if length % 2 == 0 else 1


def ring_attention(
    attend: Callable[..., Array], query: Array, key: Array, value: Array,
    query_side: Side, key_side: Side, *, axis: str,
) -> Array:  # fmt: skip
    """Pass keys and values around the devices: the least memory."""
    chunks = (_runs(query.shape[1]), _runs(key.shape[1]))
    return attend(query, key, value, query_side, key_side, chunks=chunks, axis=axis)


def all_gather_attention(
    attend: Callable[..., Array], query: Array, key: Array, value: Array,
    query_side: Side, key_side: Side, *, axis: str,
) -> Array:  # fmt: skip
    """Gather all keys and values on every device: the least latency, while they fit."""
    gather = partial(jax.lax.all_gather, axis_name=axis, axis=1, tiled=True)
    chunks = (_runs(query.shape[1]), _runs(key.shape[1]) * jax.lax.axis_size(axis))
    key, value, key_side = jax.tree.map(gather, (key, value, key_side))
    return attend(query, key, value, query_side, key_side, chunks=chunks)


def ulysses_attention(
    attend: Callable[..., Array], query: Array, key: Array, value: Array,
    query_side: Side, key_side: Side, *, axis: str,
) -> Array:  # fmt: skip
    """Exchange heads for sequence: each device computes a share of the heads over all positions.

    Raises:
        ConfigError: the devices do not divide the heads.
    """
    size = jax.lax.axis_size(axis)
    heads, kv_heads = query.shape[2], key.shape[2]
    require_heads(heads, size)
    # Repeat key-value heads until each device gets a whole one.
    repeats = size // math.gcd(kv_heads, size)
    key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
    split = partial(jax.lax.all_to_all, axis_name=axis, split_axis=2, concat_axis=1, tiled=True)
    gather = partial(jax.lax.all_gather, axis_name=axis, axis=1, tiled=True)
    chunks = (_runs(query.shape[1]) * size, _runs(key.shape[1]) * size)
    arrays = (split(query), split(key), split(value))
    out = attend(*arrays, *jax.tree.map(gather, (query_side, key_side)), chunks=chunks)
    return jax.lax.all_to_all(out, axis, split_axis=1, concat_axis=2, tiled=True)


def require_heads(heads: int, devices: int) -> None:
    """Check that `ulysses` can divide the heads of a tensor shard over the sequence axis.

    Raises:
        ConfigError: names both numbers.
    """
    if heads % devices:
        raise ConfigError(
            f"ulysses divides heads over the sequence axis, but {heads} heads on each tensor "
            f"shard cannot be divided by {devices} devices; choose the strategy 'ring' or another "
            "mesh"
        )
