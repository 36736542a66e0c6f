"""Read documents that are ZIP archives of XML: Word (docx) and EPUB.

Sources: ECMA-376, part 1, section 17 (WordprocessingML) and part 2, annex B (archives); EPUB 3.3,
sections 4 (open container format) and 5 (package document).
"""

import io
import posixpath
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote
from xml.parsers import expat

from lwm.core.errors import InputError

_MAX_UNPACKED = 64 << 20  # bytes of the files that hold text, not of images
_MAX_DEPTH = 256
_WORD = re.compile(r"word/document\d*\.xml")
_CONTAINER, _ENCRYPTION = "META-INF/container.xml", "META-INF/encryption.xml"
_OTHERS = {
    "xl/workbook.xml": "an Excel workbook",
    "ppt/presentation.xml": "a PowerPoint presentation",
    "content.xml": "an OpenDocument file",
}
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # both formats allow no others
# Moved and deleted text, a copy for old versions of Word, and properties.
_HIDDEN = frozenset({"moveFrom", "del", "Fallback", "pPr", "rPr"})
_BREAKS = {"tab": "\t", "ptab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "-"}
_SEPARATORS = {"p": "", "tc": " ", "tr": "\t"}  # join what a paragraph, cell or row holds

Attributes = dict[str, str]


def read_zipped(data: bytes, path: Path) -> list[str | bytes]:
    """Return the texts of a Word document, or the HTML pages of an EPUB in order.

    Raises InputError for other archives, and for broken, protected or very large ones.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            files = _Files(path, archive)
            if word := next(filter(_WORD.fullmatch, files.names), None):
                return [_word_text(files, word)]
            if _CONTAINER in files.names:
                return [files.read(name) for name in _pages(files)]
    except (
        zipfile.BadZipFile, zlib.error, expat.ExpatError, NotImplementedError, RuntimeError,
        LookupError, ValueError, EOFError, OSError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"the document {path} is broken or protected ({reason}); save it again, or as text"
        ) from error
    if what := next((_OTHERS[name] for name in files.names if name in _OTHERS), None):
        raise InputError(f"the document {path} is {what}; save it as docx, pdf or txt")
    raise InputError(
        f"the document {path} is a ZIP archive, neither docx nor epub; unpack it and name a file"
    )


class _Files:
    """Read the files of an archive, up to a number of bytes in all."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self._archive, self._left = path, archive, _MAX_UNPACKED
        self.names = archive.namelist()

    def read(self, name: str) -> bytes:
        file = self._archive.getinfo(name)
        if file.compress_type not in _METHODS:
            raise ValueError(f"{name} is compressed by method {file.compress_type}")
        self._left -= file.file_size
        if self._left < 0:
            raise InputError(
                f"the document {self.path} is larger than {_MAX_UNPACKED >> 20} MB once unpacked; "
                "split it"
            )
        return self._archive.read(name)

    def parse(
        self,
        name: str,
        start: Callable[[str, Attributes], object],
        end: Callable[[str], object] = lambda name: None,
        text: Callable[[str], object] = lambda text: None,
    ) -> None:
        """Call a function at the start and the end of each element of XML, and for texts.

        Elements are known by their names without a namespace.
        """
        parser = expat.ParserCreate()
        parser.StartElementHandler = lambda tag, attributes: start(_local(tag), attributes)
        parser.EndElementHandler = lambda tag: end(_local(tag))
        parser.CharacterDataHandler = text
        parser.EntityDeclHandler = self._refuse_entity
        parser.Parse(self.read(name), True)

    def elements(self, name: str, *kinds: str) -> list[tuple[str, Attributes]]:
        """Return the elements of some kinds, with their attributes, in order."""
        elements: list[tuple[str, Attributes]] = []
        self.parse(
            name, lambda kind, attributes: kind in kinds and elements.append((kind, attributes))
        )
        return elements

    def _refuse_entity(self, *_: object) -> None:
        # Neither format uses entities, and they may expand without end.
        raise InputError(f"the document {self.path} declares XML entities; save it again")


def _local(tag: str) -> str:
    return tag if ":" not in tag else tag[tag.index(":") + 1 :]


def _word_text(files: _Files, name: str) -> str:
    """Return the paragraphs of a Word document, and rows of tables with tabs between cells."""
    lists: list[list[str]] = [[]]  # the texts of the open paragraphs, cells and rows
    open_tags: list[str] = []
    hidden = 0

    def start(tag: str, attributes: Attributes) -> None:
        nonlocal hidden
        open_tags.append(tag)
        if len(open_tags) > _MAX_DEPTH:
            raise ValueError(f"{name} nests more than {_MAX_DEPTH} elements")
        hidden += tag in _HIDDEN
        if hidden:
            return
        if tag in _SEPARATORS:
            lists.append([])
        elif tag in _BREAKS:
            lists[-1].append(_BREAKS[tag])

    def end(tag: str) -> None:
        nonlocal hidden
        open_tags.pop()
        if tag in _SEPARATORS and not hidden:
            block = _SEPARATORS[tag].join(lists.pop())
            in_text_box = tag == "p" and "p" in open_tags
            lists[-1].append(f"\n{block}" if in_text_box else block)
        hidden -= tag in _HIDDEN

    def text(content: str) -> None:
        if open_tags[-1] == "t" and not hidden:
            lists[-1].append(content)

    files.parse(name, start, end, text)
    return "\n".join(lists[0])


def _pages(files: _Files) -> list[str]:
    """Return the names of an EPUB's pages, in reading order."""
    root = files.elements(_CONTAINER, "rootfile")[0][1]["full-path"]
    package = files.elements(root, "item", "itemref")
    items = {item.get("id"): item for kind, item in package if kind == "item"}
    pages = []
    for reference in (one for kind, one in package if kind == "itemref"):
        item = items[reference["idref"]]
        is_contents = "nav" in item.get("properties", "").split()
        if reference.get("linear") != "no" and not is_contents:
            address = unquote(item["href"])
            pages.append(posixpath.normpath(posixpath.join(posixpath.dirname(root), address)))
    if _ENCRYPTION in files.names:
        encrypted = files.elements(_ENCRYPTION, "CipherReference")
        if not {unquote(one.get("URI", "")) for _, one in encrypted}.isdisjoint(pages):
            raise InputError(
                f"the book {files.path} is protected by DRM; name a copy without protection"
            )
    return pages
