"""Read a user's documents as text (plain text, Markdown, HTML, PDF), and cut texts into pieces."""

import warnings
from collections.abc import Iterator
from pathlib import Path

from lwm.core.errors import InputError
from lwm.data.text.books import named_chapters

MAX_DOCUMENT_BYTES = 512 << 20
_PIECE = 1 << 16  # characters that a tokenizer processes at a time


def read_text(name: str) -> str:
    """Return the text of `book`, of `book:Ruth`, or of a document.

    Raises:
        InputError: the text cannot be read.
    """
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
    """Return the text of a document, whose format is detected by its first bytes and its name.

    Raises:
        InputError: the document is missing, empty, binary, or a PDF without text.
    """
    try:
        if path.is_dir():
            raise InputError(f"the document {path} is a directory; name a file")
        if path.stat().st_size > MAX_DOCUMENT_BYTES:
            raise InputError(
                f"the document {path} is larger than {MAX_DOCUMENT_BYTES >> 20} MB; split it"
            )
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
            f"the document {path} is a PDF that cannot be read ({error}); export it again or as "
            "text"
        ) from error
