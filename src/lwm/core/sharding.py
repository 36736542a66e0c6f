"""Logical axes -> rules -> shardings.

Models name what an axis means (`heads`, `mlp`, `batch`); only the tables here say which mesh axis
it is spread over, once for training and scoring, once for prefill and once for decode.
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
"""Whole sequences, many rows: also used to score them without a cache."""

PREFILL: Rules = {
    **_WEIGHTS,
    "batch": None,
    "position": SEQUENCE,
    "activation": None,
    "slots": DATA,
    "cache_position": SEQUENCE,
}
"""One request's chunk at a time, its positions spread over `sequence`; the cache as in decode."""

DECODE: Rules = {
    **_WEIGHTS,
    "batch": DATA,
    "position": None,
    "activation": None,
    "slots": DATA,
    "cache_position": SEQUENCE,
}
"""One token for each slot; only the cache is spread over `sequence`."""


def partition_spec(axes: Sequence[str | None], rules: Rules) -> PartitionSpec:
    """Translates logical axes into mesh axes; None stands for an axis that is never sharded."""
    return PartitionSpec(*(None if axis is None else rules[axis] for axis in axes))


def named_sharding(mesh: Mesh, axes: Sequence[str | None], rules: Rules) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(axes, rules))


def shard_count(mesh: Mesh, axis: str, rules: Rules) -> int:
    """Into how many parts the rules cut one logical axis."""
    names = rules[axis]
    return math.prod(
        mesh.shape[name] for name in ([names] if isinstance(names, str) else names or ())
    )


def constrain(
    x: jax.Array, mesh: Mesh | None, axes: Sequence[str | None], rules: Rules
) -> jax.Array:
    """Tells the compiler how an activation is sharded; without a mesh, nothing."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, named_sharding(mesh, axes, rules))


def require_divisible(mesh: Mesh, sizes: Mapping[str, int], rules: Rules) -> None:
    """Refuses a mesh that cuts an axis into unequal parts.

    Raises:
        ConfigError: names the axis and both numbers.
    """
    for axis, size in sizes.items():
        parts = shard_count(mesh, axis, rules)
        if size % parts:
            raise ConfigError(
                f"the model's {axis.replace('_', ' ')} ({size}) cannot be divided by the {parts} "
                "parts "
                f"that the mesh gives the {rules[axis]!r} axis; choose a mesh size that divides "
                f"{size}"
            )
