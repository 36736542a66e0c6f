"""Open the records that a user's path names: files, globs, URLs, datasets, the book."""

import glob
from collections.abc import Callable
from pathlib import Path

from lwm.core.errors import InputError
from lwm.data.sources import array_record, parquet
from lwm.data.sources.array_record import ArrayRecord
from lwm.data.sources.cache import expand_url, is_url, local_file
from lwm.data.sources.huggingface import PREFIX, HuggingFace
from lwm.data.sources.json_lines import JsonLines
from lwm.data.sources.parquet import Parquet
from lwm.data.sources.source import InMemory, Joined, RecordSource
from lwm.data.text.books import named_chapters

_FORMATS: dict[str, Callable[[Path, str], RecordSource]] = {
    "jsonl": JsonLines,
    "parquet": Parquet,
    "array_record": ArrayRecord,
}


def open_records(path: str, format: str = "auto") -> RecordSource:
    """Open all that a path names, in the order of its parts; the files of a glob by name.

    Args:
        format: `jsonl`, `parquet`, `array_record` or `huggingface`; `auto` reads the first bytes.

    Raises:
        InputError: the path is empty, or a part of it cannot be read.
    """
    parts = [part.strip() for part in path.split(",") if part.strip()]
    if not parts:
        raise InputError(
            "no data is given; name a file, a glob, a URL, hf:NAME or book with --data.path"
        )
    sources = [source for part in parts for source in _open_part(part, format)]
    return sources[0] if len(sources) == 1 else Joined(sources)


def _open_part(part: str, format: str) -> list[RecordSource]:
    if (chapters := named_chapters(part)) is not None:
        records = [{"text": c.text, "book": c.book, "chapter": c.number} for c in chapters]
        return [InMemory("the King James Bible", records)]
    if format == "huggingface" or (part.startswith(PREFIX) and not is_url(part)):
        return [HuggingFace(part.removeprefix(PREFIX))]
    return [
        _open_file(name, format) for name in (expand_url(part) if is_url(part) else _files(part))
    ]


def _open_file(name: str, format: str) -> RecordSource:
    file = local_file(name)
    if format == "auto":
        with file.open("rb") as opened:
            head = opened.read(8)
        format = "array_record" if head.startswith(array_record.MAGIC) else "jsonl"
        format = "parquet" if head.startswith(parquet.MAGIC) else format
    return _FORMATS[format](file, name)


def _files(part: str) -> list[str]:
    path = Path(part).expanduser()
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        raise InputError(f"{part} is a directory; name a file in it, or add /*.jsonl")
    files = sorted(name for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if not files:
        raise InputError(f"no data file matches {part}; check the path")
    return files
