"""Declare each parameter once, as a `ParamSpec`.

A model writes one tree of `ParamSpec`. Initialization, abstract trees, shardings, counts and
checkpoint templates derive from it, so they cannot disagree.
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
    """Return an initializer that draws from a normal distribution around zero."""
    return jax.nn.initializers.normal(standard_deviation)


def kernel() -> Initializer:
    """Return an initializer for convolutions that keeps the variance of the input."""
    return jax.nn.initializers.lecun_normal()


def ones() -> Initializer:
    """Return an initializer that fills with ones."""
    return jax.nn.initializers.ones


def zeros() -> Initializer:
    """Return an initializer that fills with zeros."""
    return jax.nn.initializers.zeros


@dataclass(frozen=True)
class ParamSpec:
    """Describe one parameter: its shape, its logical axes and its initializer."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    initializer: Initializer

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.axes), (self.shape, self.axes)

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


def count(specs: Any) -> int:
    """Return the number of parameters in a tree of specs."""
    return sum(spec.size for spec in jax.tree.leaves(specs))


def stack(spec_tree: Any, layers: int) -> Any:
    """Return the tree with a leading `layers` axis, the form that training scans over."""
    return jax.tree.map(
        lambda spec: ParamSpec((layers, *spec.shape), ("layers", *spec.axes), spec.initializer),
        spec_tree,
    )


def shardings(specs: Any, mesh: Mesh, rules: Rules) -> Any:
    """Return the sharding of each parameter."""
    return jax.tree.map(lambda spec: named_sharding(mesh, spec.axes, rules), specs)


def abstract(specs: Any, dtype: Any) -> Any:
    """Return shapes without memory, for compiling and for planning."""
    return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype), specs)


def initialize(
    specs: Any, key: jax.Array, dtype: Any, *, mesh: Mesh | None = None, rules: Rules | None = None
) -> Any:
    """Create random weights in their shards: no device holds more than its part at any time."""
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
    """Return the numpy type for a `--dtype` name."""
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[dtype]
