"""Extract the visible text of HTML and XHTML in one pass, in linear time for any input.

The rules for tags, comments and raw text are those of the HTML standard, section 13.2.5
(tokenization). A block begins a line, a cell of a table follows a tab, and inline tags add
nothing, so that a word with a decorated first letter remains one word.
"""

import re
from collections.abc import Iterator
from html import unescape

_MARKUP = re.compile(
    r"""<!--(?:-?>|.*?(?:--!?>|\Z))
    | <!\[CDATA\[(?P<text>.*?)(?:\]\]>|\Z)
    | <[!?][^>]*+>?
    | <(?P<end>/?)(?P<name>[a-z][^\s/>]*+)
      (?:=\s*+"[^"]*+"? | =\s*+'[^']*+'? | [^>])*+ >?""",
    re.IGNORECASE | re.DOTALL | re.VERBOSE,
)
_DECLARED = re.compile(
    rb"""<\?xml[^>]{0,200}?encoding\s*=\s*["']([\w.:-]+)"""
    rb"""|<meta[^>]{1,500}?charset\s*=\s*["']?\s*([\w.:-]+)""",
    re.IGNORECASE,
)
_HEAD = 1 << 14  # bytes that may declare an encoding; browsers read 1,024
_HUGE_REFERENCE = re.compile(r"&#(?:[0-9]{8,}|[xX][0-9a-fA-F]{8,});?")  # no character's number
_BLANKS = re.compile(r"\s+")
_HIDDEN = frozenset({"script", "style", "noscript", "template"})
_CELLS = frozenset({"td", "th"})
_BLOCKS = re.compile(
    "address|article|aside|blockquote|body|br|caption|center|dd|details|dialog|dir|div|dl|dt|"
    "fieldset|figcaption|figure|footer|form|h[1-6]|head|header|hr|html|legend|li|main|menu|nav|"
    "ol|optgroup|option|p|pre|search|section|select|summary|table|tbody|tfoot|thead|title|tr|ul"
)


def declared_encoding(data: bytes) -> str | None:
    """Return the encoding that the beginning of an HTML or XML file declares."""
    declaration = _DECLARED.search(data[:_HEAD])
    return None if declaration is None else (declaration[1] or declaration[2]).decode("ascii")


def visible_text(page: str) -> str:
    """Return the lines of text that a page shows, without its markup."""
    lines = (line.removeprefix("\t").split("\t") for line in "".join(_pieces(page)).split("\n"))
    tidy = ("\t".join(" ".join(cell.split()) for cell in cells) for cells in lines)
    return "\n".join(line for line in tidy if line.strip())


def _pieces(page: str) -> Iterator[str]:
    """Yield texts and the tabs and line ends of tags; in other text, those count as spaces."""
    at, in_pre = 0, False
    while at < len(page):
        tag = _MARKUP.search(page, at)
        start = len(page) if tag is None else tag.start()
        text = unescape(_HUGE_REFERENCE.sub("\ufffd", page[at:start]))
        yield text if in_pre else _BLANKS.sub(" ", text)
        if tag is None:
            return
        at, name = tag.end(), (tag["name"] or "").lower()
        if tag["text"] is not None:
            yield tag["text"]
        elif name in _HIDDEN and not tag["end"] and not tag[0].endswith("/>"):
            at = _end_of_hidden(page, name, at)
        elif _BLOCKS.fullmatch(name):
            yield "\n"
            in_pre = not tag["end"] if name == "pre" else in_pre
        elif name in _CELLS and not tag["end"]:
            yield "\t"


def _end_of_hidden(page: str, name: str, start: int) -> int:
    end = re.compile(rf"</{name}(?=[\s/>])", re.IGNORECASE).search(page, start)
    return len(page) if end is None else end.start()
