"""Attention over a sequence sharded along one mesh axis: ring, all-gathered keys, or heads traded
for sequence.

These run inside `shard_map`: every array is one device's part, and `axis` names the mesh axis.
Positions and segments travel with the keys, because a balanced order breaks `index = offset + i`.
Knows arrays, masks and an axis name; knows nothing of meshes, models, caches or batches.

Sources: Liu, Zaharia & Abbeel 2023 (arXiv 2310.01889) for the ring; Jacobs et al. 2023 (arXiv
2309.14509) for Ulysses.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from lwm.attention.blocks import Cut, Keys, Queries, cut_keys, cut_queries
from lwm.attention.blockwise import (
    CHECKPOINT_NAME,
    backward,
    blockwise_attention,
    forward,
    save,
)
from lwm.attention.mask import Side
from lwm.attention.online_softmax import Sums, finish, start
from lwm.core.errors import ConfigError


def send_to_next(tree: Any, axis: str) -> Any:
    """Sends this device's arrays to the next one round the ring."""
    size = jax.lax.axis_size(axis)
    return jax.lax.ppermute(tree, axis, [(i, (i + 1) % size) for i in range(size)])


def ring_forward(sums: Sums, queries: Queries, keys: Keys, axis: str, *, causal: bool) -> Sums:
    """Meets the keys of every device in turn; each block is sent on before it is used."""

    def step(carry: tuple[Sums, Keys], _: None) -> tuple[tuple[Sums, Keys], None]:
        sums, keys = carry
        incoming = send_to_next(keys, axis)
        return (forward(sums, queries, keys, causal=causal), incoming), None

    hops = jax.lax.axis_size(axis) - 1
    (sums, keys), _ = jax.lax.scan(step, (sums, keys), length=hops)
    return forward(sums, queries, keys, causal=causal)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _ring(
    query: Array, key: Array, value: Array, query_side: Side, key_side: Side,
    axis: str, causal: bool, query_cut: Cut, key_cut: Cut,
) -> Array:  # fmt: skip
    return _ring_forward(
        query, key, value, query_side, key_side, axis, causal, query_cut, key_cut
    )[0]


def _ring_forward(
    query: Array, key: Array, value: Array, query_side: Side, key_side: Side,
    axis: str, causal: bool, query_cut: Cut, key_cut: Cut,
) -> tuple[Array, Any]:  # fmt: skip
    queries = cut_queries(query, query_side, key.shape[2], query_cut)
    keys = cut_keys(key, value, key_side, key_cut)
    sums = start(queries.data.shape[:-1], query.shape[-1])
    blocks, logsumexp = finish(ring_forward(sums, queries, keys, axis, causal=causal))
    out = checkpoint_name(query_cut.undo_queries(blocks).astype(query.dtype), CHECKPOINT_NAME)
    logsumexp = checkpoint_name(logsumexp, CHECKPOINT_NAME)
    return out, (query, key, value, query_side, key_side, out, logsumexp)


def _ring_backward(
    axis: str, causal: bool, query_cut: Cut, key_cut: Cut, residuals: Any, gradient: Array
) -> tuple[Any, ...]:
    query, key, value, query_side, key_side, out, logsumexp = residuals
    kv_heads = key.shape[2]
    queries = cut_queries(query, query_side, kv_heads, query_cut)
    keys = cut_keys(key, value, key_side, key_cut)
    saved = save(
        query_cut.queries(out, kv_heads), logsumexp, query_cut.queries(gradient, kv_heads)
    )

    def step(carry: Any, _: None) -> tuple[Any, None]:
        dq, keys, sums = carry
        incoming = send_to_next(keys, axis)
        # What the earlier devices summed for the present block arrives while our own part is
        # computed.
        arrived = send_to_next(sums, axis)
        dq, *part = backward(dq, queries, saved, keys, causal=causal)
        return (dq, incoming, jax.tree.map(jnp.add, arrived, tuple(part))), None

    zeros = jnp.zeros(keys.key.shape, jnp.float32)
    carry = (jnp.zeros(queries.data.shape, jnp.float32), keys, (zeros, zeros))
    (dq, _, sums), _ = jax.lax.scan(step, carry, length=jax.lax.axis_size(axis))
    dk, dv = send_to_next(sums, axis)  # one last hop brings every block's gradient home
    dq = query_cut.undo_queries(dq) * query.shape[-1] ** -0.5
    dk, dv = key_cut.undo_keys(dk), key_cut.undo_keys(dv)
    return dq.astype(query.dtype), dk.astype(key.dtype), dv.astype(value.dtype), None, None


