"""Declare dataclasses that are trees of arrays."""

from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

import jax

_Class = TypeVar("_Class", bound=type)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def pytree(cls: _Class) -> _Class:
    """Make a frozen keyword-only dataclass that JAX treats as a tree of its fields."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True, kw_only=True)(cls))
