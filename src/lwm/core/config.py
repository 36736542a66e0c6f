"""Convert typed configurations to JSON and back, and check the ranges they declare.

Configurations are frozen keyword-only dataclasses. pydantic enforces their types when they are
read from JSON, so a file edited by hand fails with one sentence and not with a wrong type later.
"""

import dataclasses
import json
import operator
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

import pydantic
from annotated_types import Ge, Gt, Le, Lt

from lwm.core.errors import ConfigError

Config = TypeVar("Config")

MAX_JSON_BYTES = 64 << 20
"""Limit for configurations and indexes; no real one comes near it."""


class Checked:
    """Check the ranges that the fields of a configuration declare.

    A field written `steps: Annotated[int, Ge(1)] = 1000` refuses smaller values, whether they come
    from JSON, the command line or Python. NaN is outside every range; None is inside.

    Args:
        section: name of the configuration in error messages, such as `loop`.
    """

    _section: ClassVar[str] = ""

    def __init_subclass__(cls, section: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._section = section

    def __post_init__(self) -> None:
        for name, bounds in _bounds(type(self)).items():
            value = getattr(self, name)
            if value is None or all(holds(value, limit) for _, holds, limit in bounds):
                continue
            label = f"{self._section}.{name}" if self._section else name
            limits = " and ".join(f"{words} {limit}" for words, _, limit in bounds)
            raise ConfigError(f"{label} is {value}; it must be {limits}")


_KINDS = {
    Ge: ("at least", operator.ge, "ge"),
    Gt: ("greater than", operator.gt, "gt"),
    Le: ("at most", operator.le, "le"),
    Lt: ("less than", operator.lt, "lt"),
}


@cache
def _bounds(config: type) -> dict[str, list[tuple[str, Callable[[Any, Any], bool], Any]]]:
    """Collect the bounds that each annotated field of a class declares."""
    bounds = defaultdict(list)
    for name, hint in get_type_hints(config, include_extras=True).items():
        for item in get_args(hint)[1:] if get_origin(hint) is Annotated else ():
            if type(item) in _KINDS:
                words, holds, attribute = _KINDS[type(item)]
                bounds[name].append((words, holds, getattr(item, attribute)))
    return bounds


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object of bounded size; raise ConfigError if the file holds anything else."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ConfigError(
                f"{path} is larger than {MAX_JSON_BYTES >> 20} MB; it is not a configuration"
            )
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); repair or replace it") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a JSON {type(data).__name__}; an object is needed")
    return data


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as JSON data."""
    return pydantic.TypeAdapter(type(config)).dump_python(config, mode="json")


def from_dict(kind: type[Config], data: dict[str, Any], source: str) -> Config:
    """Build a configuration from JSON data; raise ConfigError with `source` and the wrong key."""
    try:
        return pydantic.TypeAdapter(kind).validate_python(data, extra="forbid")
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        value = first["input"]
        label = f" ({value!r})" if isinstance(value, str | int | float) else ""
        raise ConfigError(
            f"{source}: the setting {where!r}{label} is wrong: {first['msg']}"
        ) from error


def override(config: Config, /, **changes: Any) -> Config:
    """Return a copy with the changes that are not None, checked again."""
    changes = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]
