"""Documents a user hands over: plain text, Markdown, HTML, PDF -> text."""

import warnings
from pathlib import Path

from lwm.core.errors import InputError

MAX_DOCUMENT_BYTES = 512 << 20


def read_document(path: Path) -> str:
    """The text of a document; the kind is told by its first bytes and its name.

    Raises:
        InputError: it is missing, empty, binary, or a PDF without text.
    """
    try:
        if path.is_dir():
            raise InputError(f"the document {path} is a directory; name a file")
        if path.stat().st_size > MAX_DOCUMENT_BYTES:
            raise InputError(
                f"the document {path} is larger than {MAX_DOCUMENT_BYTES >> 20} MB; cut it into "
                "parts"
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

    with warnings.catch_warnings():  # bs4 warns of text that looks like a file's name
        warnings.simplefilter("ignore")
        page = BeautifulSoup(text, "html.parser")
    for unread in page(["script", "style", "noscript", "template"]):
        unread.decompose()
    lines = (" ".join(line.split()) for line in page.get_text("\n").splitlines())
    return "\n".join(line for line in lines if line)


def _pdf(path: Path) -> str:
    from pypdf import PdfReader

    try:
        return "\n\n".join(page.extract_text() for page in PdfReader(path).pages)
    except Exception as error:  # broken and locked files fail in the library in any way
        raise InputError(
            f"the document {path} is a PDF that cannot be read ({error}); export it again or as "
            "text"
        ) from error
