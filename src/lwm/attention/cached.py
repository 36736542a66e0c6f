"""Compute attention of new tokens to a key-value cache: chunks in prefill, a few tokens in decode.

A cache stores values as [slots, kv_heads, capacity, dim] and keys as [slots, kv_heads, dim,
capacity], the order in which each is multiplied. It may be sharded: slots over `data`, heads over
`tensor`, capacity over `sequence` in striped order (position p is on device p mod R at index p //
R, see `order`). A token's place therefore follows from its position, every write is local, and a
key's position follows from its place. Places beyond a query's position, stale or never written,
are masked. Beyond one slab, work is bounded by the positions in use, not by the capacity.

Source of merging in decode: Flash-Decoding (Dao et al. 2023).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from lwm.attention.blocks import (
    BlockLayout,
    Keys,
    Sums,
    add_scores,
    initial_sums,
    make_queries,
    normalize,
)
from lwm.attention.mask import PADDING, Side, side
from lwm.attention.ring import ring_accumulate
from lwm.core.hardware import traits
from lwm.core.mesh import DATA, SEQUENCE
from lwm.core.sharding import DECODE, PREFILL, Rules, partition_spec

SLAB = 512  # positions of a device's cache that prefill reads at a time
DECODE_SLAB = 4096  # that decode reads: many, because a CPU copies a slab but not a whole cache
CAPACITY_UNIT = 128  # a device's capacity is a multiple of this


class LayerCache(NamedTuple):
    """Hold the keys and values of one layer."""

    keys: Float[Array, "slots kv_heads dim capacity"]
    values: Float[Array, "slots kv_heads capacity dim"]


CACHE_AXES = LayerCache(
    ("slots", "kv_heads", None, "cache_position"),  # type: ignore[arg-type]
    ("slots", "kv_heads", "cache_position", None),  # type: ignore[arg-type]
)
"""Logical axes of keys and values."""


def _sharded(
    local: Callable[..., Any], mesh: Mesh | None, rules: Rules, rows: tuple[Any, Any], *rest: Any
) -> Callable[..., Any]:
    """Run a function of query, key and value (axes `rows`), cache and others on device shards."""
    if mesh is None or mesh.size == 1:
        return local
    heads, kv_heads = (partition_spec((*rows, x, None), rules) for x in ("heads", "kv_heads"))
    caches = LayerCache(*(partition_spec(axes, rules) for axes in CACHE_AXES))  # type: ignore[arg-type]
    others = (partition_spec(axes, rules) for axes in rest)
    in_specs, out_specs = (heads, kv_heads, kv_heads, caches, *others), (heads, caches)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _rank(axis: str, mesh: Mesh | None) -> tuple[Array | int, int]:
    """Return this device's index on an axis and the size of the axis; 0 and 1 without a mesh."""
    if mesh is None or mesh.shape[axis] == 1:
        return 0, 1
    return jax.lax.axis_index(axis), mesh.shape[axis]


def _slab(index: Array, size: int, capacity: int) -> tuple[Array, Array, Array]:
    """Return a slab's first place, all its places, and which of them no earlier slab contains.

    The last slab has the size of the others and overlaps the one before it.
    """
    first = jnp.minimum(index * size, capacity - size)
    places = first + jnp.arange(size)
    return first, places, places >= index * size


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
    """Write one request's next chunk into its slot and attend to everything up to it.

    The chunk is in striped order on a mesh, and must end within the capacity.

    Args:
        slot: the request's row of the cache.
        first: position of the chunk's first token, a multiple of the `sequence` axis' size.
        block: queries at a time.
    """
    local = partial(_prefill, mesh=mesh, block=block)
    run = _sharded(local, mesh, PREFILL, (None, "position"), (), ())
    return run(query, key, value, cache, slot, first)


