"""Check configurations through JSON text and back, and with one wrong value at a time."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import hypothesis.strategies as st
import numpy as np
import pytest
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import given

from lwm.core.config import (
    MAX_JSON_BYTES,
    Checked,
    check_arguments,
    from_dict,
    override,
    read_json,
    to_dict,
)
from lwm.core.errors import ConfigError, InputError


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    kind: Literal["ring", "ulysses"] = "ring"


@dataclass(frozen=True, kw_only=True)
class Outer:
    size: int
    name: str | None = None
    tied: bool = False
    inner: Inner = field(default_factory=Inner)
    axes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"size is {self.size}; it must be positive")


inners = st.builds(
    Inner,
    rate=st.floats(allow_nan=False, allow_infinity=False),
    kind=st.sampled_from(["ring", "ulysses"]),
)
outers = st.builds(
    Outer,
    size=st.integers(1, 2**60),
    name=st.none() | st.text(st.characters(exclude_categories=["Cs"])),
    tied=st.booleans(),
    inner=inners,
    axes=st.lists(st.integers(-(2**31), 2**31)).map(tuple),
)


@given(outers)
def test_a_configuration_survives_json(config: Outer) -> None:
    assert from_dict(Outer, json.loads(json.dumps(to_dict(config))), "here") == config


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({}, "size"),
        ({"size": "many"}, "size"),
        ({"size": 1.5}, "size"),
        ({"size": None}, "size"),
        ({"size": [3]}, "size"),
        ({"size": 3, "tied": "perhaps"}, "tied"),
        ({"size": 3, "name": 7}, "name"),
        ({"size": 3, "inner": {"rate": "fast"}}, "inner.rate"),
        ({"size": 3, "inner": {"kind": "circle"}}, "inner.kind"),
        ({"size": 3, "inner": 5}, "inner"),
        ({"size": 3, "axes": [1, "x"]}, "axes"),
        ({"size": 3, "sise": 4}, "sise"),
        ({"size": 3, "inner": {"rat": 4}}, "rat"),
    ],
)
def test_the_wrong_setting_is_named_with_its_source(data: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_dict(Outer, data, "model/config.json")
    assert "model/config.json" in str(error.value)
    assert named in str(error.value)


def test_a_value_out_of_range_is_refused_on_the_way_in_and_by_override() -> None:
    with pytest.raises(ConfigError, match="size is 0"):
        from_dict(Outer, {"size": 0}, "here")
    with pytest.raises(ConfigError, match="size is -1"):
        override(Outer(size=3), size=-1)


def test_override_changes_only_what_is_set() -> None:
    config = Outer(size=3, name="a", tied=True)
    assert override(config, size=4, name=None, tied=False) == Outer(size=4, name="a")
    assert config.size == 3


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[1]", b"3", b'"text"', b"\xff\xfe{}", b"[" * 100_000,
    ],
)  # fmt: skip
def test_files_without_an_object_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_json(path)


def test_a_missing_file_a_directory_and_a_huge_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json"):
        read_json(tmp_path / "absent.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_json(tmp_path)
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(ConfigError, match="larger than 64 MB"):
        read_json(huge)


def test_an_object_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": [1, {"b": "ü"}]}', encoding="utf-8")
    assert read_json(path) == {"a": [1, {"b": "ü"}]}


@dataclass(frozen=True, kw_only=True)
class Ranges(Checked, section="loop"):
    steps: Annotated[int, Ge(1)] = 1
    rate: Annotated[float, Gt(0), Le(1)] = 1.0
    share: Annotated[float | None, Ge(0), Lt(1)] = None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "loop.steps is 0; it must be at least 1"),
        ({"rate": 0.0}, "loop.rate is 0.0; it must be greater than 0 and at most 1"),
        ({"rate": 1.5}, "loop.rate is 1.5; it must be greater than 0 and at most 1"),
        ({"share": 1.0}, "loop.share is 1.0; it must be at least 0 and less than 1"),
        ({"share": float("nan")}, "loop.share is nan; it must be at least 0 and less than 1"),
    ],
)
def test_declared_ranges_are_enforced(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Ranges(**changes)
    assert str(error.value) == message
    with pytest.raises(ConfigError, match=next(iter(changes))):
        from_dict(Ranges, changes, "here")


@dataclass(frozen=True, kw_only=True)
class Types(Checked, section="kind"):
    count: Annotated[int, Ge(1)] = 1
    rate: float | None = None
    on: bool = False
    name: str = ""
    place: Path = Path()
    choice: Literal["one", "two"] = "one"
    sizes: tuple[int, ...] = ()
    stop: str | Sequence[str] = ()
    call: Callable[[], int] | None = None
    tokens: Sequence[int] = ()


@pytest.mark.parametrize(
    ("name", "value", "needed"),
    [
        ("count", 1.5, "a whole number"),
        ("count", True, "a whole number"),
        ("count", np.float32(2), "a whole number"),
        ("count", "3", "a whole number"),
        ("count", None, "a whole number"),
        ("rate", "fast", "a number or None"),
        ("rate", np.True_, "a number or None"),
        ("rate", 1j, "a number or None"),
        ("on", 1, "true or false"),
        ("name", b"x", "text"),
        ("place", "x", "a path"),
        ("choice", "three", "one of one, two"),
        ("choice", 1, "one of one, two"),
        ("sizes", (1, 2.5), "a list of whole numbers"),
        ("sizes", 3, "a list of whole numbers"),
        ("stop", 5, "text or a list of text"),
        ("stop", ["a", 5], "text or a list of text"),
        ("stop", b"a", "text or a list of text"),
        ("call", 5, "a function or None"),
    ],
)
def test_values_of_wrong_types_are_refused(name: str, value: Any, needed: str) -> None:
    changes: Any = {name: value}
    with pytest.raises(InputError, match=re.escape(f"kind.{name} is ")) as error:
        Types(**changes)
    assert str(error.value).endswith(f"; it must be {needed}")


def test_scalars_of_numpy_become_those_of_python() -> None:
    scalars: Any = {"count": np.int64(3), "rate": np.float32(0.5), "on": np.True_}
    config = Types(**scalars)
    assert (type(config.count), type(config.rate), type(config.on)) == (int, float, bool)
    assert config == Types(count=3, rate=0.5, on=True)


def test_arguments_of_wrong_types_are_refused() -> None:
    @check_arguments
    def repeat(text: str, times: int = 2, *, marks: Mapping[str, Any] | None = None, **more: int):
        return text * times, marks, more

    call: Any = repeat
    assert call("a", np.int32(3), more="any") == ("aaa", None, {"more": "any"})
    with pytest.raises(InputError, match=r"times is 1\.5; it must be a whole number"):
        call("a", 1.5)
    with pytest.raises(InputError, match="text is 5; it must be text"):
        call(5)
    with pytest.raises(InputError, match="marks is 'x'; it must be a mapping or None"):
        call("a", marks="x")
    with pytest.raises(TypeError, match="missing a required argument"):
        call()


def test_limits_themselves_are_inside_the_range() -> None:
    assert Ranges(steps=1, rate=1.0, share=0.0).share == 0.0
