"""From what a user writes as a path to a source: names, globs, URLs, kinds of file."""

import glob
from pathlib import Path

from lwm.core.errors import InputError
from lwm.data.books import king_james_chapters
from lwm.data.sources.json_lines import JsonLines
from lwm.data.sources.source import InMemory, Joined, Source

BOOK = "book"


def open_source(path: str, format: str = "auto") -> Source:
    """All that a path names, in the order of its parts, the files of a glob by name.

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


def _open_part(part: str, format: str) -> list[Source]:
    if part == BOOK:
        return [_book()]
    return [JsonLines(file) for file in _local_files(part)]


def _book() -> Source:
    chapters = king_james_chapters()
    return InMemory(
        "the King James Bible",
        [{"text": c.text, "book": c.book, "chapter": c.number} for c in chapters],
    )


def _local_files(part: str) -> list[Path]:
    named = Path(part).expanduser()
    if named.is_file():
        return [named]
    found = [Path(name) for name in glob.glob(str(named), recursive=True)]
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise InputError(f"no data file matches {part}; check the path")
    return files
