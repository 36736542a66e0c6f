"""Read documents as text: plain text, Markdown, HTML, PDF, Word and EPUB.

The first bytes of a file decide what it is; its name only tells HTML and XML from plain text.
"""

import codecs
import warnings
from collections.abc import Iterator
from pathlib import Path

from lwm.core.errors import InputError
from lwm.core.progress import say
from lwm.data.text.book import named_chapters
from lwm.data.text.zipped_documents import read_zipped

_MAX_BYTES = 512 << 20
_PIECE = 1 << 16  # characters that a tokenizer processes at a time
_SAMPLE = 1 << 16  # bytes that decide which encoding is guessed
_WIDE = ("utf_16", "utf_16_le", "utf_16_be", "utf_32", "utf_32_le", "utf_32_be", "utf_7")
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # begins with the mark of UTF-16
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_UNSUPPORTED = {
    b"\xd0\xcf\x11\xe0": "an old Office document; save it as docx or txt",
    b"{\\rtf": "RTF; save it as docx or txt",
    b"\x1f\x8b": "compressed; decompress it first",
}
"""What files with these first bytes are, and the remedy."""


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
    """Return the text of a document; raise InputError if it has none or cannot be read."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"the document {path} is larger than {_MAX_BYTES >> 20} MB; split it")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"the document {path} cannot be read ({error.strerror}); check the path"
        ) from error
    for beginning, what in _UNSUPPORTED.items():
        if data.startswith(beginning):
            raise InputError(f"the document {path} is {what}")
    if b"%PDF-" in data[:1024]:  # as readers of PDF do, though it belongs at the beginning
        text = _pdf(path)
    elif data.startswith(b"PK\x03\x04"):
        text = "\n\n".join(
            _html(_decoded(part, path, markup=True)) if isinstance(part, bytes) else part
            for part in read_zipped(path, limit=_MAX_BYTES)
        )
    else:
        beginning = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        named = path.suffix.lower() in (".html", ".htm", ".xhtml")
        is_html = named or beginning.startswith((b"<!doctype html", b"<html"))
        is_xml = beginning.startswith(b"<?xml")
        text = _decoded(data, path, markup=is_html or is_xml)
        text = _html(text) if is_html or (is_xml and "<html" in text[:4096]) else text
    if not text.strip():
        raise InputError(f"the document {path} holds no text; name one that does")
    return text.strip()


def _decoded(data: bytes, path: Path, *, markup: bool) -> str:
    """Decode by the mark at the beginning, what HTML and XML declare, as UTF-8, or by a guess."""
    from bs4.dammit import EncodingDetector

    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    content = data.removeprefix(mark)
    declared = EncodingDetector.find_declared_encoding(data, is_html=True) if markup else None
    encodings = [_MARKS[mark]] if mark else ["utf-8"]
    if declared and not mark:
        encodings.insert(0, _in_browsers(declared))
    for encoding in encodings:
        try:
            text = content.decode(encoding)
        except (LookupError, UnicodeError):
            continue
        if "\0" not in text:
            break
    else:
        encoding = None if mark else _guess(content)
        if encoding is None:
            raise InputError(
                f"the document {path} is binary, not text; give a txt, md, html, pdf, docx or "
                "epub file"
            )
        say(
            f"{path} does not declare its encoding and is not UTF-8; it is read as {encoding}, "
            "which is a guess"
        )
        text = content.decode(encoding, errors="replace")
    return text.replace("\r\n", "\n")


def _in_browsers(declared: str) -> str:
    """Return the encoding that browsers take for a declared one."""
    try:
        name = codecs.lookup(declared).name
    except LookupError:
        return "utf-8"
    return {"iso8859-1": "cp1252", "ascii": "cp1252", "utf-16": "utf-8"}.get(name, name)


def _guess(data: bytes) -> str | None:
    """Return the likeliest encoding of a text, or None for binary data."""
    from charset_normalizer import from_bytes

    sample = data[:_SAMPLE]
    for encoding, high in (("utf-16-le", sample[1::2]), ("utf-16-be", sample[::2])):
        if high.count(0) * 2 > len(high) and sample.count(0) < len(sample) * 0.6:
            return encoding
    controls = sum(byte < 32 and byte not in b"\t\n\f\r\x1b" for byte in sample)
    if controls * 20 > len(sample) or b"\0" in data:
        return None
    lines = data.splitlines(keepends=True)
    matches = from_bytes(
        b"".join(line for line in lines if not line.isascii())[:_SAMPLE], cp_exclusion=[*_WIDE]
    )
    best = matches.best()
    if best is None:
        return None
    # Languages of Western Europe look alike in several encodings, of which this one is common.
    western = any(
        "cp1252" in match.could_be_from_charset
        and match.coherence >= best.coherence
        and match.chaos <= best.chaos + 0.1
        for match in matches
    )
    return "cp1252" if western else best.encoding


def _html(text: str) -> str:
    from bs4 import BeautifulSoup

    with warnings.catch_warnings():  # bs4 warns of text that resembles a file's name, or of XML
        warnings.simplefilter("ignore")
        page = BeautifulSoup(text, "html.parser")
    for hidden in page(["script", "style", "noscript", "template"]):
        hidden.decompose()
    lines = (" ".join(line.split()) for line in page.get_text("\n").splitlines())
    return "\n".join(line for line in lines if line)


def _pdf(path: Path) -> str:
    from pypdf import PdfReader
    from pypdf.errors import FileNotDecryptedError

    try:
        pages = [page.extract_text() for page in PdfReader(path).pages]
    except FileNotDecryptedError as error:
        raise InputError(f"the PDF {path} is locked by a password; save it without one") from error
    except Exception as error:  # the library raises anything for broken files
        reason = " ".join(str(error).split())
        raise InputError(
            f"the PDF {path} cannot be read ({reason}); export it again, or as text"
        ) from error
    if pages and not any(page.strip() for page in pages):
        raise InputError(
            f"the PDF {path} has no text layer, only drawings or pictures of text; run text "
            "recognition (OCR) over it first"
        )
    return "\n\n".join(pages)
