"""Keep JSON values in an append-only file, one on each line, across crashes.

A line is complete when it ends in a newline. A crash can leave an incomplete line at the end of
the file: reading ignores it, and `discard_incomplete` removes it before more is appended.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from lwm.core.config import first_fault
from lwm.core.errors import InputError

Line = TypeVar("Line")


def read_journal(path: Path, kind: type[Line] | Any = Any) -> Iterator[tuple[int, Line]]:
    """Yield the number and value of each complete line; raise InputError if one is broken.

    Args:
        kind: the type of the values, which pydantic checks; a path may be edited or damaged.
    """
    if not path.exists():
        return
    adapter = pydantic.TypeAdapter(kind)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                value = adapter.validate_python(json.loads(line))
            except pydantic.ValidationError as error:
                raise InputError(
                    f"{path}, line {number}, is not one that belongs there "
                    f"({first_fault(error.errors())}); remove the line to continue"
                ) from error
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{path}, line {number}, is not valid JSON; remove the line to continue"
                ) from error
            yield number, value


def json_line(value: Any, separators: tuple[str, str] | None = None) -> bytes:
    """Return a JSON value as a line; names of files that are not UTF-8 are escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=separators)
    try:
        return f"{text}\n".encode()
    except UnicodeEncodeError:
        return f"{json.dumps(value, separators=separators)}\n".encode()


def discard_incomplete(path: Path) -> None:
    """Remove the incomplete line that a crash may have left at the end of the file."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = 0
        for line in file:
            end += len(line) if line.endswith(b"\n") else 0
        file.truncate(end)


def append(path: Path, value: Any, *, sync: bool = True) -> None:
    """Append one value as a line; with `sync`, return only when the line is on disk."""
    with path.open("ab") as file:
        file.write(json_line(value))
        if sync:
            file.flush()
            os.fsync(file.fileno())
