"""Read a text to hide needles in, cut windows of a number of tokens, and insert needles between
sentences."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from lwm.core.errors import InputError
from lwm.data.examples.examples import Broken
from lwm.data.sources.opening import open_records
from lwm.data.text.documents import read_text, text_pieces
from lwm.data.text.tokenizer import Tokenizer

SPREAD = 4
"""Text to read for a context, in multiples of its length, so that rounds differ."""
_RECORDS = re.compile(
    r"\.(jsonl?|ndjson|parquet|array_record)(\.gz|\.zst)?$|^[a-z0-9]+://|^hf:|[*?]"
)
_CLOSING = "\"'”’»)]"


def read_texts(name: str) -> Iterator[str]:
    """Yield the texts of a haystack; raise InputError if one cannot be read.

    Args:
        name: `book` for the King James Bible, `book:Ruth` for one of its books, a txt, md, html,
            pdf, docx or epub file, or what `--data.path` takes: JSON lines with a field `text`,
            Parquet, a glob.
    """
    if not _RECORDS.search(name):
        yield read_text(name)
        return
    source = open_records(name)
    for index in range(len(source)):
        try:
            record = source.read(index)
        except Broken as broken:
            file, line = source.place(index)
            raise InputError(f"{file} line {line} cannot be read: {broken}; repair it") from broken
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
    """Hold a text as token ids."""

    ids: Int[np.ndarray, " tokens"]
    ends: Bool[np.ndarray, " tokens"]  # whether each token ends a sentence
    numbers: frozenset[str]  # runs of 7 digits in the text, which needles must avoid

    @property
    def fingerprint(self) -> str:
        """Return a hash of the token ids."""
        return hashlib.sha256(self.ids.astype("<i8").tobytes()).hexdigest()[:16]

    def window(self, size: int, seed: Sequence[int]) -> "Haystack":
        """Return `size` tokens from the beginning of a random sentence, within the first
        `SPREAD * size` tokens, however much text there is."""
        spare = min(len(self.ids), SPREAD * size) - size
        starts = np.concatenate([[0], np.flatnonzero(self.ends[:spare]) + 1])
        start = int(np.random.default_rng(seed).choice(starts))
        part = slice(start, start + size)
        return Haystack(self.ids[part], self.ends[part], self.numbers)

    def index_at(self, depth: float) -> int:
        """Return where to insert a needle: after the last sentence that ends before `depth`."""
        if depth >= 100:
            return len(self.ids)
        before = int(len(self.ids) * depth / 100)
        ends = np.flatnonzero(self.ends[:before])
        return int(ends[-1]) + 1 if len(ends) else 0

    def with_needles(self, needles: Sequence[tuple[float, Sequence[int]]]) -> list[int]:
        """Return the text with needles (depth, ids) inserted, in order where depths coincide."""
        result: list[int] = []
        done = 0
        places = [(self.index_at(depth), ids) for depth, ids in needles]
        for index, needle in sorted(places, key=lambda pair: pair[0]):
            result += [*self.ids[done:index].tolist(), *needle]
            done = index
        return result + self.ids[done:].tolist()


def read_haystack(name: str, tokenizer: Tokenizer, tokens: int) -> Haystack:
    """Read at least the first `tokens` tokens of the texts of a name, see `read_texts`."""
    ids: list[int] = []
    numbers: set[str] = set()
    pieces = (
        piece
        for number, text in enumerate(read_texts(name))
        for piece in text_pieces("\n\n" + text if number else text)
    )
    for piece in pieces:
        ids += tokenizer.encode(piece, specials=False)
        for run in re.findall(r"\d{7,}", piece):
            numbers |= {run[i : i + 7] for i in range(len(run) - 6)}
        if len(ids) >= tokens:
            break
    array = np.array(ids, np.int64)
    return Haystack(array, _sentence_ends(array, tokenizer), frozenset(numbers))


def _sentence_ends(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Return which tokens end in a full stop; all of them if none does."""
    kinds, inverse = np.unique(ids, return_inverse=True)
    stops = [
        tokenizer.decode([int(kind)]).rstrip().rstrip(_CLOSING).endswith(".") for kind in kinds
    ]
    ends = np.array(stops, bool)[inverse] if len(kinds) else np.zeros(0, bool)
    return ends if ends.any() else np.ones(len(ids), bool)
