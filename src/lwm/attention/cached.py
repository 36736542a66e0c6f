"""Attention of new tokens to a key-value cache: chunks of one request in prefill, one token a slot in decode.

A cache is [slots, kv_heads, capacity, dim] and may be sharded: slots over `data`, heads over `tensor`, capacity over
`sequence` in striped order (position p lies on device p mod R at index p // R, see `order`). So a token's place follows
from its position, every write is local, and a key's position follows from its place: what lies beyond a query's position is masked,
be it stale or never written. In prefill the cache's slabs go round a ring; in decode nothing moves but each device's
`(output, log-sum-exp)`. Work is bounded by the positions in use, not by the capacity.

Knows one layer's arrays; knows nothing of models or requests. Source of the decode merge: Flash-Decoding (Dao et al. 2023).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from lwm.attention.blockwise import (
    Cut,
    Keys,
    Sums,
    cut_queries,
    finish,
    forward,
    start,
    update,
)
from lwm.attention.mask import Side, side
from lwm.attention.ring import ring_forward
from lwm.core.mesh import DATA, SEQUENCE
from lwm.core.sharding import DECODE, PREFILL, partition_spec

SLAB = 512
"""Positions of a cache that are attended at a time; a device's capacity is a multiple of it."""


class LayerCache(NamedTuple):
    """Keys and values of one layer."""

    keys: Float[Array, "slots kv_heads capacity dim"]
    values: Float[Array, "slots kv_heads capacity dim"]


CACHE_AXES = ("slots", "kv_heads", "cache_position", None)


def _rank(axis: str, mesh: Mesh | None) -> tuple[Array | int, int]:
    """This device's index on an axis and the axis' size; 0 of 1 where there is no mesh."""
    if mesh is None or mesh.shape[axis] == 1:
        return 0, 1
    return jax.lax.axis_index(axis), mesh.shape[axis]


def _slab(x: Array, slot: Array | int, index: Array) -> Array:
    """[slots, kv_heads, capacity, dim] -> [1, kv_heads, SLAB, dim], without touching the rest."""
    sizes = (1, x.shape[1], SLAB, x.shape[3])
    return jax.lax.dynamic_slice(x, (slot, 0, index * SLAB, 0), sizes)


