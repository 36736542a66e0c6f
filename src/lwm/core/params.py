"""Parameters declared once.

A model writes one tree of `ParamSpec`; initialisation, abstract trees, shardings, counts and
checkpoint templates are derived from it, so they cannot disagree. Knows shapes and logical axes;
knows no model.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lwm.core.sharding import Rules, named_sharding

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def normal(standard_deviation: float) -> Initializer:
    return jax.nn.initializers.normal(standard_deviation)


def kernel() -> Initializer:
    """For a convolution: keeps the variance of what comes in."""
    return jax.nn.initializers.lecun_normal()


def ones() -> Initializer:
    return jax.nn.initializers.ones


def zeros() -> Initializer:
    return jax.nn.initializers.zeros


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, what each axis means, and how it starts. A leaf of a model's
    tree."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    initializer: Initializer

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.axes), (self.shape, self.axes)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def count(specs: Any) -> int:
    """Number of parameters in a tree of specs."""
    return sum(spec.size for spec in jax.tree.leaves(specs))


def stack(spec_tree: Any, layers: int) -> Any:
    """The tree with a leading `layers` axis, the form that training scans over."""
    return jax.tree.map(
        lambda spec: ParamSpec((layers, *spec.shape), ("layers", *spec.axes), spec.initializer),
        spec_tree,
    )


def shardings(specs: Any, mesh: Mesh, rules: Rules) -> Any:
    return jax.tree.map(lambda spec: named_sharding(mesh, spec.axes, rules), specs)


def abstract(specs: Any, dtype: Any) -> Any:
    """Shapes without memory, for compiling and for planning."""
    return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype), specs)


def initialize(
    specs: Any, key: jax.Array, dtype: Any, *, mesh: Mesh | None = None, rules: Rules | None = None
) -> Any:
    """Random weights, created in their shards: no device ever holds more than its part."""
    leaves, tree = jax.tree.flatten(specs)

    def create(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(leaves))
        return tree.unflatten(
            [spec.initializer(k, spec.shape, dtype) for spec, k in zip(leaves, keys, strict=True)]
        )

    if mesh is None:
        return jax.jit(create)(key)
    assert rules is not None
    return jax.jit(create, out_shardings=shardings(specs, mesh, rules))(key)


def cast(dtype: str) -> Any:
    """The numpy type of a `--dtype` name that parameters may have."""
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[dtype]
