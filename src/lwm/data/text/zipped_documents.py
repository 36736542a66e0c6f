"""Read documents that are ZIP archives of XML: Word (docx) and EPUB.

Sources: ECMA-376, part 1, section 17 (WordprocessingML); EPUB 3.3, sections 4 (open container
format) and 5 (package document).
"""

import posixpath
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

from lwm.core.errors import InputError

_WORD = "word/document.xml"
_CONTAINER, _ENCRYPTION = "META-INF/container.xml", "META-INF/encryption.xml"
_HIDDEN = ("moveFrom", "del", "Fallback")  # moved and deleted text; a copy for old versions
_BREAKS = {"tab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "-"}


def read_zipped(path: Path, *, limit: int) -> list[str | bytes]:
    """Return the texts of a Word document, or the HTML pages of an EPUB in order.

    Raises InputError for other archives, broken or protected ones, or more than `limit` bytes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            files = _Files(path, archive, limit)
            if files.has(_WORD):
                return ["\n".join(_paragraphs(files.xml(_WORD)))]
            if files.has(_CONTAINER):
                return [files.read(name) for name in _spine(files)]
    except (
        zipfile.BadZipFile, zlib.error, ElementTree.ParseError, NotImplementedError, RuntimeError,
        RecursionError, LookupError, ValueError, EOFError, OSError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"the document {path} is broken or protected ({reason}); save it again, or as text"
        ) from error
    raise InputError(
        f"the document {path} is a ZIP archive, neither docx nor epub; unpack it and name a file"
    )


class _Files:
    """Read the files of an archive, up to a number of bytes in all."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, limit: int) -> None:
        self.path, self._archive, self._left = path, archive, limit
        self._names = set(archive.namelist())

    def has(self, name: str) -> bool:
        return name in self._names

    def read(self, name: str) -> bytes:
        self._left -= self._archive.getinfo(name).file_size
        if self._left < 0:
            raise InputError(f"the document {self.path} is too large once unpacked; split it")
        return self._archive.read(name)

    def xml(self, name: str) -> ElementTree.Element:
        data = self.read(name)
        if b"<!ENTITY" in data:  # neither format uses them, and they may expand without end
            raise InputError(f"the document {self.path} declares XML entities; save it again")
        return ElementTree.fromstring(data)


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def _named(element: ElementTree.Element, *names: str) -> Iterator[ElementTree.Element]:
    return (inner for inner in element.iter() if _tag(inner) in names)


def _paragraphs(element: ElementTree.Element) -> Iterator[str]:
    """Yield the paragraphs of a Word document, and each row of a table with tabs between cells."""
    for child in element:
        match _tag(child):
            case "p":
                yield "".join(_runs(child))
            case "tr":
                cells = (cell for cell in child if _tag(cell) == "tc")
                yield "\t".join(" ".join(_paragraphs(cell)) for cell in cells)
            case name if name not in _HIDDEN:
                yield from _paragraphs(child)


def _runs(element: ElementTree.Element) -> Iterator[str]:
    for child in element:
        name = _tag(child)
        if name == "t":
            yield child.text or ""
        elif name in _BREAKS:
            yield _BREAKS[name]
        elif name == "p":  # of a text box
            yield "\n" + "".join(_runs(child))
        elif name not in (*_HIDDEN, "pPr", "rPr"):
            yield from _runs(child)


def _spine(files: _Files) -> list[str]:
    """Return the names of an EPUB's pages, in reading order."""
    (root, *_) = (one.get("full-path", "") for one in _named(files.xml(_CONTAINER), "rootfile"))
    package = files.xml(root)
    items = {item.get("id"): item for item in _named(package, "item")}
    pages = []
    for reference in _named(package, "itemref"):
        item = items[reference.get("idref")]
        is_contents = "nav" in item.get("properties", "").split()
        if reference.get("linear") != "no" and not is_contents:
            address = unquote(item.get("href", ""))
            pages.append(posixpath.normpath(posixpath.join(posixpath.dirname(root), address)))
    if files.has(_ENCRYPTION):
        encrypted = _named(files.xml(_ENCRYPTION), "CipherReference")
        if not {unquote(one.get("URI", "")) for one in encrypted}.isdisjoint(pages):
            raise InputError(
                f"the book {files.path} is protected by DRM; name a copy without protection"
            )
    return pages