_ring.defvjp(_ring_forward, _ring_backward)


def _runs(length: int) -> int:
    """A zigzag shard is two runs of positions; a shard of odd length cannot be one."""
    return 2 if length % 2 == 0 else 1


def ring_attention(
    query: Float[Array, "batch queries heads dim"],
    key: Float[Array, "batch keys kv_heads dim"],
    value: Float[Array, "batch keys kv_heads dim"],
    query_side: Side,
    key_side: Side,
    *,
    axis: str,
    causal: bool,
    query_block: int,
    key_block: int,
) -> Float[Array, "batch queries heads dim"]:
    """Keys and values go round; queries stay."""
    query_cut = Cut.of(query.shape[1], query_block, _runs(query.shape[1]))
    key_cut = Cut.of(key.shape[1], key_block, _runs(key.shape[1]))
    return _ring(query, key, value, query_side, key_side, axis, causal, query_cut, key_cut)


def all_gather_attention(
    query: Float[Array, "batch queries heads dim"],
    key: Float[Array, "batch keys kv_heads dim"],
    value: Float[Array, "batch keys kv_heads dim"],
    query_side: Side,
    key_side: Side,
    *,
    axis: str,
    causal: bool,
    query_block: int,
    key_block: int,
) -> Float[Array, "batch queries heads dim"]:
    """Every device holds all keys and values: least latency, while they fit."""
    gather = partial(jax.lax.all_gather, axis_name=axis, axis=1, tiled=True)
    everyone = jax.tree.map(gather, (key, value, key_side))
    runs = _runs(key.shape[1]) * jax.lax.axis_size(axis)
    return blockwise_attention(
        query, everyone[0], everyone[1], query_side, everyone[2],
        causal=causal, query_block=query_block, key_block=key_block,
        chunks=(_runs(query.shape[1]), runs),
    )  # fmt: skip


def require_heads(heads: int, devices: int) -> None:
    """Refuses a sequence axis that does not divide the heads of a tensor shard, as `ulysses` must.

    Raises:
        ConfigError: names both numbers.
    """
    if heads % devices:
        raise ConfigError(
            f"ulysses divides heads over the sequence axis, but {heads} heads on each tensor "
            f"shard cannot be divided by {devices} devices; choose the strategy 'ring' or another "
            "mesh"
        )


def ulysses_attention(
    query: Float[Array, "batch queries heads dim"],
    key: Float[Array, "batch keys kv_heads dim"],
    value: Float[Array, "batch keys kv_heads dim"],
    query_side: Side,
    key_side: Side,
    *,
    axis: str,
    causal: bool,
    query_block: int,
    key_block: int,
) -> Float[Array, "batch queries heads dim"]:
    """Each device gets the whole sequence for its share of the heads, and trades back.

    Raises:
        ConfigError: the devices do not divide the heads.
    """
    size = jax.lax.axis_size(axis)
    heads, kv_heads = query.shape[2], key.shape[2]
    require_heads(heads, size)
    # Too few key heads are repeated until each device gets a whole one.
    repeats = size // math.gcd(kv_heads, size)
    key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
    split = partial(jax.lax.all_to_all, axis_name=axis, split_axis=2, concat_axis=1, tiled=True)
    gather = partial(jax.lax.all_gather, axis_name=axis, axis=1, tiled=True)
    out = blockwise_attention(
        split(query), split(key), split(value),
        jax.tree.map(gather, query_side), jax.tree.map(gather, key_side),
        causal=causal, query_block=query_block, key_block=key_block,
        chunks=(_runs(query.shape[1]) * size, _runs(key.shape[1]) * size),
    )  # fmt: skip
    return jax.lax.all_to_all(out, axis, split_axis=1, concat_axis=2, tiled=True)
