"""Allocate the key-value cache of a whole model; `attention.cached` defines a layer's part."""

import math
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
from lwm.models.llama import LlamaConfig
from lwm.models.sizes import cache_bytes

Cache = tuple[LayerCache, ...]


def cache_capacity(tokens: int, mesh: Mesh | None) -> int:
    """Return the least capacity for `tokens` positions, in whole units on each device."""
    unit = CAPACITY_UNIT * (1 if mesh is None else mesh.shape[SEQUENCE])
    return -(-tokens // unit) * unit


def require_cache_memory(
    config: LlamaConfig, *, slots: int, capacity: int, dtype: str, mesh: Mesh | None
) -> None:
    """Raise CapacityError, with both sizes, if a cache does not fit into the free memory."""
    axes = ("slots", "kv_heads", "cache_position")
    parts = math.prod(shard_count(mesh, axis, DECODE) for axis in axes) if mesh else 1
    with together():  # machines may differ in free memory
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
    """Create zero keys and values for every layer, in their shards, if memory suffices."""
    require_cache_memory(config, slots=slots, capacity=capacity, dtype=dtype, mesh=mesh)
    sizes = {None: config.head_dim, "slots": slots, "kv_heads": config.num_kv_heads}

    def zeros(axes: tuple[str | None, ...]) -> Array:
        shape = tuple(sizes.get(axis, capacity) for axis in axes)
        sharding = None if mesh is None else named_sharding(mesh, axes, DECODE)
        # Committed to a device, as the results of steps are: an uncommitted array would compile
        # each step twice.
        return jnp.zeros(shape, jnp.dtype(dtype), device=sharding or jax.devices()[0])

    return tuple(LayerCache(*map(zeros, CACHE_AXES)) for _ in range(config.num_layers))  # type: ignore[arg-type]


def grow_cache(cache: Cache, capacity: int, mesh: Mesh | None) -> Cache:
    """Return the cache with a larger capacity; each device's positions keep their places."""
    shards = 1 if mesh is None else mesh.shape[SEQUENCE]

    def pad(x: Array, axis: int) -> Array:
        old = x.shape[axis]
        parts = x.reshape(*x.shape[:axis], shards, old // shards, *x.shape[axis + 1 :])
        extra = [(0, 0)] * parts.ndim
        extra[axis + 1] = (0, (capacity - old) // shards)
        return jnp.pad(parts, extra).reshape(*x.shape[:axis], capacity, *x.shape[axis + 1 :])

    def grow(axes: tuple[str | None, ...]) -> Callable[[Array], Array]:
        sharding = None if mesh is None else named_sharding(mesh, axes, DECODE)
        return jax.jit(partial(pad, axis=axes.index("cache_position")), out_shardings=sharding)

    grow_keys, grow_values = (grow(axes) for axes in CACHE_AXES)  # type: ignore[arg-type]
    layers = []
    for layer in cache:
        layers.append(LayerCache(grow_keys(layer.keys), grow_values(layer.values)))
        jax.tree.map(lambda x: x.delete(), layer)  # so that two whole caches never exist
    return tuple(layers)
