"""Parse ranges as users write them: `1024,4096`, or `min:max:count` such as `1024:8192:4`."""

from typing import Literal

import numpy as np

from lwm.core.errors import ConfigError

MAX_VALUES = 1000

Spacing = Literal["linear", "sigmoid"]


def parse_lengths(text: str, name: str = "lengths", least: int = 1) -> list[int]:
    """Parse distinct whole numbers, ascending."""
    values = [round(value) for value in _parse(text, name, "1024,4096 or 1024:8192:4")]
    if min(values) < least:
        raise ConfigError(f"{name} has {min(values)}; it must be at least {least}")
    return sorted(set(values))


def parse_depths(text: str, spacing: Spacing = "linear") -> list[float]:
    """Parse distinct percentages, ascending; `sigmoid` ranges are denser at both ends."""
    values = np.array(_parse(text, "depths", "0,50,100 or 0:100:5"))
    for depth in values:
        if not 0 <= depth <= 100:
            raise ConfigError(f"depths has {depth:g}; it must be from 0 to 100 percent")
    if spacing == "sigmoid" and ":" in text:  # the curve of the original LWM scripts
        curve = 100 / (1 + np.exp(-0.1 * (values - 50)))
        values = np.where((values == 0) | (values == 100), values, curve)
    return sorted({round(value, 1) for value in values.tolist()})


def _parse(text: str, name: str, example: str) -> list[float]:
    separator = ":" if ":" in text else ","
    try:
        values = [float(part) for part in text.split(separator)]
        if not np.isfinite(values).all():
            raise ValueError
        if separator == ":":
            low, high, count = values
            if low > high or count not in range(1, MAX_VALUES + 1):
                raise ValueError
            values = np.linspace(low, high, int(count)).tolist()
    except ValueError as error:
        raise ConfigError(
            f"{name} is {text!r}; write numbers as in {example}, which is min:max:count"
        ) from error
    return values
