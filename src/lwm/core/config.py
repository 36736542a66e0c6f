"""Typed configuration <-> JSON.

Configurations are frozen keyword-only dataclasses that check themselves in `__post_init__`. Types
are enforced by pydantic on the way in, so a file edited by hand fails with one sentence and never
with a wrong type later.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from lwm.core.errors import ConfigError

Config = TypeVar("Config")

MAX_JSON_BYTES = 64 << 20  # a configuration or an index; larger files are not ours


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file of bounded size.

    Raises:
        ConfigError: the file cannot be read, is too large, or holds something else than an object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ConfigError(
                f"{path} is larger than {MAX_JSON_BYTES >> 20} MB; it is no configuration"
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
    return pydantic.TypeAdapter(type(config)).dump_python(config, mode="json")


def from_dict(kind: type[Config], data: dict[str, Any], source: str) -> Config:
    """A configuration of `kind` from JSON data.

    Raises:
        ConfigError: names `source` and the first key that is missing, unknown or of the wrong
            type.
    """
    try:
        return pydantic.TypeAdapter(kind).validate_python(data, extra="forbid")
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{source}: the setting {where!r} is wrong: {first['msg']}") from error


def override(config: Config, /, **changes: Any) -> Config:
    """A copy with the changes that are not None, checked again."""
    given = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(config, **given)  # type: ignore[type-var]
