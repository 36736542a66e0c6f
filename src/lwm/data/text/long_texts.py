"""Encode long texts in overlapping parts, with the tokens of the whole text.

A tokenizer holds some hundred bytes for each token that it returns, and a text without spaces may
be a single word to it, so a long text is never encoded at once.

Each part begins at a token of the part before, some text before that one's end. From a place in
the middle of their common text, the later part's tokens continue those of the earlier one; around
that place, both must have the same tokens. What a tokenizer does at the beginning and the end of a
text is far from it. Tokenizers split a text into words from left to right, so from a common end of
a word on they have the same words. Within a word that spans the common text, tokens of byte-pair
encoding depend only on their neighbors: a sequence of tokens is the encoding of its text if each
two neighbors are the encoding of theirs.
"""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import tokenizers

_PART, _OVERLAP = 1 << 16, 1 << 10  # characters
_AGREEING = 4  # tokens before the place, and after it, that both parts must have


class EncodedPart(NamedTuple):
    """Hold the encoding of a part of a text, and which of its tokens are the text's."""

    encoding: tokenizers.Encoding
    start: int  # of the part in the text, in characters
    tokens: slice

    @property
    def ids(self) -> list[int]:
        """Return the ids of the tokens."""
        return self.encoding.ids[self.tokens]

    @property
    def starts(self) -> list[int]:
        """Return where the tokens begin in the text, in characters."""
        return [self.start + start for start, _ in self.encoding.offsets[self.tokens]]


def encode_parts(
    backend: tokenizers.Tokenizer, text: str, *, size: int = _PART, overlap: int = _OVERLAP
) -> Iterator[EncodedPart]:
    """Yield the tokens of a text of any length, without special tokens around it.

    Args:
        size: of a part, in characters. Where two parts do not agree, both numbers are doubled.
        overlap: least common text of two parts, in characters.
    """

    def encode(start: int) -> tokenizers.Encoding:
        return backend.encode(text[start : start + size], add_special_tokens=False)

    start, first, earlier = 0, 0, encode(0)
    while start + size < len(text):
        begin = _token_start(earlier, size - overlap, size - overlap // 2)
        for offset in (begin, begin + 1):  # a space before every text replaces one in a run
            later = encode(start + offset)
            if place := _common_place(earlier, later, offset, size):
                break
        else:
            size, overlap = 2 * size, 2 * overlap
            earlier = encode(start)
            continue
        yield EncodedPart(earlier, start, slice(first, place[0]))
        start, first, earlier = start + offset, place[1], later
    yield EncodedPart(earlier, start, slice(first, None))


class _Token(NamedTuple):
    start: int
    end: int
    id: int
    begins_word: bool


def _tokens_between(
    encoding: tokenizers.Encoding, low: int, high: int
) -> tuple[int, list[_Token]]:
    """Return the tokens that begin at characters `low` up to `high`, and the first one's index."""

    def chars(index: int) -> tuple[int, int]:
        return encoding.token_to_chars(index) or (0, 0)

    first = bisect_left(range(len(encoding)), low, key=lambda index: chars(index)[0])
    tokens, ids = [], encoding.ids
    for index in range(first, len(ids)):
        start, end = chars(index)
        if start >= high:
            break
        word = encoding.token_to_word(index)
        before = encoding.token_to_word(index - 1) if index else None
        tokens.append(_Token(start, end, ids[index], word != before))
    return first, tokens


def _token_start(encoding: tokenizers.Encoding, low: int, high: int) -> int:
    """Return a character at which a token begins, if possible the first one of a word."""
    _, tokens = _tokens_between(encoding, low, high)
    starts = [after for before, after in pairwise(tokens) if low <= before.end <= after.start]
    words = (token.start for token in starts if token.begins_word)
    return next(words, starts[0].start if starts else low)


def _common_place(
    earlier: tokenizers.Encoding, later: tokenizers.Encoding, offset: int, size: int
) -> tuple[int, int] | None:
    """Return indices in both encodings from which they go on with the same tokens, if any.

    Args:
        offset: where the later part begins in the earlier one, in characters.
        size: of the earlier part, in characters.
    """
    index, ours = _tokens_between(earlier, offset, size)
    other, theirs = _tokens_between(later, 0, size - offset)
    moved = [
        token._replace(start=token.start + offset, end=token.end + offset) for token in theirs
    ]
    at = {token.start: number for number, token in reversed(list(enumerate(moved)))}
    margin = (size - offset) // 4
    places = [
        (not ours[i].begins_word, abs(ours[i].start - (offset + size) // 2), i, j)
        for i in range(_AGREEING, len(ours) - _AGREEING)
        if offset + margin <= ours[i].start < size - margin
        and ours[i - 1].start < ours[i].start
        and (j := at.get(ours[i].start, 0)) >= _AGREEING
        and ours[i - _AGREEING : i + _AGREEING] == moved[j - _AGREEING : j + _AGREEING]
    ]
    if not places:
        return None
    _, _, i, j = min(places)
    return index + i, other + j
