"""Check journals against the file itself, with crashes at every byte."""

from pathlib import Path
from typing import Literal

import pytest

from lwm.core.errors import InputError
from lwm.core.journal import append, discard_incomplete, read_journal

VALUES = [{"a": 1}, ["ü", None], 3.5]


def values(path: Path) -> list:
    return [value for _, value in read_journal(path)]


def test_values_come_back_with_their_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert values(path) == []
    for value in VALUES:
        append(path, value)
    assert list(read_journal(path)) == list(enumerate(VALUES, 1))


def test_a_crash_at_any_byte_loses_only_the_incomplete_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    for value in VALUES:
        append(path, value, sync=False)
    data = path.read_bytes()
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        complete = VALUES[: data[:size].count(b"\n")]
        assert values(path) == complete
        discard_incomplete(path)
        append(path, "next", sync=False)
        assert values(path) == [*complete, "next"]


@pytest.mark.parametrize("line", ["5", '{"a": "x"}', "[null]", '{"b": 10}', "NaN"])
def test_a_line_of_another_type_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n')
    with pytest.raises(InputError, match=r"journal\.jsonl, line 2, is not one.*remove the line"):
        list(read_journal(path, dict[Literal["a"], int]))


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('1\n{"a"\n2\n')
    with pytest.raises(InputError, match=r"journal\.jsonl, line 2, is not valid JSON"):
        values(path)
