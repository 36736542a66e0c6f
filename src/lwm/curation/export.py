"""One field of a data set -> JSON lines with the key `text`: what haystacks and text training
read.

The original's `create_needle_data.py` does so for PG-19. A row is held at a time, however large
the data set is. Knows sources and text; knows no model.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwm.core.errors import ConfigError, InputError
from lwm.core.files import new_file, refuse_existing
from lwm.core.progress import progress
from lwm.data.examples.examples import Broken, Example, Report
from lwm.data.sources.huggingface import PREFIX, stream_rows
from lwm.data.sources.opening import open_records
from lwm.data.sources.source import Record

FIELD = "text"
"""The key that every line is written with."""


@dataclass(kw_only=True)
class ExportSummary:
    """What was written."""

    rows: int = 0
    characters: int = 0
    empty: int = 0
    """Rows without text, left out."""
    broken: int = 0
    """Rows that cannot be read, left out."""
    first_broken: Report | None = None

    def __str__(self) -> str:
        parts = [f"{self.rows:,} rows, {self.characters:,} characters"]
        if self.empty:
            parts.append(f"{self.empty:,} without text left out")
        if self.first_broken is not None:
            parts.append(f"{self.broken:,} broken left out, the first {self.first_broken}")
        return "; ".join(parts)


def export_texts(
    source: str,
    out: Path,
    *,
    field: str = FIELD,
    rows: int | None = None,
    characters: int | None = None,
) -> ExportSummary:
    """Writes a file that appears when it is whole.

    Args:
        source: what `open_records` takes; a directory is a Hugging Face data set.
        field: whose text is written.
        rows: stop behind so many.
        characters: stop behind so many; the last text is cut to fit.

    Raises:
        InputError: the source cannot be read, has no such field or no text, or the destination
            exists or cannot be written.
        ConfigError: a limit is below 1.
    """
    for name, limit in (("rows", rows), ("characters", characters)):
        if limit is not None and limit < 1:
            raise ConfigError(f"{name} is {limit}; it must be at least 1")
    refuse_existing(out)
    done = ExportSummary()
    records, total = _open(source)
    most = min((count for count in (total, rows) if count is not None), default=None)
    with (
        new_file(out) as partial,
        partial.open("w", encoding="utf-8", newline="\n") as file,
        progress("exporting", most) as advance,
    ):
        for number, (place, record) in enumerate(records):
            advance()
            if isinstance(record, Broken):
                done.broken += 1
                done.first_broken = done.first_broken or Report(number, *place, str(record))
                continue
            text = _text(record, field, place)
            if not text.strip():
                done.empty += 1
                continue
            if characters is not None:
                text = text[: characters - done.characters]
            file.write(json.dumps({FIELD: text}, ensure_ascii=False) + "\n")
            done.rows += 1
            done.characters += len(text)
            if done.rows == rows or done.characters == characters:
                break
        if not done.rows:
            raise InputError(f"{source} has no text in the field {field!r} ({done}); name another")
    return done


def _open(
    source: str,
) -> tuple[Iterator[tuple[tuple[str, int], Record | Broken | None]], int | None]:
    """Records with their places, and how many there are, where that is known."""
    named = Path(source).expanduser()
    if named.is_dir() or source.startswith(PREFIX):
        name = str(named) if named.is_dir() else source.removeprefix(PREFIX)
        return (((name, n), row) for n, row in enumerate(stream_rows(name), 1)), None
    opened = open_records(source)

    def read() -> Iterator[tuple[tuple[str, int], Record | Broken | None]]:
        for index in range(len(opened)):
            try:
                record: Record | Broken | None = opened.read(index)
            except Broken as broken:
                record = broken
            yield opened.place(index), record

    return read(), len(opened)


def _text(record: Record | None, field: str, place: tuple[str, int]) -> str:
    if record is None:  # an empty line
        return ""
    where = f"{place[0]}, line {place[1]}"
    if isinstance(record, Example):
        raise InputError(f"{where} holds tokens, not text; export from what they were made of")
    if field not in record:
        raise InputError(
            f"{where} has no field {field!r}; it has {', '.join(map(repr, record))}: name one of "
            "them with --field"
        )
    value: Any = record[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(
            f"the field {field!r} of {where} is a {type(value).__name__}, not text; name another "
            "with --field"
        )
    return value
