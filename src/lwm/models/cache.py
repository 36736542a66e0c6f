"""The key-value cache of a whole model: its capacity, its memory, its arrays.

Layout and use of one layer's part are in `attention.cached`; this file sizes and allocates it, and refuses one that
does not fit before a byte of it exists.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from lwm.attention.cached import CACHE_AXES, SLAB, LayerCache
from lwm.core.errors import CapacityError
from lwm.core.memory import available_bytes, gigabytes
from lwm.core.mesh import SEQUENCE
from lwm.core.sharding import DECODE, named_sharding, shard_count
from lwm.models.figures import cache_bytes
from lwm.models.llama import LlamaConfig

Cache = tuple[LayerCache, ...]


def cache_capacity(tokens: int, mesh: Mesh | None) -> int:
    """The least capacity that holds `tokens` positions: whole slabs on every device of the `sequence` axis."""
    unit = SLAB * (1 if mesh is None else mesh.shape[SEQUENCE])
    return -(-tokens // unit) * unit


def require_memory(
    config: LlamaConfig, *, slots: int, capacity: int, dtype: str, mesh: Mesh | None
) -> None:
    """Refuses a cache that outgrows the memory that is free.

    Raises:
        CapacityError: names what the cache needs on a device and what there is.
    """
    parts = 1
    if mesh is not None:
        for axis in ("slots", "kv_heads", "cache_position"):
            parts *= shard_count(mesh, axis, DECODE)
    needed = cache_bytes(config, capacity, dtype, slots) // parts
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    local = 1 if mesh is None or device.platform != "cpu" else len(mesh.local_devices)
    available = available_bytes(device)
    if available is not None and needed * local > available:
        raise CapacityError(
            f"a cache of {capacity:,} positions for {slots} request{'s' * (slots > 1)} needs "
            f"{gigabytes(needed * local)} of memory and {gigabytes(available)} are free; shorten the "
            "prompt or --max-tokens, use --dtype bfloat16, or spread it over more devices with --mesh"
        )


def make_cache(
    config: LlamaConfig, *, slots: int, capacity: int, dtype: str, mesh: Mesh | None = None
) -> Cache:
    """Zeroed keys and values for every layer, created in their shards.

    Raises:
        CapacityError: it would not fit.
    """
    require_memory(config, slots=slots, capacity=capacity, dtype=dtype, mesh=mesh)
    shape = (slots, config.num_kv_heads, capacity, config.head_dim)
    sharding = None if mesh is None else named_sharding(mesh, CACHE_AXES, DECODE)
    return tuple(
        LayerCache(
            jnp.zeros(shape, jnp.dtype(dtype), device=sharding),
            jnp.zeros(shape, jnp.dtype(dtype), device=sharding),
        )
        for _ in range(config.num_layers)
    )


def grow_cache(cache: Cache, capacity: int, mesh: Mesh | None) -> Cache:
    """The cache with room for more positions; what it held stays where it was on each device.

    Goes layer by layer and frees the old one, so that two whole caches never stand side by side.
    """
    shards = 1 if mesh is None else mesh.shape[SEQUENCE]
    sharding = None if mesh is None else named_sharding(mesh, CACHE_AXES, DECODE)

    def pad(x: Array) -> Array:
        slots, heads, old, dim = x.shape
        parts = x.reshape(slots, heads, shards, old // shards, dim)
        extra = (capacity - old) // shards
        parts = jnp.pad(parts, ((0, 0), (0, 0), (0, 0), (0, extra), (0, 0)))
        return parts.reshape(slots, heads, capacity, dim)

    compiled = jax.jit(pad, out_shardings=sharding)

    def grow(x: Array) -> Array:
        grown = compiled(x)
        x.delete()
        return grown

    return jax.tree.map(grow, cache)
