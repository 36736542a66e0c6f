"""Convert typed configurations to JSON and back, and check the types and ranges they declare.

Configurations are frozen keyword-only dataclasses. pydantic enforces their types when they are
read from JSON, so a file edited by hand fails with one sentence and not with a wrong type later.
"""

import dataclasses
import inspect
import json
import operator
import re
import reprlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np
import pydantic
from annotated_types import Ge, Gt, Le, Lt

from lwm.core.errors import ConfigError, InputError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Config = TypeVar("Config")
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

MAX_JSON_BYTES = 64 << 20
"""Limit for configurations and indexes; no real one comes near it."""


class Checked:
    """Check the types and ranges that the fields of a configuration declare.

    A field written `steps: Annotated[int, Ge(1)] = 1000` refuses smaller values, whether they come
    from JSON, the command line or Python, and values that are no whole numbers, see
    `needed_instead`. NaN is outside every range; None is inside. Numpy's scalars become Python's.

    Args:
        section: name of the configuration in error messages, such as `loop`.
    """

    _section: ClassVar[str] = ""

    def __init_subclass__(cls, section: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._section = section

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            value = getattr(self, name, None)
            label = f"{self._section}.{name}" if self._section else name
            _check_type(label, hint, value)
            if isinstance(value, np.generic):
                object.__setattr__(self, name, value.item())
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


def check_arguments(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate a function to raise InputError for an argument whose type is not the declared one.

    This is for functions that users call; `needed_instead` says which types are checked. Scalars
    of numpy become Python's.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                continue
            _check_type(name, _hints(function).get(name, Any), value)
            if isinstance(value, np.generic):
                bound.arguments[name] = value.item()
        return function(*bound.args, **bound.kwargs)

    return checked


def _check_type(label: str, hint: Any, value: Any) -> None:
    if (needed := needed_instead(hint, value)) is not None:
        shown = " ".join(reprlib.repr(value).split())
        raise InputError(f"{label} is {shown}; it must be {needed}")


_SCALARS: dict[Any, tuple[Any, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    bool: ((bool, np.bool_), "true or false"),
    str: (str, "text"),
    Path: (Path, "a path"),
    NoneType: (NoneType, "None"),
}


_PLURALS = {int: "whole numbers", float: "numbers", str: "text", Mapping: "mappings"}


def needed_instead(hint: Any, value: Any) -> str | None:
    """Describe what a type hint admits if a value is of another type; return None if it fits.

    Scalars, paths, choices, callbacks, mappings, and sequences of text or mappings are checked;
    any value fits other hints. Scalars of numpy count as Python's, but true is not a number.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return needed_instead(arguments[0], value)
    if hint in _SCALARS:
        kinds, words = _SCALARS[hint]
        number_from_bool = isinstance(value, bool | np.bool_) and hint in (int, float)
        return None if isinstance(value, kinds) and not number_from_bool else words
    if origin is Literal:
        fits = any(type(value) is type(choice) and value == choice for choice in arguments)
        return None if fits else f"one of {', '.join(map(str, arguments))}"
    if origin in (Union, UnionType):
        needed = [needed_instead(option, value) for option in arguments]
        return None if None in needed else " or ".join(dict.fromkeys(map(str, needed)))
    if origin is Mapping:
        return None if isinstance(value, Mapping) else "a mapping"
    if origin is Callable:
        return None if callable(value) else "a function"
    if origin in (Sequence, tuple):
        item = arguments[0] if origin is Sequence or arguments[1:] == (...,) else Any
        if origin is Sequence and not (item is str or get_origin(item) is Mapping):
            return None  # such as token ids, which are many
        listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        if listed and all(needed_instead(item, one) is None for one in value):
            return None
        item = Mapping if get_origin(item) is Mapping else item
        return f"a list of {_PLURALS.get(item, 'values')}"
    return None


@cache
def _hints(declared: Any) -> dict[str, Any]:
    """Return the type hints of a class or a function."""
    return get_type_hints(declared, include_extras=True)


@cache
def _bounds(config: type) -> dict[str, list[tuple[str, Callable[[Any, Any], bool], Any]]]:
    """Collect the bounds that each annotated field of a class declares."""
    bounds = defaultdict(list)
    for name, hint in _hints(config).items():
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
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
        if _SURROGATE.search(text):  # JSON allows halves of pairs, which no other text may have
            json.dumps(data, ensure_ascii=False).encode()
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


def from_dict(kind: type[Config], data: Any, source: str) -> Config:
    """Build a configuration from JSON data; raise ConfigError with `source` and the wrong key."""
    try:
        return pydantic.TypeAdapter(kind).validate_python(data, extra="forbid")
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        value = first["input"]
        label = f" ({value!r})" if isinstance(value, str | int | float) else ""
        subject = f"the setting {where!r}" if where else "the content"
        raise ConfigError(f"{source}: {subject}{label} is wrong: {first['msg']}") from error


def first_fault(faults: Sequence[Any]) -> str:
    """Return where the first of pydantic's faults in JSON data is, and what is wrong there."""
    first = faults[0]
    where = ".".join(map(str, first["loc"]))
    reason = str(first["msg"]).removeprefix("Value error, ")
    return f"{where}: {reason}" if where else reason


def override(config: Config, /, **changes: Any) -> Config:
    """Return a copy with the changes that are not None, checked again."""
    changes = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]
