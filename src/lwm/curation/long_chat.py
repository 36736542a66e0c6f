"""Split a book into chunks, and combine chunks and their questions into long chat examples.

Source: LargeWorldModel (arXiv 2402.08268), section 3.3.
"""

import hashlib
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lwm.core.errors import InputError
from lwm.curation.answer_checks import sentence_ends, split_point
from lwm.data.text.long_texts import encode_parts
from lwm.data.text.templates import choose_template, render
from lwm.data.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ChunkRecord:
    """Hold the result for one chunk; a dropped chunk has no question and answer."""

    chunk: int  # number in the book, from 0
    question: str | None = None
    answer: str | None = None
    refused: tuple[str, ...] = ()  # the reason for each unused generation


def split_text(text: str, tokenizer: Tokenizer, size: int) -> list[str]:
    """Split a text into chunks, at the ends of sentences or words where possible.

    Args:
        size: maximum tokens of a chunk; one that divides a token may have one or two more.
    """
    if not text.strip():
        raise InputError("the book holds no text; name one that does")
    starts = [start for part in encode_parts(tokenizer.backend, text) for start in part.starts]
    ends = sentence_ends(text)
    chunks, begin = [], 0
    while begin < len(text):
        following = bisect_right(starts, begin - 1) + size
        limit = starts[following] if following < len(starts) else len(text)
        limit = max(limit, begin + 1)
        end = limit if limit == len(text) else split_point(text, ends, begin, limit)
        chunks.append(text[begin:end])
        begin = end
    return chunks


def message(role: str, content: str) -> dict[str, str]:
    """Return a message in OpenAI's format."""
    return {"role": role, "content": content}


def seed_of(*parts: object) -> int:
    """Derive a seed below 2^32 from any values, equal in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


class _Lengths:
    """Tokens that texts and turns take in the chat template of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        template = choose_template("auto", tokenizer)

        def overhead(pairs: int) -> int:
            messages = [message("user", ""), message("assistant", "")] * pairs
            return len(tokenizer.encode_controlled(render(template, messages, tokenizer)))

        self.pair = overhead(2) - overhead(1)
        self.opening = overhead(1) - self.pair

    def text(self, text: str) -> int:
        return len(self._tokenizer.encode(text, specials=False))

    def turns(self, record: ChunkRecord) -> int:
        if record.question is None or record.answer is None:
            return 0
        # 3 for the line breaks before the first question and the space before an answer.
        return self.pair + self.text(record.question) + self.text(record.answer) + 3


def min_length(tokenizer: Tokenizer, texts: int) -> int:
    """Return the tokens of an example that fits `texts`: a chunk, its question and answer."""
    lengths = _Lengths(tokenizer)
    return lengths.opening + lengths.pair + texts + 16


def chat_examples(
    chunks: Sequence[str],
    records: Sequence[ChunkRecord],
    tokenizer: Tokenizer,
    *,
    length: int,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Yield conversations about documents of neighboring chunks, in the form of `lwm chat`.

    The questions are shuffled: in the order of the book, the position of a question would reveal
    the position of its answer. Dropped chunks stay in the document; a document without questions
    is dropped.

    Args:
        length: maximum tokens of an example, chat template included.
    """
    lengths = _Lengths(tokenizer)
    groups: list[list[int]] = []
    total = 0
    for number, (chunk, record) in enumerate(zip(chunks, records, strict=True)):
        tokens = lengths.text(chunk) + lengths.turns(record)
        if not groups or total + tokens > length:
            groups.append([])
            total = lengths.opening
        groups[-1].append(number)
        total += tokens
    for group in groups:
        document = "".join(chunks[number] for number in group).strip()
        turns = [records[number] for number in group if records[number].question]
        random.Random(seed_of(seed, group[0])).shuffle(turns)
        messages = []
        for record in turns:
            assert record.question is not None
            assert record.answer is not None
            opening = "" if messages else f"{document}\n\n"
            messages.append(message("user", opening + record.question))
            messages.append(message("assistant", record.answer))
        if messages:
            yield {"messages": messages}
