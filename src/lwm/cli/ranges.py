"""Ranges as users write them: `1024,4096`, or `1024:8192:4` for four from 1,024 to 8,192.

Knows text and numbers.
"""

from typing import Literal

import numpy as np

from lwm.core.errors import ConfigError

MOST = 1000
"""Values of a range."""

Spacing = Literal["linear", "sigmoid"]


def parse_lengths(text: str, what: str = "lengths") -> list[int]:
    """Whole numbers of at least 1, ascending, each once.

    Raises:
        ConfigError: it is no range, or has a number below 1.
    """
    values = [round(value) for value in _values(text, what, "1024,4096 or 1024:8192:4")]
    if min(values) < 1:
        raise ConfigError(f"{what} has {min(values)}; it must be at least 1")
    return sorted(set(values))


def parse_depths(text: str, spacing: Spacing = "linear") -> list[float]:
    """Per cent from 0 to 100, ascending, each once, to a tenth.

    Args:
        spacing: of `min:max:count`; `sigmoid` lays them closer together towards both ends, and
            leaves 0 and 100 where they are.

    Raises:
        ConfigError: it is no range, or leaves 0 to 100.
    """
    values = _values(text, "depths", "0,50,100 or 0:100:5", spacing)
    wrong = [value for value in values if not 0 <= value <= 100]
    if wrong:
        raise ConfigError(f"depths has {wrong[0]:g}; a depth is from 0 to 100 per cent")
    return sorted({round(value, 1) for value in values})


def _values(text: str, what: str, example: str, spacing: Spacing = "linear") -> list[float]:
    parts = text.split(":") if ":" in text else text.split(",")
    try:
        numbers = [float(part) for part in parts]
        if not np.isfinite(numbers).all():
            raise ValueError
        if ":" not in text:
            return numbers
        low, high, count = numbers
        if count != int(count) or not 1 <= count <= MOST or low > high:
            raise ValueError
    except ValueError as error:
        raise ConfigError(
            f"{what} is {text!r}; write numbers as in {example}, which is min:max:count"
        ) from error
    values = np.linspace(low, high, int(count))
    if spacing == "sigmoid":  # the original's curve, which leaves the ends where they are
        curve = 100 / (1 + np.exp(-0.1 * (values - 50)))
        values = np.where((values == 0) | (values == 100), values, curve)
    return values.tolist()
