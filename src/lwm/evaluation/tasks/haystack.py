"""Text that needles are hidden in: from a file to token ids, cut to any length, and needles put
where a sentence ends.

Everything is counted in tokens of the model, so that a context is as long as was asked for.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from lwm.core.errors import InputError
from lwm.data.examples.examples import Broken
from lwm.data.sources.opening import open_records
from lwm.data.text.books import king_james_bible
from lwm.data.text.documents import read_document
from lwm.data.text.tokenizer import Tokenizer

BOOK = "book"
_LINES = re.compile(
    r"\.(jsonl?|ndjson|parquet|array_record)(\.gz|\.zst)?$|^[a-z0-9]+://|^hf:|[*?]"
)
_PIECE = 1 << 16
"""Characters that are turned into tokens at once."""
SPREAD = 4
"""How much more text than a context takes there should be, for rounds to differ."""
_CLOSING = "\"'”’»)]"


def texts(name: str) -> Iterator[str]:
    """Texts of a haystack.

    Args:
        name: `book` for the King James Bible, `book:Ruth` for a book of it, a txt, md, html or
            pdf file, or what `--data.path` takes: JSON lines with a field `text`, Parquet, a glob.

    Raises:
        InputError: it cannot be read, or a record has no text.
    """
    kind, _, part = name.partition(":")
    if kind == BOOK and not Path(name).exists():
        yield king_james_bible(part or None)
    elif not _LINES.search(name):
        yield read_document(Path(name))
    else:
        source = open_records(name)
        for index in range(len(source)):
            try:
                record = source.read(index)
            except Broken as broken:
                file, line = source.place(index)
                raise InputError(
                    f"{file} line {line} cannot be read: {broken}; repair it"
                ) from broken
            if record is None:  # an empty line
                continue
            fields = record if isinstance(record, Mapping) else {}
            if not isinstance(text := fields.get("text"), str):
                raise InputError(
                    f"{name} record {index + 1} has no field 'text' that is text; it has "
                    f"{', '.join(map(repr, sorted(fields))) or 'tokens'}"
                )
            yield text


@dataclass(frozen=True)
class Haystack:
    """A text as ids.

    Args:
        ids: of the tokens.
        numbers: every run of 7 digits in the text, none of which a needle may hide.
    """

    ids: Int[np.ndarray, " tokens"]
    ends: Bool[np.ndarray, " tokens"]
    numbers: frozenset[str]

    @cached_property
    def starts(self) -> Int[np.ndarray, " sentences"]:
        """Where sentences begin."""
        return np.concatenate([[0], np.flatnonzero(self.ends) + 1])

    @property
    def fingerprint(self) -> str:
        """Tells texts apart, and what tokenizers make of them."""
        return hashlib.sha256(self.ids.astype("<i8").tobytes()).hexdigest()[:16]

    def window(self, size: int, seed: Sequence[int]) -> "Haystack":
        """`size` tokens from the beginning of a sentence among the first `SPREAD` times as many,
        another one for each seed if there is enough text. The same for a size and a seed whatever
        else is asked.
        """
        spare = min(len(self.ids), SPREAD * size) - size
        assert spare >= 0
        starts = self.starts[: np.searchsorted(self.starts, spare, side="right")]
        start = int(np.random.default_rng(seed).choice(starts))
        part = slice(start, start + size)
        return Haystack(self.ids[part], self.ends[part], self.numbers)

    def place(self, depth: float) -> int:
        """Where to put something: behind the last full stop before `depth` per cent, at the very
        beginning if there is none, at the very end for 100."""
        if depth >= 100:
            return len(self.ids)
        before = int(len(self.ids) * depth / 100)
        stops = np.flatnonzero(self.ends[:before])
        return int(stops[-1]) + 1 if len(stops) else 0

    def planted(self, needles: Sequence[tuple[float, Sequence[int]]]) -> list[int]:
        """The text with needles at their depths, in their order where two meet."""
        out: list[int] = []
        done = 0
        for at, needle in sorted(
            ((self.place(depth), ids) for depth, ids in needles), key=lambda pair: pair[0]
        ):
            out += [*self.ids[done:at].tolist(), *needle]
            done = at
        return out + self.ids[done:].tolist()


def read_haystack(name: str, tokenizer: Tokenizer, tokens: int) -> Haystack:
    """The first `tokens` tokens of a text at least, or all of a shorter one.

    Raises:
        InputError: it cannot be read.
    """
    found: list[int] = []
    numbers: set[str] = set()
    for piece in _pieces(texts(name)):
        found += tokenizer.encode(piece, specials=False)
        for run in re.findall(r"\d{7,}", piece):
            numbers |= {run[i : i + 7] for i in range(len(run) - 6)}
        if len(found) >= tokens:
            break
    ids = np.array(found, np.int64)
    return Haystack(ids, _full_stops(ids, tokenizer), frozenset(numbers))


def _pieces(whole: Iterator[str]) -> Iterator[str]:
    """Texts in pieces that end with a paragraph or a word, so that no tokenizer sees millions of
    characters at once."""
    for number, text in enumerate(whole):
        if number:
            text = "\n\n" + text
        first = 0
        while first < len(text):
            last = min(first + _PIECE, len(text))
            if last < len(text):
                cut = max(text.rfind("\n", first, last), text.rfind(" ", first, last))
                last = cut if cut > first else last
            yield text[first:last]
            first = last


def _full_stops(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Which tokens end a sentence with a full stop; all of them where none does."""
    kinds, inverse = np.unique(ids, return_inverse=True)
    stops = [
        tokenizer.decode([int(kind)]).rstrip().rstrip(_CLOSING).endswith(".") for kind in kinds
    ]
    ends = np.array(stops, bool)[inverse] if len(kinds) else np.zeros(0, bool)
    # Text without full stops: any place will do, so that needles still lie where they should.
    return ends if ends.any() else np.ones(len(ids), bool)
