"""Attention of new tokens to a key-value cache: chunks of one request in prefill, one token a slot
or a few in decode.

A cache holds values as [slots, kv_heads, capacity, dim] and keys as [slots, kv_heads, dim,
capacity], the order in which each is multiplied. It may be sharded: slots over `data`, heads over
`tensor`, capacity over `sequence` in striped order (position p lies on device p mod R at index p
// R, see `order`). So a token's place follows from its position, every write is local, and a key's
position follows from its place: what lies beyond a query's position is masked, be it stale or
never written. In prefill the cache's slabs go round a ring; in decode nothing moves but each
device's `(output, log-sum-exp)`. Beyond one slab, work is bounded by the positions in use, not by
the capacity.

Knows one layer's arrays; knows nothing of models or requests. Source of the decode merge:
Flash-Decoding (Dao et al. 2023).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from lwm.attention.blocks import Cut, Keys, cut_queries
from lwm.attention.blockwise import forward
from lwm.attention.mask import PADDING, Side, side
from lwm.attention.online_softmax import Sums, finish, start
from lwm.attention.ring import ring_forward
from lwm.core.mesh import DATA, SEQUENCE
from lwm.core.sharding import DECODE, PREFILL, Rules, partition_spec

SLAB = 512
"""Positions of a device's cache that prefill attends at a time."""

DECODE_SLAB = 4096
"""The same in decode: large, so that a CPU is spared the copy of each slab for most
conversations."""

CAPACITY_UNIT = 128
"""A device's capacity is a multiple of this."""


class LayerCache(NamedTuple):
    """Keys and values of one layer."""

    keys: Float[Array, "slots kv_heads dim capacity"]
    values: Float[Array, "slots kv_heads capacity dim"]


CACHE_AXES = LayerCache(
    ("slots", "kv_heads", None, "cache_position"),  # type: ignore[arg-type]
    ("slots", "kv_heads", "cache_position", None),  # type: ignore[arg-type]
)
"""Logical axes of keys and values."""


def _specs(rules: Rules) -> LayerCache:
    return LayerCache(*(partition_spec(axes, rules) for axes in CACHE_AXES))  # type: ignore[arg-type]


def _rank(axis: str, mesh: Mesh | None) -> tuple[Array | int, int]:
    """This device's index on an axis and the axis' size; 0 of 1 where there is no mesh."""
    if mesh is None or mesh.shape[axis] == 1:
        return 0, 1
    return jax.lax.axis_index(axis), mesh.shape[axis]


def _slab(index: Array, size: int, capacity: int) -> tuple[Array, Array, Array]:
    """First place, all places, and which of them no earlier slab has had: the last slab is as long
    as the others and overlaps the one before it."""
    first = jnp.minimum(index * size, capacity - size)
    places = first + jnp.arange(size)
    return first, places, places >= index * size


