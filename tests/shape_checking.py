"""Define how jaxtyping's import hook checks annotations: with beartype, except on dataclasses.

A dataclass that is a pytree may hold specs, shardings or abstract shapes in place of arrays, and
jax rebuilds it around placeholders. Shapes are promised by functions.
"""

from typing import Any

from beartype import beartype


def check(function: Any) -> Any:
    return function if function.__name__ == "__init__" else beartype(function)
