"""JSON lines on a local disk: one scan finds where lines begin, then any line is one read.

Broken lines cost themselves alone: nothing is parsed before it is asked for. Blank lines are no
examples, though they count where a line is told by its number. Knows lines and JSON; knows nothing
of compression or of the network (see `spool`).
"""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lwm.core.errors import InputError
from lwm.data.examples.examples import Broken
from lwm.data.sources.source import Record

MAX_LINE_BYTES = 256 << 20
_CHUNK = 16 << 20
_PART = 4096
_NEWLINE = 10
_BLANKS = np.frombuffer(b" \t\n\r\v\f", np.uint8)
_MARK = b"\xef\xbb\xbf"  # of byte order


class JsonLines:
    """A file of JSON objects, one a line.

    Args:
        path: the file as it is read.
        name: the file as reports call it, where `path` is a copy of another.

    Raises:
        InputError: the file cannot be read, is empty, or is blank.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self._path, self._name = path, name or str(path)
        try:
            self._starts, self._written, self._stamp = _scan(path)
        except OSError as error:
            raise InputError(
                f"{self._name} cannot be read ({error.strerror}); check the path"
            ) from error
        if not len(self):
            what = "holds blank lines alone" if len(self._starts) > 1 else "is empty"
            raise InputError(f"{self._name} {what}; it needs one JSON object a line")
        self._descriptor: int | None = None

    def __len__(self) -> int:
        return len(self._written)

    def read(self, index: int) -> Record | None:
        number = self._written[index]
        start, end = int(self._starts[number]), int(self._starts[number + 1])
        if end - start > MAX_LINE_BYTES:
            raise Broken(f"it is longer than {MAX_LINE_BYTES >> 20} MB")
        line = self._bytes(start, end)
        if not start:
            line = line.removeprefix(_MARK)
        line = line.strip()
        if not start and line.startswith(b"["):
            raise Broken("it begins a JSON array, where an object on each line is needed")
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise Broken("it is not UTF-8") from error
        except json.JSONDecodeError as error:
            raise Broken(f"it is not JSON ({error.msg} at character {error.pos + 1})") from error
        except (ValueError, RecursionError) as error:  # a number too long, a nest too deep
            raise Broken(f"it is not JSON that can be read ({error})") from error
        if not isinstance(value, dict):
            raise Broken(f"it holds a JSON {type(value).__name__}, where an object is needed")
        return value

    def place(self, index: int) -> tuple[str, int]:
        return self._name, int(self._written[index]) + 1

    def _bytes(self, start: int, end: int) -> bytes:
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_RDONLY)
            if _stamp(self._descriptor) != self._stamp:
                raise InputError(
                    f"{self._name} was changed after it was opened; begin again with the file at "
                    "rest"
                )
        parts = []
        while start < end:  # one call reads 2 GB at most, and may read less
            part = os.pread(self._descriptor, end - start, start)
            if not part:
                raise InputError(f"{self._name} was cut short while it was read; begin again")
            parts.append(part)
            start += len(part)
        return b"".join(parts)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]


def _stamp(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _scan(path: Path) -> tuple[np.ndarray, np.ndarray | range, tuple[int, int]]:
    """Where each line begins, int64, and the end of the file; which lines are not blank; and the
    file's size and time."""
    found, suspects, at, line = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)], 0, 0
    begins = False
    with path.open("rb") as file:
        stamp = _stamp(file.fileno())
        while chunk := file.read(_CHUNK):
            data = np.frombuffer(chunk, np.uint8)
            ends = np.flatnonzero(data == _NEWLINE).astype(np.int64)
            found.append(ends + at + 1)
            # Few lines begin with a blank; no others, but for the first, can be blank.
            heads = data[ends[ends + 1 < len(data)] + 1]
            suspects.append(np.flatnonzero(np.isin(heads, _BLANKS)) + line + 1)
            if begins and data[0] in _BLANKS:
                suspects.append(np.array([line]))
            begins = bool(data[-1] == _NEWLINE)
            at, line = at + len(chunk), line + len(ends)
        starts = np.concatenate(found)
        if starts[-1] != at:  # the last line has no line end
            starts = np.append(starts, at)
        count = len(starts) - 1
        blank = [
            number
            for number in np.unique(np.concatenate(suspects)).tolist()
            if number < count and _is_blank(file, int(starts[number]), int(starts[number + 1]))
        ]
    return starts, np.delete(np.arange(count), blank) if blank else range(count), stamp


def _is_blank(file: BinaryIO, start: int, end: int) -> bool:
    file.seek(start)
    while start < end:  # in parts: a line may be the whole of a large file
        part = file.read(min(end - start, _PART))
        if not part or part.removeprefix(b"" if start else _MARK).strip():
            return False
        start += len(part)
    return True
