"""What jaxtyping's import hook checks annotations of `lwm` with: beartype, but for dataclasses.

A dataclass that is a pytree holds specs, shardings or abstract shapes in the place of arrays at
times, and jax itself rebuilds it around placeholders; functions are where shapes are promised.
"""

from typing import Any

from beartype import beartype


def check(function: Any) -> Any:
    return function if function.__name__ == "__init__" else beartype(function)
