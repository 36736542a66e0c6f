"""Export one field of a data set as JSON lines with the key `text`.

Haystacks and text training read such files; the original's `create_needle_data.py` writes them for
PG-19. Only one row is in memory at a time.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwm.core.errors import ConfigError, InputError
from lwm.core.files import new_file, refuse_existing
from lwm.core.progress import progress
from lwm.data.examples.examples import Broken, Example, Report
from lwm.data.sources.opening import PREFIX, open_records, stream_rows
from lwm.data.sources.source import Record

_FIELD = "text"
_Place = tuple[str, int]  # file and line
_Row = tuple[_Place, Record | Broken | None]


@dataclass(kw_only=True)
class ExportSummary:
    """Count the rows and characters written, and the empty and broken rows skipped."""

    rows: int = 0
    characters: int = 0
    empty: int = 0
    broken: int = 0
    first_broken: Report | None = None

    def __str__(self) -> str:
        parts = [f"{self.rows:,} rows, {self.characters:,} characters"]
        if self.empty:
            parts.append(f"skipped {self.empty:,} without text")
        if self.first_broken is not None:
            parts.append(f"skipped {self.broken:,} broken, the first {self.first_broken}")
        return "; ".join(parts)


def export_texts(
    source: str,
    out: Path,
    *,
    field: str = _FIELD,
    rows: int | None = None,
    characters: int | None = None,
) -> ExportSummary:
    """Write the texts of a field to a file that appears when it is complete.

    Args:
        source: as for `open_records`; a directory is a Hugging Face data set.
        rows: maximum number of rows.
        characters: maximum number of characters; the last text is truncated to fit.
    """
    for name, limit in (("rows", rows), ("characters", characters)):
        if limit is not None and limit < 1:
            raise ConfigError(f"{name} is {limit}; it must be at least 1")
    refuse_existing(out)
    summary = ExportSummary()
    records, total = _open(source)
    expected = min((count for count in (total, rows) if count is not None), default=None)
    with (
        new_file(out) as partial,
        partial.open("w", encoding="utf-8", newline="\n") as file,
        progress("exporting", expected) as advance,
    ):
        for text in _texts(records, field, summary, advance):
            text = text if characters is None else text[: characters - summary.characters]
            file.write(json.dumps({_FIELD: text}, ensure_ascii=False) + "\n")
            summary.rows += 1
            summary.characters += len(text)
            if summary.rows == rows or summary.characters == characters:
                break
        if not summary.rows:
            raise InputError(
                f"{source} has no text in the field {field!r} ({summary}); name another"
            )
    return summary


def _texts(
    records: Iterator[_Row], field: str, summary: ExportSummary, advance: Callable[[], object]
) -> Iterator[str]:
    """Yield the texts that are not blank; count the other rows in the summary."""
    for number, (place, record) in enumerate(records):
        advance()
        if isinstance(record, Broken):
            summary.broken += 1
            summary.first_broken = summary.first_broken or Report(number, *place, str(record))
        elif (text := _text(record, field, place)).strip():
            yield text
        else:
            summary.empty += 1


def _open(source: str) -> tuple[Iterator[_Row], int | None]:
    """Return the records with their places, and their number where it is known."""
    path = Path(source).expanduser()
    if path.is_dir() or source.startswith(PREFIX):
        name = str(path) if path.is_dir() else source.removeprefix(PREFIX)
        return (((name, line), row) for line, row in enumerate(stream_rows(name), 1)), None
    opened = open_records(source)

    def read() -> Iterator[_Row]:
        for index in range(len(opened)):
            try:
                record: Record | Broken | None = opened.read(index)
            except Broken as broken:
                record = broken
            yield opened.place(index), record

    return read(), len(opened)


def _text(record: Record | None, field: str, place: _Place) -> str:
    if record is None:  # an empty line
        return ""
    where = f"{place[0]}, line {place[1]}"
    if isinstance(record, Example):
        raise InputError(f"{where} holds tokens, not text; export the data they were made of")
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