def _prefill(
    query: Array, key: Array, value: Array, cache: LayerCache, slot: Array, first: Array,
    mesh: Mesh | None, block: int,
) -> tuple[Array, LayerCache]:  # fmt: skip
    rank, shards = _rank(SEQUENCE, mesh)
    group, groups = _rank(DATA, mesh)
    local_slots = cache.keys.shape[0]
    mine = slot // local_slots == group
    slot = slot % local_slots

    place = first // shards

    def write(old: Array, new: Array, at: tuple[Array | int, ...]) -> Array:
        new = new.astype(old.dtype)
        if groups > 1:
            new = jnp.where(mine, new, jax.lax.dynamic_slice(old, at, new.shape))
        return jax.lax.dynamic_update_slice(old, new, at)

    cache = LayerCache(
        keys=write(cache.keys, key.transpose(0, 2, 3, 1), (slot, 0, 0, place)),
        values=write(cache.values, value.transpose(0, 2, 1, 3), (slot, 0, place, 0)),
    )
    count = query.shape[1]
    positions = (first + jnp.arange(count) * shards + rank)[None]
    cut = Cut.of(count, block)
    queries = cut_queries(query, side(positions), key.shape[2], cut)

    kv_heads, dim, capacity = cache.keys.shape[1:]
    size = min(SLAB, capacity)

    def slab(index: Array, sums: Sums) -> Sums:
        first_place, places, fresh = _slab(index, size, capacity)
        key = jax.lax.dynamic_slice(
            cache.keys, (slot, 0, 0, first_place), (1, kv_heads, dim, size)
        )
        value = jax.lax.dynamic_slice(
            cache.values, (slot, 0, first_place, 0), (1, kv_heads, size, dim)
        )
        keys = Keys(
            key=key.swapaxes(2, 3)[:, None],
            value=value[:, None],
            side=Side(
                positions=(places * shards + rank)[None, None],
                segments=jnp.where(fresh, 0, PADDING)[None, None],
            ),
        )
        if shards == 1:
            return forward(sums, queries, keys, causal=True)
        return ring_forward(sums, queries, keys, SEQUENCE, causal=True)

    used = first // shards + count  # the same on every device, as a loop with collectives needs
    sums = jax.lax.fori_loop(
        0, -(-used // size), slab, start(queries.data.shape[:-1], query.shape[-1])
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
        first: position of the chunk's first token, a multiple of the `sequence` axis' size; the
            chunk must end within the capacity.
        block: queries at a time.
    """
    local = partial(_prefill, mesh=mesh, block=block)
    if mesh is None or mesh.size == 1:
        return local(query, key, value, cache, slot, first)
    heads = partition_spec((None, "position", "heads", None), PREFILL)
    kv_heads = partition_spec((None, "position", "kv_heads", None), PREFILL)
    cached = _specs(PREFILL)
    scalar = partition_spec((), PREFILL)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(heads, kv_heads, kv_heads, cached, scalar, scalar),
        out_specs=(heads, cached),
        check_vma=False,
    )(query, key, value, cache, slot, first)


def _decode(
    query: Array, key: Array, value: Array, cache: LayerCache, positions: Array,
    mesh: Mesh | None, platform: str,
) -> tuple[Array, LayerCache]:  # fmt: skip
    rank, shards = _rank(SEQUENCE, mesh)
    slots, width, heads, dim = query.shape
    kv_heads, _, capacity = cache.keys.shape[1:]
    flat = positions.reshape(-1)
    # A place without a token (-1) and a token of another device write back what is there.
    mine = (flat >= 0) & (flat % shards == rank)
    place = jnp.where(mine, flat // shards, 0)

    def write(i: Array, cache: LayerCache) -> LayerCache:
        def put(old: Array, new: Array, at: tuple[Array | int, ...]) -> Array:
            kept = jax.lax.dynamic_slice(old, at, new.shape)
            new = jnp.where(mine[i], new.astype(old.dtype), kept)
            return jax.lax.dynamic_update_slice(old, new, at)

        slot, column = i // width, i % width
        new_key, new_value = (
            jax.lax.dynamic_slice(new, (slot, column, 0, 0), (1, 1, kv_heads, dim))
            for new in (key, value)
        )
        return LayerCache(
            keys=put(cache.keys, new_key.transpose(0, 2, 3, 1), (slot, 0, 0, place[i])),
            values=put(cache.values, new_value.transpose(0, 2, 1, 3), (slot, 0, place[i], 0)),
        )

    # A loop of unknown length, because the CPU backend would fuse a plain write with what reads
    # the cache, and rewrite all of it.
    last = jnp.where(flat >= 0, jnp.arange(slots * width) + 1, 0).max()
    cache = jax.lax.fori_loop(0, last, write, cache)
    group = heads // kv_heads
    grouped = (query * dim**-0.5).astype(query.dtype).reshape(slots, width, kv_heads, group, dim)
    # Every token of every head of a group is a row against the same keys.
    grouped = grouped.swapaxes(1, 2).reshape(slots, kv_heads, width * group, dim)
    limits = jnp.repeat(positions, group, axis=1)
    separate = platform == "cpu" and width == 1 and group <= 8

    def product(pattern: str, rows: Array, matrix: Array) -> Array:
        """Rows of a group times their head's matrix. A CPU does better with a matrix-vector
        product for each of a few rows."""
        multiply = partial(jnp.einsum, preferred_element_type=jnp.float32)
        if not separate:
            return multiply(pattern, rows, matrix)
        pattern = pattern.replace("g", "")
        return jnp.stack(
            [multiply(pattern, rows[:, :, i], matrix) for i in range(rows.shape[2])], axis=2
        )

    def attend(keys: Array, values: Array, places: Array, fresh: Array, sums: Sums) -> Sums:
        where = places * shards + rank
        seen = (fresh & (where <= limits[..., None]))[:, None]
        scores = jnp.where(seen, product("bkgd,bkds->bkgs", grouped, keys), -jnp.inf)
        maximum = jnp.maximum(sums.maximum, scores.max(axis=-1))
        weights = jnp.exp(scores - maximum[..., None])
        shrink = jnp.exp(sums.maximum - maximum)
        part = product("bkgs,bksd->bkgd", weights.astype(values.dtype), values)
        return Sums(
            maximum=maximum,
            total=sums.total * shrink + weights.sum(axis=-1),
            values=sums.values * shrink[..., None] + part,
        )

    def slab(index: Array, sums: Sums) -> Sums:
        first, places, fresh = _slab(index, DECODE_SLAB, capacity)
        keys = jax.lax.dynamic_slice_in_dim(cache.keys, first, DECODE_SLAB, axis=3)
        values = jax.lax.dynamic_slice_in_dim(cache.values, first, DECODE_SLAB, axis=2)
        return attend(keys, values, places, fresh, sums)

    sums = start(grouped.shape[:-1], dim)
    if capacity <= DECODE_SLAB:
        every = jnp.arange(capacity)
        sums = attend(cache.keys, cache.values, every, every >= 0, sums)
    else:
        used = positions.max() // shards + 1
        sums = jax.lax.fori_loop(0, -(-used // DECODE_SLAB), slab, sums)
    out, logsumexp = finish(sums)
    if shards > 1:
        out = merge_shards(out, logsumexp, SEQUENCE)
    out = out.reshape(slots, kv_heads, width, group, dim).swapaxes(1, 2)
    return out.reshape(slots, width, heads, dim).astype(query.dtype), cache


def merge_shards(
    out: Float[Array, "*rows dim"], logsumexp: Float[Array, "*rows"], axis: str
) -> Float[Array, "*rows dim"]:
    """One attention from each device's attention over its own keys, by log-sum-exp."""
    most = jax.lax.pmax(logsumexp, axis)
    weight = jnp.where(jnp.isneginf(logsumexp), 0.0, jnp.exp(logsumexp - most))
    total = jax.lax.psum(weight, axis)
    summed = jax.lax.psum(out * weight[..., None], axis)
    return summed / jnp.where(total > 0, total, 1.0)[..., None]


def decode_attention(
    query: Float[Array, "slots width heads dim"],
    key: Float[Array, "slots width kv_heads dim"],
    value: Float[Array, "slots width kv_heads dim"],
    cache: LayerCache,
    *,
    positions: Int[Array, "slots width"],
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "slots width heads dim"], LayerCache]:
    """Writes each slot's next tokens into the cache; each attends to everything up to itself.

    Args:
        positions: of each slot's tokens; -1 where there is none, which gets zeros and writes
            nothing.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    local = partial(_decode, mesh=mesh, platform=platform)
    if mesh is None or mesh.size == 1:
        return local(query, key, value, cache, positions)
    heads = partition_spec(("slots", None, "heads", None), DECODE)
    kv_heads = partition_spec(("slots", None, "kv_heads", None), DECODE)
    cached = _specs(DECODE)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(heads, kv_heads, kv_heads, cached, partition_spec(("slots", None), DECODE)),
        out_specs=(heads, cached),
        check_vma=False,
    )(query, key, value, cache, positions)
