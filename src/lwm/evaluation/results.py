"""Store a run in a directory: `settings.json`, and `results.jsonl` with one row for each answer.

Rows have the columns of the original LWM scripts (`context_length`, `depth_percent`, `response`,
`answer`, `correct`, `seed`) and further ones. A run that was interrupted continues; the directory
of a run with other settings is refused.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from lwm.core.config import read_json
from lwm.core.distributed import first_process, from_first, together
from lwm.core.errors import InputError
from lwm.core.files import new_file, readable
from lwm.core.journal import append, discard_incomplete, read_journal

ROWS = "results.jsonl"
SETTINGS = "settings.json"
_MAX_BYTES = 1 << 30

Key = Mapping[str, int | float | str]
"""The columns that identify a row of a run, such as `context_length`, `depth_percent`, `seed`."""
Row = dict[str, Any]
Rows = Sequence[Mapping[str, Any]]


class Results:
    """Keep the rows of one run, on disk after each answer; process 0 reads and writes.

    Opening another run, or broken rows, raises InputError in every process.

    Args:
        settings: JSON data that the rows depend on.
        keys: names of the columns that identify a row.
    """

    def __init__(
        self, directory: Path, settings: Mapping[str, Any], keys: tuple[str, ...]
    ) -> None:
        self.directory, self._keys = directory, keys
        self.path = directory / ROWS
        self.settings = mine = json.loads(readable(json.dumps(dict(settings), ensure_ascii=False)))
        first, self.rows = from_first(lambda: (mine, _open_run(directory, mine)))
        with together():
            remedy = "start all of them with the same flags"
            _require_same("process 0 makes another run:", first, mine, remedy)
        self._answered = {self._key(row) for row in self.rows}

    def _key(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        missing = [name for name in self._keys if name not in row]
        if missing:
            raise InputError(
                f"a row of {self.path} has no {missing[0]!r}, so it belongs to another run; name "
                "another --out"
            )
        key = tuple(row[name] for name in self._keys)
        if not all(isinstance(value, int | float | str) for value in key):
            raise InputError(
                f"a row of {self.path} has the columns {shorten(repr(key), 200)}, which must be "
                "numbers or text; repair it, or name another --out"
            )
        return key

    def __contains__(self, key: Key) -> bool:
        return self._key(key) in self._answered

    def append(self, row: Row) -> None:
        """Write a row to disk."""
        with together():  # a full disk must end every process
            if first_process():
                self._write(row)
        self.rows.append(row)
        self._answered.add(self._key(row))

    def _write(self, row: Row) -> None:
        settings = self.directory / SETTINGS
        if not settings.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            with new_file(settings) as partial:
                partial.write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
        append(self.path, row)


def read_results(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Return the settings, if any, and rows of a run's directory or file; raise InputError if
    there are none. The file may be a JSON array, as the original LWM scripts write it."""
    file = path / ROWS if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{path} holds no results; name a directory with {ROWS}, or such a file")
    rows = _read_rows(file)
    if not rows:
        raise InputError(f"{file} has no row yet; continue its run first")
    settings = file.parent / SETTINGS
    return (read_json(settings) if settings.exists() else {}), rows


def file_digest(path: Path) -> str | None:
    """Return a hash of a file's content; None if the name is not a file, such as `book`."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _open_run(directory: Path, settings: Mapping[str, Any]) -> list[Row]:
    path, rows = directory / SETTINGS, directory / ROWS
    if path.exists():
        remedy = "name another --out, or remove it"
        _require_same(f"{directory} holds another run:", read_json(path), settings, remedy)
    elif rows.exists():
        raise InputError(
            f"{rows} is without {SETTINGS}, so its run is unknown; name another --out"
        )
    elif directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; name a directory with --out")
    discard_incomplete(rows)
    return _read_rows(rows) if rows.exists() else []


def _require_same(
    prefix: str, theirs: Mapping[str, Any], mine: Mapping[str, Any], remedy: str
) -> None:
    for name in sorted(theirs.keys() | mine.keys()):
        if theirs.get(name) != mine.get(name):
            raise InputError(
                f"{prefix} its {name} is {theirs.get(name)!r} and not {mine.get(name)!r}; {remedy}"
            )


def _read_rows(path: Path) -> list[Row]:
    if path.stat().st_size > _MAX_BYTES:
        raise InputError(
            f"{path} is larger than {_MAX_BYTES >> 20} MB, so it holds no results; name another"
        )
    with path.open("rb") as file:
        is_array = file.read(64).lstrip().startswith(b"[")
    try:
        rows = enumerate(json.loads(path.read_bytes()), 1) if is_array else read_journal(path)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); repair it") from error
    checked = []
    for number, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{path}, row {number}, is not a row of results; remove it")
        checked.append(row)
    return checked
