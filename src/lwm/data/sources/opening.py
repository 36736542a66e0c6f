"""From what a user writes as a path to a source: names, globs, URLs, kinds of file."""

import glob
from collections.abc import Callable
from pathlib import Path

from lwm.core.errors import InputError
from lwm.data.sources import array_record, parquet
from lwm.data.sources.array_record import ArrayRecord
from lwm.data.sources.huggingface import PREFIX, HuggingFace
from lwm.data.sources.json_lines import JsonLines
from lwm.data.sources.parquet import Parquet
from lwm.data.sources.source import InMemory, Joined, RecordSource
from lwm.data.sources.spool import is_url, local_file, urls
from lwm.data.text.books import king_james_chapters

BOOK = "book"

_KINDS: dict[str, Callable[[Path, str], RecordSource]] = {
    "jsonl": JsonLines,
    "parquet": Parquet,
    "array_record": ArrayRecord,
}


def open_records(path: str, format: str = "auto") -> RecordSource:
    """All that a path names, in the order of its parts, the files of a glob by name.

    Args:
        format: `jsonl`, `parquet`, `array_record` or `huggingface`; `auto` goes by first bytes.

    Raises:
        InputError: nothing is named, or a part names nothing that can be read.
    """
    parts = [part.strip() for part in path.split(",") if part.strip()]
    if not parts:
        raise InputError(
            "no data is given; name a file, a glob, a URL, hf:NAME or book with --data.path"
        )
    sources = [source for part in parts for source in _open_part(part, format)]
    return sources[0] if len(sources) == 1 else Joined(sources)


def _open_part(part: str, format: str) -> list[RecordSource]:
    if part == BOOK and not Path(part).exists():
        return [_book()]
    if format == "huggingface" or (part.startswith(PREFIX) and not is_url(part)):
        return [HuggingFace(part.removeprefix(PREFIX))]
    return [_open_file(name, format) for name in (urls(part) if is_url(part) else _files(part))]


def _open_file(name: str, format: str) -> RecordSource:
    file = local_file(name)
    return _KINDS[_kind(file) if format == "auto" else format](file, name)


def _kind(file: Path) -> str:
    """What a file is by its first bytes; what is nothing else is lines."""
    with file.open("rb") as opened:
        head = opened.read(8)
    if head.startswith(parquet.MAGIC):
        return "parquet"
    return "array_record" if head.startswith(array_record.MAGIC) else "jsonl"


def _book() -> RecordSource:
    chapters = king_james_chapters()
    return InMemory(
        "the King James Bible",
        [{"text": c.text, "book": c.book, "chapter": c.number} for c in chapters],
    )


def _files(part: str) -> list[str]:
    named = Path(part).expanduser()
    if named.is_file():
        return [str(named)]
    if named.is_dir():
        raise InputError(f"{part} is a directory; name a file in it, or add /*.jsonl")
    files = sorted(name for name in glob.glob(str(named), recursive=True) if Path(name).is_file())
    if not files:
        raise InputError(f"no data file matches {part}; check the path")
    return files
