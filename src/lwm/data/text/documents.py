"""Read documents as text: plain text, Markdown, HTML, PDF, Word and EPUB.

The first bytes of a file decide what it is; its name only tells HTML and XML from plain text.
"""

import codecs
import io
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from lwm.core.errors import InputError
from lwm.core.progress import say
from lwm.data.text.book import named_chapters
from lwm.data.text.html_text import declared_encoding, visible_text
from lwm.data.text.zipped_documents import read_zipped

_MAX_BYTES = 512 << 20
_PIECE = 1 << 16  # characters that a tokenizer processes at a time
_SAMPLE = 1 << 14  # bytes that decide which encoding is guessed
_TRUSTED = 20  # valid characters for each invalid one that make a text damaged UTF-8
_LAST_BYTES = 2048  # where a PDF names its table of contents
_WIDE = ("utf_16", "utf_16_le", "utf_16_be", "utf_32", "utf_32_le", "utf_32_be", "utf_7")
# A declaration in ASCII bytes does not say UTF-16, and the last of these are not for files.
_NOT_IN_BROWSERS = (
    "utf-16", "utf-32", "utf-7", "punycode", "idna", "unicode-escape", "raw-unicode-escape",
)  # fmt: skip
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # begins with the mark of UTF-16
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_PUNCTUATED = bytes(range(128)) + b"\x85\x91\x92\x93\x94\x96\x97\xa0"
"""ASCII, and the dots, quotation marks and dashes of the Windows encodings."""
_UNSUPPORTED = {
    b"\xd0\xcf\x11\xe0": "an old or encrypted Office document; save it as docx without a password",
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
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # a name with a zero byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"the document {path} cannot be read ({reason}); check the path"
        ) from error
    if len(data) > _MAX_BYTES:
        raise InputError(f"the document {path} is larger than {_MAX_BYTES >> 20} MB; split it")
    for beginning, what in _UNSUPPORTED.items():
        if data.startswith(beginning):
            raise InputError(f"the document {path} is {what}")
    if _is_pdf(data):
        text = _pdf(data, path)
    elif data.startswith(b"PK\x03\x04"):
        text = "\n\n".join(
            visible_text(_decoded(part, path, markup=True)) if isinstance(part, bytes) else part
            for part in read_zipped(data, path)
        )
    else:
        beginning = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        named = path.suffix.lower() in (".html", ".htm", ".xhtml")
        is_html = named or beginning.startswith((b"<!doctype html", b"<html"))
        is_xml = beginning.startswith(b"<?xml")
        text = _decoded(data, path, markup=is_html or is_xml)
        is_html = is_html or (is_xml and "<html" in text[:4096])
        text = visible_text(text) if is_html else text
    if not text.strip():
        raise InputError(f"the document {path} holds no text; name one that does")
    return text.strip()


def _is_pdf(data: bytes) -> bool:
    """Return whether bytes are a PDF, also behind other bytes, as readers of PDF accept it."""
    if data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"%PDF-"):
        return True
    return b"%PDF-" in data[:1024] and b"startxref" in data[-_LAST_BYTES:]


def _decoded(data: bytes, path: Path, *, markup: bool) -> str:
    """Decode by the mark at the beginning, what HTML and XML declare, as UTF-8, or by a guess."""
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    content = data.removeprefix(mark)
    declared = declared_encoding(data) if markup and not mark else None
    encodings = [_MARKS[mark]] if mark else ["utf-8"]
    if declared:
        encodings.insert(0, _in_browsers(declared))
    for encoding in encodings:
        try:
            text = content.decode(encoding)
        except (LookupError, UnicodeError):
            continue
        if "\0" not in text:
            break
    else:
        text = _damaged(content, encodings[-1], path, marked=bool(mark))
        text = _guessed(content, path) if text is None else text
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _damaged(content: bytes, encoding: str, path: Path, *, marked: bool) -> str | None:
    """Decode a text in which few characters are invalid; return None for other data."""
    text = content.decode(encoding, errors="replace")
    invalid = text.count("\ufffd")
    ascii_only = 0 if marked else len(text.encode("ascii", "ignore"))  # alike in most encodings
    if "\0" in text or len(text) - ascii_only - invalid < _TRUSTED * invalid:
        return None
    name = encoding.upper()
    say(f"{path} has {invalid} characters that are not valid {name}; they are read as \ufffd")
    return text


def _in_browsers(declared: str) -> str:
    """Return the encoding that browsers take for a declared one."""
    try:
        name = codecs.lookup(declared).name
    except (LookupError, ValueError):
        return "utf-8"
    if name in ("iso8859-1", "ascii"):
        return "cp1252"
    return "utf-8" if name in _NOT_IN_BROWSERS else name


def _guessed(content: bytes, path: Path) -> str:
    """Decode a text in the likeliest encoding; raise InputError for binary data."""
    encoding = _likeliest_encoding(content)
    if encoding is None:
        raise InputError(
            f"the document {path} is binary, not text; give a txt, md, html, pdf, docx or epub "
            "file"
        )
    say(
        f"{path} is not UTF-8, and not in an encoding that it declares; it is read as {encoding}, "
        "which is a guess"
    )
    return content.decode(encoding, errors="replace")


def _likeliest_encoding(data: bytes) -> str | None:
    from charset_normalizer import from_bytes

    sample = data[:_SAMPLE]
    for encoding, high in (("utf-16-le", sample[1::2]), ("utf-16-be", sample[::2])):
        if high.count(0) * 2 > len(high) and sample.count(0) < len(sample) * 0.6:
            return encoding
    controls = sum(byte < 32 and byte not in b"\t\n\f\r\x1b" for byte in sample)
    if controls * 20 > len(sample) or b"\0" in data:
        return None
    lines = (line for line in data.splitlines(keepends=True) if not line.isascii())
    sample = b"".join(islice(lines, _SAMPLE))[:_SAMPLE]
    if not sample.translate(None, _PUNCTUATED):
        return "cp1252"
    # The sample may end inside a character of up to four bytes.
    ends = (from_bytes(sample[: len(sample) - cut], cp_exclusion=[*_WIDE]) for cut in range(4))
    matches = min(ends, key=lambda one: best.chaos if (best := one.best()) else 1.0)
    if (best := matches.best()) is None:
        return None
    # Languages of Western Europe look alike in several encodings, of which this one is common.
    western = any(
        "cp1252" in match.could_be_from_charset
        and match.coherence >= best.coherence
        and match.chaos <= best.chaos + 0.1
        for match in matches
    )
    return "cp1252" if western else best.encoding


def _pdf(data: bytes, path: Path) -> str:
    from pypdf import PdfReader
    from pypdf.errors import FileNotDecryptedError

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it reports what it repairs
    try:
        pages = [page.extract_text() for page in PdfReader(io.BytesIO(data)).pages]
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
