"""A book and the questions about it as long chat examples.

Cuts a text into chunks, and puts neighbouring chunks together again as the document of a
conversation whose turns are the questions about them (LargeWorldModel, arXiv 2402.08268, section
3.3). Knows nothing of who asked them.
"""

import hashlib
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lwm.core.errors import InputError
from lwm.curation.answer_checks import end_within, sentence_ends
from lwm.data.text.templates import choose_template, render
from lwm.data.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ChunkRecord:
    """What came of one chunk; without question and answer it was dropped.

    Args:
        chunk: its place in the book, from 0.
        refused: why generations for it were not used, a reason for each.
    """

    chunk: int
    question: str | None = None
    answer: str | None = None
    refused: tuple[str, ...] = ()


def cut(text: str, tokenizer: Tokenizer, size: int) -> list[str]:
    """Chunks of a text, in order; joined they are the text again.

    A chunk ends with a sentence where one ends in its second half, else with a word, else
    anywhere.

    Args:
        size: most tokens of a chunk; where a chunk parts a token, it may count one or two more.

    Raises:
        InputError: the text is empty.
    """
    if not text.strip():
        raise InputError("the book holds no text; name one that does")
    starts = [
        start for start, _ in tokenizer.backend.encode(text, add_special_tokens=False).offsets
    ]
    ends = sentence_ends(text)
    chunks, begin = [], 0
    while begin < len(text):
        following = bisect_right(starts, begin - 1) + size
        limit = starts[following] if following < len(starts) else len(text)
        limit = max(limit, begin + 1)
        end = limit if limit == len(text) else end_within(text, ends, begin, limit)
        chunks.append(text[begin:end])
        begin = end
    return chunks


def turn(role: str, content: str) -> dict[str, str]:
    """A message in OpenAI's shape."""
    return {"role": role, "content": content}


def seed_of(*parts: object) -> int:
    """A seed from anything, below 2^32 and the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


class _Sizes:
    """Tokens that texts and turns take in a conversation of a tokenizer's own template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        template = choose_template("auto", tokenizer)

        def marks(pairs: int) -> int:
            messages = [turn("user", ""), turn("assistant", "")] * pairs
            return len(tokenizer.encode(render(template, messages, tokenizer), specials=False))

        self.pair = marks(2) - marks(1)
        self.opening = marks(1) - self.pair

    def text(self, text: str) -> int:
        return len(self._tokenizer.encode(text, specials=False))

    def turns(self, record: ChunkRecord) -> int:
        if record.question is None or record.answer is None:
            return 0
        # The line breaks before the first question, and the space before an answer.
        return self.pair + self.text(record.question) + self.text(record.answer) + 3


def least_length(tokenizer: Tokenizer, texts: int) -> int:
    """Tokens of an example that always holds a chunk, its question and its answer.

    Args:
        texts: most tokens of these three.
    """
    sizes = _Sizes(tokenizer)
    return sizes.opening + sizes.pair + texts + 16


def examples(
    chunks: Sequence[str],
    records: Sequence[ChunkRecord],
    tokenizer: Tokenizer,
    *,
    length: int,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Long chat examples: neighbouring chunks as one document before the first question, all
    questions about them as turns.

    A document stands before its question as `lwm chat --document` puts it. The questions come in
    an order drawn by `seed`: in the book's order, the place of a question would give away the
    place of its answer. Dropped chunks stay in the document; a document without a question is
    left out.

    Args:
        length: most tokens of an example, the marks of the tokenizer's chat template included.
    """
    sizes = _Sizes(tokenizer)
    groups: list[list[int]] = []
    total = 0
    for number, (chunk, record) in enumerate(zip(chunks, records, strict=True)):
        tokens = sizes.text(chunk) + sizes.turns(record)
        if not groups or total + tokens > length:
            groups.append([])
            total = sizes.opening
        groups[-1].append(number)
        total += tokens
    for group in groups:
        document = "".join(chunks[number] for number in group).strip()
        turns = [records[n] for n in group if records[n].question is not None]
        random.Random(seed_of(seed, group[0])).shuffle(turns)
        messages = []
        for record in turns:
            assert record.question is not None
            assert record.answer is not None
            opening = "" if messages else f"{document}\n\n"
            messages.append(turn("user", opening + record.question))
            messages.append(turn("assistant", record.answer))
        if messages:
            yield {"messages": messages}
