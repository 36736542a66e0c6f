"""Map the logical axes that models name to mesh axes.

A model names what an axis means (`heads`, `mlp`, `batch`). Only the rule tables here say which
mesh axis shards it: one table for training and scoring, one for prefill and one for decode.
"""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lwm.core.errors import ConfigError
from lwm.core.mesh import DATA, FSDP, SEQUENCE, TENSOR

Rules = Mapping[str, str | tuple[str, ...] | None]

_WEIGHTS: Rules = {
    "layers": None,
    "vocab": TENSOR,
    "embed": FSDP,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "mlp": TENSOR,
    "norm": None,
    "head_dim": None,
    "rank": None,
    "window": None,
    "channels": None,
    "codes": None,
}

TRAINING: Rules = {
    **_WEIGHTS,
    "batch": (DATA, FSDP),
    "position": SEQUENCE,
    "activation": None,
}
"""Rules for whole sequences in many rows; also used to score sequences without a cache."""

PREFILL: Rules = {
    **_WEIGHTS,
    "batch": None,
    "position": SEQUENCE,
    "activation": None,
    "slots": DATA,
    "cache_position": SEQUENCE,
}
"""Rules for one request's chunk, its positions sharded over `sequence`; the cache as in decode."""

DECODE: Rules = {
    **_WEIGHTS,
    "batch": DATA,
    "position": None,
    "activation": None,
    "slots": DATA,
    "cache_position": SEQUENCE,
}
"""Rules for one token per slot; only the cache is sharded over `sequence`."""


def partition_spec(axes: Sequence[str | None], rules: Rules) -> PartitionSpec:
    """Translate logical axes into mesh axes; None stands for an axis that is never sharded."""
    return PartitionSpec(*(None if axis is None else rules[axis] for axis in axes))


def named_sharding(mesh: Mesh, axes: Sequence[str | None], rules: Rules) -> NamedSharding:
    """Return the sharding of an array with these logical axes."""
    return NamedSharding(mesh, partition_spec(axes, rules))


def shard_count(mesh: Mesh, axis: str, rules: Rules) -> int:
    """Return how many parts the rules split one logical axis into."""
    names = rules[axis]
    return math.prod(
        mesh.shape[name] for name in ([names] if isinstance(names, str) else names or ())
    )


def constrain(
    x: jax.Array, mesh: Mesh | None, axes: Sequence[str | None], rules: Rules
) -> jax.Array:
    """Constrain the sharding of an activation inside a compiled function."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, named_sharding(mesh, axes, rules))


def require_divisible(mesh: Mesh, sizes: Mapping[str, int], rules: Rules) -> None:
    """Raise ConfigError if the mesh splits an axis into unequal parts."""
    for axis, size in sizes.items():
        parts = shard_count(mesh, axis, rules)
        if size % parts:
            raise ConfigError(
                f"the model's {axis.replace('_', ' ')} ({size}) cannot be divided by the {parts} "
                f"parts of the mesh axis {rules[axis]!r}; choose a mesh size that divides {size}"
            )
