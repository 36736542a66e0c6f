"""A run's directory: settings.json, and results.jsonl with a row for each answer, as they come.

Rows are the original's (`context_length, depth_percent, response, answer, correct, seed`) with
further columns. A line that a crash cut in half is dropped and answered again; a directory whose
settings are other ones is another run's, and is refused.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lwm.core.config import read_json
from lwm.core.errors import InputError
from lwm.evaluation.case import Key

ROWS = "results.jsonl"
SETTINGS = "settings.json"
MAX_BYTES = 1 << 30
"""Of a file of rows; larger ones are not ours."""

Row = dict[str, Any]


class Results:
    """Rows of one run, on disk after each.

    Args:
        directory: made with the first row if it is missing.
        settings: what the rows depend on, as JSON; the same each time the run is gone on with.
        keys: names of the columns that tell a row from the others.

    Raises:
        InputError: the directory holds another run's rows, or rows that are broken.
    """

    def __init__(
        self, directory: Path, settings: Mapping[str, Any], keys: tuple[str, ...]
    ) -> None:
        self.directory, self._keys = directory, keys
        self.settings = json.loads(json.dumps(dict(settings)))
        path = directory / SETTINGS
        if path.exists():
            _require_same(path, read_json(path), self.settings)
        elif (directory / ROWS).exists():
            raise InputError(
                f"{directory} holds {ROWS} without {SETTINGS}, so it cannot be told whether they "
                "are of this run; name another --out"
            )
        elif directory.exists() and not directory.is_dir():
            raise InputError(f"{directory} is a file; name a directory with --out")
        self.path = directory / ROWS
        self.rows = _whole_rows(self.path) if self.path.exists() else []
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
        settings = self.directory / SETTINGS
        if not settings.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            partial = settings.with_suffix(".partial")
            partial.write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
            partial.rename(settings)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
        self._held.add(self._key(row))


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


def _require_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise InputError(
                f"{path.parent} holds another run: its {name} is {found.get(name)!r} and not "
                f"{wanted.get(name)!r}; name another --out, or remove it"
            )


def _whole_rows(path: Path, *, mend: bool = True) -> list[Row]:
    """Rows of a file; what stands behind its last line's end was cut off by a crash.

    Args:
        mend: cut it off in the file, too.
    """
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path} is larger than {MAX_BYTES >> 20} MB; it holds no results")
    data = path.read_bytes()
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
