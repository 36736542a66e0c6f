"""The key-value cache of a whole model: its capacity, its memory, its arrays.

Layout and use of one layer's part are in `attention.cached`; this file sizes and allocates it, and
refuses one that does not fit before a byte of it exists.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from lwm.attention.cached import CACHE_AXES, CAPACITY_UNIT, LayerCache
from lwm.core.distributed import together
from lwm.core.memory import require_memory
from lwm.core.mesh import SEQUENCE
from lwm.core.sharding import DECODE, named_sharding, shard_count
from lwm.models.costs import cache_bytes
from lwm.models.llama import LlamaConfig

Cache = tuple[LayerCache, ...]


def cache_capacity(tokens: int, mesh: Mesh | None) -> int:
    """The least capacity that holds `tokens` positions, in whole units on every device of the
    `sequence` axis."""
    unit = CAPACITY_UNIT * (1 if mesh is None else mesh.shape[SEQUENCE])
    return -(-tokens // unit) * unit


def require_cache_memory(
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
    with together():  # machines may have different amounts free
        require_memory(
            cache_bytes(config, capacity, dtype, slots) // parts,
            mesh,
            what=f"a cache of {capacity:,} positions for {slots} request{'s' * (slots > 1)}",
            remedy="shorten the prompt or --max-tokens, use --dtype bfloat16, or spread it over "
            "more devices with --mesh",
        )


def make_cache(
    config: LlamaConfig, *, slots: int, capacity: int, dtype: str, mesh: Mesh | None = None
) -> Cache:
    """Zeroed keys and values for every layer, created in their shards.

    Raises:
        CapacityError: it would not fit.
    """
    require_cache_memory(config, slots=slots, capacity=capacity, dtype=dtype, mesh=mesh)
    key_shape = (slots, config.num_kv_heads, config.head_dim, capacity)
    value_shape = (slots, config.num_kv_heads, capacity, config.head_dim)

    def zeros(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Array:
        sharding = None if mesh is None else named_sharding(mesh, axes, DECODE)
        # Placed outright, as the steps return it: an array without a place would compile each step
        # twice.
        return jnp.zeros(shape, jnp.dtype(dtype), device=sharding or jax.devices()[0])

    return tuple(
        LayerCache(zeros(key_shape, CACHE_AXES.keys), zeros(value_shape, CACHE_AXES.values))  # type: ignore[arg-type]
        for _ in range(config.num_layers)
    )


def grow_cache(cache: Cache, capacity: int, mesh: Mesh | None) -> Cache:
    """The cache with room for more positions; what it held stays where it was on each device.

    Goes layer by layer and frees the old one, so that two whole caches never stand side by side.
    """
    shards = 1 if mesh is None else mesh.shape[SEQUENCE]

    def pad(x: Array, axis: int) -> Array:
        old = x.shape[axis]
        parts = x.reshape(*x.shape[:axis], shards, old // shards, *x.shape[axis + 1 :])
        extra = [(0, 0)] * parts.ndim
        extra[axis + 1] = (0, (capacity - old) // shards)
        return jnp.pad(parts, extra).reshape(*x.shape[:axis], capacity, *x.shape[axis + 1 :])

    def grower(axes: tuple[str | None, ...]) -> Callable[[Array], Array]:
        sharding = None if mesh is None else named_sharding(mesh, axes, DECODE)
        compiled = jax.jit(partial(pad, axis=axes.index("cache_position")), out_shardings=sharding)

        def grow(x: Array) -> Array:
            grown = compiled(x)
            x.delete()
            return grown

        return grow

    keys, values = (grower(axes) for axes in CACHE_AXES)  # type: ignore[arg-type]
    return tuple(LayerCache(keys(layer.keys), values(layer.values)) for layer in cache)
