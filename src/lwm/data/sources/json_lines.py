"""Read JSON lines on a local disk: an index of where lines begin makes any line one read.

The index of a large file is stored in the cache directory and used while the file's size and time
of change stay the same. Nothing is parsed before it is read, so a broken line affects no other
line. Blank lines are no examples, but they count in line numbers.
"""

import json
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lwm.core.errors import InputError
from lwm.core.files import new_file
from lwm.data.examples.examples import Broken
from lwm.data.sources.cache import cache_file
from lwm.data.sources.source import Record

MAX_LINE_BYTES = 256 << 20
_INDEXED_BYTES = 8 << 20  # smaller files are scanned at each start
_CHUNK = 16 << 20
_PART = 4096
_NEWLINE = 10
_BLANKS = np.frombuffer(b" \t\n\r\v\f", np.uint8)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class JsonLines:
    """Read a file of JSON objects, one on each line.

    Args:
        path: the file to read.
        name: the original's name for reports, where `path` is a copy.

    Raises:
        InputError: the file cannot be read, is empty, or is blank.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self._path, self._name = path, name or str(path)
        self._descriptor: int | None = None
        try:
            self._stamp, self._starts, blank = _index(path)
        except OSError as error:
            raise InputError(
                f"{self._name} cannot be read ({error.strerror}); check the path"
            ) from error
        lines = len(self._starts) - 1
        self._written = np.delete(np.arange(lines), blank) if len(blank) else range(lines)
        if not len(self):
            reason = "holds only blank lines" if lines else "is empty"
            raise InputError(f"{self._name} {reason}; it needs one JSON object on each line")

    def __len__(self) -> int:
        return len(self._written)

    def read(self, index: int) -> Record | None:
        """Return one object.

        Raises:
            Broken: the line is not a JSON object.
            InputError: the file changed after it was opened.
        """
        number = self._written[index]
        start, end = int(self._starts[number]), int(self._starts[number + 1])
        if end - start > MAX_LINE_BYTES:
            raise Broken(f"it is longer than {MAX_LINE_BYTES >> 20} MB")
        line = self._bytes(start, end)
        if not start:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        line = line.strip()
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
        return self._name, int(self._written[index]) + 1

    def _bytes(self, start: int, end: int) -> bytes:
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_RDONLY)
            if _stamp(self._descriptor) != self._stamp:
                raise InputError(
                    f"{self._name} was changed after it was opened; begin again when nothing "
                    "writes to it"
                )
        parts = []
        while start < end:  # one call reads at most 2 GB, and may read less
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
    starts, suspects, at, line = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)], 0, 0
    begins = False
    while chunk := file.read(_CHUNK):
        data = np.frombuffer(chunk, np.uint8)
        ends = np.flatnonzero(data == _NEWLINE).astype(np.int64)
        starts.append(ends + at + 1)
        # Few lines begin with a blank; no others except the first line can be blank.
        heads = data[ends[ends + 1 < len(data)] + 1]
        suspects.append(np.flatnonzero(np.isin(heads, _BLANKS)) + line + 1)
        if begins and data[0] in _BLANKS:
            suspects.append(np.array([line]))
        begins = bool(data[-1] == _NEWLINE)
        at, line = at + len(chunk), line + len(ends)
    bounds = np.concatenate(starts)
    if bounds[-1] != at:  # the last line has no newline
        bounds = np.append(bounds, at)
    blank = [
        number
        for number in np.unique(np.concatenate(suspects)).tolist()
        if number + 1 < len(bounds)
        and _is_blank(file, int(bounds[number]), int(bounds[number + 1]))
    ]
    return bounds, np.array(blank, np.int64)


def _is_blank(file: BinaryIO, start: int, end: int) -> bool:
    file.seek(start)
    while start < end:  # in parts: a line may be the whole of a large file
        part = file.read(min(end - start, _PART))
        if not part or part.removeprefix(b"" if start else _BYTE_ORDER_MARK).strip():
            return False
        start += len(part)
    return True
