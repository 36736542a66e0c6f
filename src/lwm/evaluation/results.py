"""A run's directory: settings.json, and results.jsonl with a row for each answer, as they come.

Rows are the original's (`context_length, depth_percent, response, answer, correct, seed`) with
further columns. A line that a crash cut in half is dropped and answered again; a directory whose
settings are other ones is another run's, and is refused. Of several processes, the first alone
reads and writes, and tells the others what was there.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lwm.core.config import read_json
from lwm.core.distributed import first_process, from_first, together
from lwm.core.errors import InputError
from lwm.core.files import new_file
from lwm.evaluation.case import Key

ROWS = "results.jsonl"
SETTINGS = "settings.json"
MAX_BYTES = 1 << 30
"""Of a file of rows; larger ones are not ours."""

Row = dict[str, Any]


class Results:
    """Rows of one run, on disk after each. Of several processes, all must open it and append the
    same rows.

    Args:
        directory: made with the first row if it is missing.
        settings: what the rows depend on, as JSON; the same each time the run is gone on with, and
            in every process.
        keys: names of the columns that tell a row from the others.

    Raises:
        InputError: the directory holds another run's rows, or rows that are broken; in every
            process, whichever found it out.
    """

    def __init__(
        self, directory: Path, settings: Mapping[str, Any], keys: tuple[str, ...]
    ) -> None:
        self.directory, self._keys = directory, keys
        self.path = directory / ROWS
        self.settings = own = json.loads(json.dumps(dict(settings)))
        of_first, self.rows = from_first(lambda: (own, _opened(directory, own)))
        with together():
            remedy = "start all of them with the same flags"
            _require_same("process 0 makes another run:", of_first, own, remedy)
        self._held = {self._key(row) for row in self.rows}

    def _key(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        missing = [name for name in self._keys if name not in row]
        if missing:
            raise InputError(
                f"a row of {self.path} has no {missing[0]!r}, so it is of another run; name "
                "another --out"
            )
        return tuple(row[name] for name in self._keys)

    def __contains__(self, key: Key) -> bool:
        return self._key(key) in self._held

    def append(self, row: Row) -> None:
        """Writes a row; it is on disk when this returns."""
        with together():  # a disk that is full ends all
            if first_process():
                self._write(row)
        self.rows.append(row)
        self._held.add(self._key(row))

    def _write(self, row: Row) -> None:
        settings = self.directory / SETTINGS
        if not settings.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            with new_file(settings) as partial:
                partial.write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_results(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Settings and rows of a run, from its directory or from its file of rows; the settings are
    empty where there are none beside it.

    Raises:
        InputError: nothing is there, or the rows are broken.
    """
    file = path / ROWS if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{path} holds no results; name a directory with {ROWS}, or such a file")
    settings = file.parent / SETTINGS
    rows = _whole_rows(file, mend=False)
    if not rows:
        raise InputError(f"{file} has no row yet; let its run go on first")
    return (read_json(settings) if settings.exists() else {}), rows


def _opened(directory: Path, wanted: Mapping[str, Any]) -> list[Row]:
    """Rows of a run's directory, as far as there are some."""
    path, rows = directory / SETTINGS, directory / ROWS
    if path.exists():
        remedy = "name another --out, or remove it"
        _require_same(f"{directory} holds another run:", read_json(path), wanted, remedy)
    elif rows.exists():
        raise InputError(
            f"{directory} holds {ROWS} without {SETTINGS}, so it cannot be told whether they are "
            "of this run; name another --out"
        )
    elif directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; name a directory with --out")
    return _whole_rows(rows) if rows.exists() else []


def _require_same(
    whose: str, found: Mapping[str, Any], wanted: Mapping[str, Any], remedy: str
) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise InputError(
                f"{whose} its {name} is {found.get(name)!r} and not {wanted.get(name)!r}; {remedy}"
            )


def _whole_rows(path: Path, *, mend: bool = True) -> list[Row]:
    """Rows of a file; what stands behind its last line's end was cut off by a crash.

    Args:
        mend: cut it off in the file, too.
    """
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path} is larger than {MAX_BYTES >> 20} MB; it holds no results")
    data = path.read_bytes()
    if not mend and data.lstrip()[:1] == b"[":
        return _array(path, data)
    whole = data[: data.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise InputError(
                f"{path} line {number} is no row of results; remove the line, and it is answered "
                "again"
            )
        rows.append(row)
    if mend and len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return rows


def _array(path: Path, data: bytes) -> list[Row]:
    """Rows of a file of the original's, one JSON array."""
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON that can be read ({error}); repair it") from error
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} holds other things than rows of results; name another file")
    return rows