def _prefill(
    query: Array, key: Array, value: Array, cache: LayerCache, slot: Array, first: Array,
    mesh: Mesh | None, block: int,
) -> tuple[Array, LayerCache]:  # fmt: skip
    rank, shards = _rank(SEQUENCE, mesh)
    group, groups = _rank(DATA, mesh)
    local_slots = cache.keys.shape[0]
    local = slot // local_slots == group if groups > 1 else None
    slot = slot % local_slots
    cache = _write_chunk(cache, key, value, slot, first // shards, local)
    count = query.shape[1]
    positions = (first + jnp.arange(count) * shards + rank)[None]
    layout = BlockLayout.of(count, block)
    queries = make_queries(query, side(positions), key.shape[2], layout)
    size = min(SLAB, cache.keys.shape[3])

    def add_slab(index: Array, sums: Sums) -> Sums:
        keys = _read_slab(cache, slot, index, size, rank, shards)
        return ring_accumulate(sums, queries, keys, SEQUENCE if shards > 1 else None, causal=True)

    used = first // shards + count  # equal on every device, as a loop with collectives requires
    sums = initial_sums(queries.data.shape[:-1], query.shape[-1])
    sums = jax.lax.fori_loop(0, -(-used // size), add_slab, sums)
    out = layout.join_queries(normalize(sums)[0]).astype(query.dtype)
    if local is not None:
        out = jax.lax.psum(jnp.where(local, out, 0), DATA)
    return out, cache


def _write_chunk(
    cache: LayerCache, key: Array, value: Array, slot: Array, place: Array, local: Array | None
) -> LayerCache:
    def write(old: Array, new: Array, at: tuple[Array | int, ...]) -> Array:
        new = new.astype(old.dtype)
        if local is not None:
            new = jnp.where(local, new, jax.lax.dynamic_slice(old, at, new.shape))
        return jax.lax.dynamic_update_slice(old, new, at)

    return LayerCache(
        keys=write(cache.keys, key.transpose(0, 2, 3, 1), (slot, 0, 0, place)),
        values=write(cache.values, value.transpose(0, 2, 1, 3), (slot, 0, place, 0)),
    )


def _read_slab(
    cache: LayerCache, slot: Array, index: Array, size: int, rank: Array | int, shards: int
) -> Keys:
    kv_heads, dim, capacity = cache.keys.shape[1:]
    first, places, fresh = _slab(index, size, capacity)
    key = jax.lax.dynamic_slice(cache.keys, (slot, 0, 0, first), (1, kv_heads, dim, size))
    value = jax.lax.dynamic_slice(cache.values, (slot, 0, first, 0), (1, kv_heads, size, dim))
    positions, segments = places * shards + rank, jnp.where(fresh, 0, PADDING)
    keys = Side(positions=positions[None, None], segments=segments[None, None])
    return Keys(key=key.swapaxes(2, 3)[:, None], value=value[:, None], side=keys)


def decode_attention(
    query: Float[Array, "slots width heads dim"],
    key: Float[Array, "slots width kv_heads dim"],
    value: Float[Array, "slots width kv_heads dim"],
    cache: LayerCache,
    *,
    positions: Int[Array, "slots width"],
    mesh: Mesh | None = None,
    first_slot: Int[Array, ""] | int = 0,
) -> tuple[Float[Array, "slots width heads dim"], LayerCache]:
    """Write each slot's next tokens, -1 for none, and attend to everything up to each.

    Args:
        first_slot: of the cache, if not all of its slots take part; without a mesh.
    """
    decode = partial(_decode, mesh=mesh, first_slot=first_slot)
    run = _sharded(decode, mesh, DECODE, ("slots", None), ("slots", None))
    return run(query, key, value, cache, positions)


def _decode(
    query: Array, key: Array, value: Array, cache: LayerCache, positions: Array,
    mesh: Mesh | None, first_slot: Array | int,
) -> tuple[Array, LayerCache]:  # fmt: skip
    rank, shards = _rank(SEQUENCE, mesh)
    cache = _write_tokens(cache, key, value, positions.reshape(-1), rank, shards, first_slot)
    slots, width, heads, dim = query.shape
    kv_heads, _, capacity = cache.keys.shape[1:]
    group = heads // kv_heads
    grouped = (query * dim**-0.5).astype(query.dtype).reshape(slots, width, kv_heads, group, dim)
    # Every token of every head of a group is a row that is multiplied by the same keys.
    grouped = grouped.swapaxes(1, 2).reshape(slots, kv_heads, width * group, dim)
    limits = jnp.repeat(positions, group, axis=1)
    separate = width == 1 and group <= traits(mesh).separate_heads
    product = partial(_product, separate=separate)

    def add(keys: Array, values: Array, places: Array, fresh: Array, sums: Sums) -> Sums:
        visible = (fresh & (places * shards + rank <= limits[..., None]))[:, None]
        scores = jnp.where(visible, product("bkgd,bkds->bkgs", grouped, keys), -jnp.inf)
        return add_scores(
            sums, scores, lambda w: product("bkgs,bksd->bkgd", w.astype(values.dtype), values)
        )

    def taken(first: Array | int, size: int) -> tuple[Array, Array]:
        keys = jax.lax.dynamic_slice(
            cache.keys, (first_slot, 0, 0, first), (slots, kv_heads, dim, size)
        )
        values = jax.lax.dynamic_slice(
            cache.values, (first_slot, 0, first, 0), (slots, kv_heads, size, dim)
        )
        return keys, values

    def add_slab(index: Array, sums: Sums) -> Sums:
        first, places, fresh = _slab(index, DECODE_SLAB, capacity)
        return add(*taken(first, DECODE_SLAB), places, fresh, sums)

    sums = initial_sums(grouped.shape[:-1], dim)
    if capacity <= DECODE_SLAB:
        places = jnp.arange(capacity)
        sums = add(*taken(0, capacity), places, places >= 0, sums)
    else:
        used = positions.max() // shards + 1
        sums = jax.lax.fori_loop(0, -(-used // DECODE_SLAB), add_slab, sums)
    out, logsumexp = normalize(sums)
    if shards > 1:
        out = _merge_shards(out, logsumexp, SEQUENCE)
    out = out.reshape(slots, kv_heads, width, group, dim).swapaxes(1, 2)
    return out.reshape(slots, width, heads, dim).astype(query.dtype), cache


def _write_tokens(
    cache: LayerCache, key: Array, value: Array, positions: Array, rank: Array | int, shards: int,
    first_slot: Array | int,
) -> LayerCache:  # fmt: skip
    """Write tokens at their positions, [slots * width]; no change for -1 and other devices'."""
    kv_heads, dim = cache.keys.shape[1:3]
    slots, width = key.shape[:2]
    local = (positions >= 0) & (positions % shards == rank)
    place = jnp.where(local, positions // shards, 0)

    def write(i: Array, cache: LayerCache) -> LayerCache:
        def put(old: Array, new: Array, at: tuple[Array | int, ...]) -> Array:
            current = jax.lax.dynamic_slice(old, at, new.shape)
            new = jnp.where(local[i], new.astype(old.dtype), current)
            return jax.lax.dynamic_update_slice(old, new, at)

        slot, column = i // width, i % width
        start, size = (slot, column, 0, 0), (1, 1, kv_heads, dim)
        new_key, new_value = (jax.lax.dynamic_slice(new, start, size) for new in (key, value))
        slot += first_slot
        return LayerCache(
            keys=put(cache.keys, new_key.transpose(0, 2, 3, 1), (slot, 0, 0, place[i])),
            values=put(cache.values, new_value.transpose(0, 2, 1, 3), (slot, 0, place[i], 0)),
        )

    # A loop of unknown length, because the CPU backend would fuse a plain write with the reads of
    # the cache, and rewrite all of it.
    last = jnp.where(positions >= 0, jnp.arange(slots * width) + 1, 0).max()
    return jax.lax.fori_loop(0, last, write, cache)


def _product(pattern: str, rows: Array, matrix: Array, *, separate: bool) -> Array:
    """Multiply the rows of each group by their head's matrix, optionally one row at a time."""
    multiply = partial(jnp.einsum, preferred_element_type=jnp.float32)
    if not separate:
        return multiply(pattern, rows, matrix)
    pattern = pattern.replace("g", "")
    products = [multiply(pattern, rows[:, :, i], matrix) for i in range(rows.shape[2])]
    return jnp.stack(products, axis=2)


def _merge_shards(out: Array, logsumexp: Array, axis: str) -> Array:
    """Merge each device's attention over its own keys, weighted by log-sum-exp."""
    most = jax.lax.pmax(logsumexp, axis)
    weight = jnp.where(jnp.isneginf(logsumexp), 0.0, jnp.exp(logsumexp - most))
    total = jax.lax.psum(weight, axis)
    summed = jax.lax.psum(out * weight[..., None], axis)
    return summed / jnp.where(total > 0, total, 1.0)[..., None]
