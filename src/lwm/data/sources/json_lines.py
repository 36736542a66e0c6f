"""Read JSON lines on a local disk: an index of where lines begin makes any line one read.

The index of a large file is stored in the cache directory and used while the file's size and time
of change stay the same. Nothing is parsed before it is read, so a broken line affects no other
line. Blank lines are no examples, but they count in line numbers.
"""

import json
import os
import zipfile
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lwm.core.errors import InputError
from lwm.core.files import new_file
from lwm.data.examples.examples import Broken
from lwm.data.sources.cache import cache_file
from lwm.data.sources.source import NamedSource, Record, input_errors

_MAX_LINE_BYTES = 256 << 20
_INDEXED_BYTES = 8 << 20  # smaller files are scanned at each start
_CHUNK = 16 << 20
_PART = 4096
_NEWLINE = 10
_BLANKS = np.frombuffer(b" \t\n\r\v\f", np.uint8)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class JsonLines(NamedSource):
    """Read a local file of JSON objects, one on each line."""

    def __init__(self, path: Path, name: str) -> None:
        super().__init__(name)
        self._path = path
        with input_errors(f"{name} cannot be read", "check the path", OSError):
            self._stamp, self._starts, blank = _index(path)
        lines = len(self._starts) - 1
        self._numbers = np.delete(np.arange(lines), blank) if len(blank) else range(lines)
        if not len(self):
            reason = "holds only blank lines" if lines else "is empty"
            raise InputError(f"{name} {reason}; it needs one JSON object on each line")

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, index: int) -> Record | None:
        """Return one object; raise `Broken` if the line is not one."""
        number = self._numbers[index]
        start, end = int(self._starts[number]), int(self._starts[number + 1])
        if end - start > _MAX_LINE_BYTES:
            raise Broken(f"it is longer than {_MAX_LINE_BYTES >> 20} MB")
        line = self._bytes(start, end).removeprefix(b"" if start else _BYTE_ORDER_MARK).strip()
        if not start and line.startswith(b"["):
            raise Broken("it begins a JSON array, where an object on each line is needed")
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise Broken("it is not UTF-8") from error
        except json.JSONDecodeError as error:
            raise Broken(f"it is not JSON ({error.msg} at character {error.pos + 1})") from error
        except (ValueError, RecursionError) as error:  # a number too long, nesting too deep
            raise Broken(f"it is not JSON that can be read ({error})") from error
        if not isinstance(value, dict):
            raise Broken(f"it holds a JSON {type(value).__name__}, where an object is needed")
        return value

    def place(self, index: int) -> tuple[str, int]:
        """Return the file and the line number of a record."""
        return self._name, int(self._numbers[index]) + 1

    def _bytes(self, start: int, end: int) -> bytes:
        parts = []
        while start < end:  # one call may read less
            part = os.pread(self._reader, end - start, start)
            if not part:
                raise InputError(f"{self._name} was cut short while it was read; begin again")
            parts.append(part)
            start += len(part)
        return b"".join(parts)

    @cached_property
    def _reader(self) -> int:
        descriptor = os.open(self._path, os.O_RDONLY)
        if _stamp(descriptor) != self._stamp:
            os.close(descriptor)
            raise InputError(
                f"{self._name} was changed after it was opened; begin again when nothing writes "
                "to it"
            )
        return descriptor

    def __del__(self) -> None:
        if "_reader" in self.__dict__:
            os.close(self._reader)


_Stamp = tuple[int, int]  # size and time of change in nanoseconds


def _stamp(descriptor: int) -> _Stamp:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _index(path: Path) -> tuple[_Stamp, np.ndarray, np.ndarray]:
    """Return the file's stamp, the start of each line and the end of the file, and the numbers of
    blank lines, all int64."""
    with path.open("rb") as file:
        stamp = _stamp(file.fileno())
        if stamp[0] < _INDEXED_BYTES:
            return stamp, *_scan(file)
        stored = cache_file(f"lines {path.resolve()}")
        try:
            # A checksum covers each array.
            with stored.open("rb") as index, np.load(index, allow_pickle=False) as arrays:
                if tuple(arrays["stamp"].tolist()) == stamp:
                    return stamp, arrays["starts"], arrays["blank"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # there is no index, or it is broken
        starts, blank = _scan(file)
        if starts[-1] == stamp[0]:  # else the file grew meanwhile
            try:
                stored.parent.mkdir(parents=True, exist_ok=True)
                with new_file(stored, replace=True) as partial, partial.open("wb") as target:
                    np.savez(target, stamp=np.array(stamp), starts=starts, blank=blank)
            except (OSError, InputError):
                pass  # the next start scans again
        return stamp, starts, blank


def _scan(file: BinaryIO) -> tuple[np.ndarray, np.ndarray]:
    starts, suspects = [], [np.zeros(1, np.int64)]
    offset, lines, before = 0, 0, b"\n"
    while chunk := file.read(_CHUNK):
        data = np.frombuffer(before + chunk, np.uint8)
        newlines = np.flatnonzero(data[:-1] == _NEWLINE)  # a line begins after each
        starts.append(newlines + offset)
        # Few lines begin with a blank; no others except the first line can be blank.
        suspects.append(np.flatnonzero(np.isin(data[newlines + 1], _BLANKS)) + lines)
        offset, lines, before = offset + len(chunk), lines + len(newlines), chunk[-1:]
    bounds = np.concatenate([*starts, np.array([offset])]).astype(np.int64)
    numbers = [n for n in np.unique(np.concatenate(suspects)).tolist() if n < lines]
    blank = [n for n in numbers if _is_blank(file, *bounds[n : n + 2].tolist())]
    return bounds, np.array(blank, np.int64)


def _is_blank(file: BinaryIO, start: int, end: int) -> bool:
    file.seek(start)
    while start < end:  # in parts: a line may be the whole of a large file
        part = file.read(min(end - start, _PART))
        if not part or part.removeprefix(b"" if start else _BYTE_ORDER_MARK).strip():
            return False
        start += len(part)
    return True