def _prefill(
    query: Array, key: Array, value: Array, cache: LayerCache, slot: Array, first: Array,
    mesh: Mesh | None, block: int,
) -> tuple[Array, LayerCache]:  # fmt: skip
    rank, shards = _rank(SEQUENCE, mesh)
    group, groups = _rank(DATA, mesh)
    local_slots = cache.keys.shape[0]
    mine = slot // local_slots == group
    slot = slot % local_slots

    def write(old: Array, new: Array) -> Array:
        new = new.swapaxes(1, 2).astype(old.dtype)
        place = (slot, 0, first // shards, 0)
        if groups > 1:
            new = jnp.where(mine, new, jax.lax.dynamic_slice(old, place, new.shape))
        return jax.lax.dynamic_update_slice(old, new, place)

    cache = LayerCache(write(cache.keys, key), write(cache.values, value))
    count = query.shape[1]
    positions = (first + jnp.arange(count) * shards + rank)[None]
    cut = Cut.of(count, block)
    queries = cut_queries(query, side(positions), key.shape[2], cut)

    def slab(index: Array, sums: Sums) -> Sums:
        places = index * SLAB + jnp.arange(SLAB)
        keys = Keys(
            key=_slab(cache.keys, slot, index)[:, None],
            value=_slab(cache.values, slot, index)[:, None],
            side=side((places * shards + rank)[None, None]),
        )
        if shards == 1:
            return forward(sums, queries, keys, causal=True)
        return ring_forward(sums, queries, keys, SEQUENCE, causal=True)

    used = first // shards + count  # the same on every device, as a loop with collectives needs
    sums = jax.lax.fori_loop(
        0, -(-used // SLAB), slab, start(queries.data.shape[:-1], query.shape[-1])
    )
    out = cut.undo_queries(finish(sums)[0]).astype(query.dtype)
    if groups > 1:
        out = jax.lax.psum(jnp.where(mine, out, 0), DATA)
    return out, cache


def prefill_attention(
    query: Float[Array, "1 chunk heads dim"],
    key: Float[Array, "1 chunk kv_heads dim"],
    value: Float[Array, "1 chunk kv_heads dim"],
    cache: LayerCache,
    *,
    slot: Int[Array, ""],
    first: Int[Array, ""],
    mesh: Mesh | None = None,
    block: int = 512,
) -> tuple[Float[Array, "1 chunk heads dim"], LayerCache]:
    """Writes one request's next chunk into its slot and attends to everything up to it.

    Args:
        query, key, value: the chunk, on a mesh in the striped order of its `sequence` axis.
        slot: which row of the cache is the request's.
        first: position of the chunk's first token, a multiple of the `sequence` axis' size; the chunk must end within the
            capacity.
        block: queries at a time.
    """
    local = partial(_prefill, mesh=mesh, block=block)
    if mesh is None or mesh.size == 1:
        return local(query, key, value, cache, slot, first)
    heads = partition_spec((None, "position", "heads", None), PREFILL)
    kv_heads = partition_spec((None, "position", "kv_heads", None), PREFILL)
    cached = LayerCache(*[partition_spec(CACHE_AXES, PREFILL)] * 2)
    scalar = partition_spec((), PREFILL)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(heads, kv_heads, kv_heads, cached, scalar, scalar),
        out_specs=(heads, cached),
        check_vma=False,
    )(query, key, value, cache, slot, first)


def _decode(
    query: Array, key: Array, value: Array, cache: LayerCache, positions: Array, mesh: Mesh | None
) -> tuple[Array, LayerCache]:
    rank, shards = _rank(SEQUENCE, mesh)
    slots, _, heads, dim = query.shape
    kv_heads, capacity = cache.keys.shape[1:3]
    # A slot without a token (-1) and a token of another device are written nowhere.
    mine = (positions >= 0) & (positions % shards == rank)
    place = jnp.where(mine, positions // shards, capacity)

    def write(old: Array, new: Array) -> Array:
        return old.at[jnp.arange(slots), :, place].set(new[:, 0].astype(old.dtype), mode="drop")

    cache = LayerCache(write(cache.keys, key), write(cache.values, value))
    grouped = (query * dim**-0.5).astype(query.dtype)
    grouped = grouped.reshape(slots, kv_heads, heads // kv_heads, 1, dim)

    def slab(index: Array, sums: Sums) -> Sums:
        keys, values = (
            jax.lax.dynamic_slice_in_dim(x, index * SLAB, SLAB, axis=2) for x in cache
        )
        where = (index * SLAB + jnp.arange(SLAB)) * shards + rank
        seen = where <= positions[:, None, None]
        return jax.vmap(update)(sums, grouped, keys, values, seen)

    used = positions.max() // shards + 1
    sums = jax.lax.fori_loop(0, -(-used // SLAB), slab, start(grouped.shape[:-1], dim))
    out, logsumexp = finish(sums)
    if shards > 1:
        out = merge(out, logsumexp, SEQUENCE)
    return out.reshape(slots, 1, heads, dim).astype(query.dtype), cache


def merge(
    out: Float[Array, "*rows dim"], logsumexp: Float[Array, "*rows"], axis: str
) -> Float[Array, "*rows dim"]:
    """One attention from each device's attention over its own keys, by log-sum-exp."""
    most = jax.lax.pmax(logsumexp, axis)
    weight = jnp.where(jnp.isneginf(logsumexp), 0.0, jnp.exp(logsumexp - most))
    total = jax.lax.psum(weight, axis)
    summed = jax.lax.psum(out * weight[..., None], axis)
    return summed / jnp.where(total > 0, total, 1.0)[..., None]


def decode_attention(
    query: Float[Array, "slots 1 heads dim"],
    key: Float[Array, "slots 1 kv_heads dim"],
    value: Float[Array, "slots 1 kv_heads dim"],
    cache: LayerCache,
    *,
    positions: Int[Array, " slots"],
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "slots 1 heads dim"], LayerCache]:
    """Writes each slot's next token into the cache and attends to everything up to it.

    Args:
        positions: of each slot's token; -1 for a slot that has none, which gets zeros and writes nothing.
    """
    local = partial(_decode, mesh=mesh)
    if mesh is None or mesh.size == 1:
        return local(query, key, value, cache, positions)
    heads = partition_spec(("slots", None, "heads", None), DECODE)
    kv_heads = partition_spec(("slots", None, "kv_heads", None), DECODE)
    cached = LayerCache(*[partition_spec(CACHE_AXES, DECODE)] * 2)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(heads, kv_heads, kv_heads, cached, partition_spec(("slots",), DECODE)),
        out_specs=(heads, cached),
        check_vma=False,
    )(query, key, value, cache, positions)
