"""Questions and answers that a model writes about a book, and long chat examples made of them.

A book is cut into chunks that fit a short context. For each chunk the model writes a question,
then its answer; what is malformed or has no support in the chunk is tried again and at last
dropped. Neighbouring chunks then become one long document, with the questions about them as turns
of a conversation: examples from which a model of long context learns to answer about all of it
(LargeWorldModel, arXiv 2402.08268, section 3.3).

What the model wrote is kept chunk by chunk in a file of its own, from which a rerun goes on. Knows
a model by `Writer` alone; knows nothing of devices.
"""

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lwm.core.errors import CapacityError, ConfigError, InputError
from lwm.curation.answer_checks import (
    SUPPORT,
    WORD,
    answer_fault,
    content,
    names,
    question_fault,
    sentences,
)
from lwm.curation.long_chat import ChunkRecord, cut, examples, least_length, seed_of, turn
from lwm.data.text.templates import Message, choose_template, render
from lwm.data.text.tokenizer import Tokenizer

QUESTION_TOKENS, ANSWER_TOKENS = 48, 64
# Of a sentence that a question is asked about; a weak model loses itself in longer ones.
FOCUS_WORDS, EASY_WORDS, FOCUS_TOKENS = 6, 30, 96

SYSTEM = "You write questions about passages of a book and answer them from the passage."
QUESTION = "Write a question that this sentence answers: {sentence}"
ANSWER = "Answer the question in one sentence. The answer stands here: {sentence}"


@dataclass(frozen=True)
class _Shown:
    """A question worked out before the model's eyes."""

    sentence: str
    question: str
    answer: str


# A weak model writes nothing usable from instructions alone, and does from these. One speaks in
# the manner of old books.
_SHOWN: tuple[tuple[str, tuple[_Shown, ...]], ...] = (
    (
        "The bakery in Elm Street opened in the spring. Old Marta baked the bread before sunrise, "
        "and her nephew Tom carried it to the inn. In June the oven broke, and for nine days "
        "there was no bread. A smith from Harrow mended it.",
        (
            _Shown(
                "Old Marta baked the bread before sunrise, and her nephew Tom carried it to the "
                "inn.",
                "Who carried Marta's bread to the inn?",
                "Her nephew Tom carried the bread to the inn.",
            ),
            _Shown(
                "In June the oven broke, and for nine days there was no bread.",
                "Why was there no bread for nine days in June?",
                "There was no bread because the oven broke.",
            ),
        ),
    ),
    (
        "When the river rose, the ferryman Anselm moved his goats to the chapel hill. And he said "
        "to Lena, Fear not, for the water shall go down. On the fourth day a boat came from "
        "Ostra, and the soldiers gave them flour and salt.",
        (
            _Shown(
                "When the river rose, the ferryman Anselm moved his goats to the chapel hill.",
                "Where did the ferryman Anselm take his goats when the river rose?",
                "Anselm took his goats to the chapel hill.",
            ),
            _Shown(
                "And he said to Lena, Fear not, for the water shall go down.",
                "What did Anselm say to Lena about the water?",
                "Anselm told Lena that the water would go down.",
            ),
        ),
    ),
)


@runtime_checkable
class Writer(Protocol):
    """What a model must be able to do to write questions; `lwm.generation.model.Model` is one."""

    source: str

    @property
    def config(self) -> Any: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    def restart(self, tokens: int) -> None: ...

    def chat(self, messages: Sequence[Message], **settings: Any) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class QuestionConfig:
    """How questions are asked.

    Args:
        chunk_tokens: longest chunk.
        tries: times that a question and its answer are written anew before a chunk is dropped.
        temperature: of the model; at 0, tries differ by the sentence asked about alone.
        seed: the same one gives the same questions.
    """

    chunk_tokens: int = 1000
    tries: int = 8
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("chunk_tokens", 1), ("tries", 1), ("temperature", 0), ("seed", 0)):
            if not getattr(self, name) >= least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class QuestionSummary:
    """What came of a book, for people to read."""

    chunks: int
    written: int
    examples: int
    refused: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        text = (
            f"{self.chunks:,} chunks: {self.written:,} with question and answer, "
            f"{self.chunks - self.written:,} dropped; {self.examples:,} examples"
        )
        if self.refused:
            reasons = sorted(self.refused.items(), key=lambda item: (-item[1], item[0]))
            told = ", ".join(f"{reason} {count:,}" for reason, count in reasons)
            text += f"; generations refused {sum(self.refused.values()):,}: {told}"
        return text


def question_messages(chunk: str, sentence: str) -> list[dict[str, str]]:
    """The conversation in which the model asks about one sentence of a chunk.

    The chunk stands before what differs from try to try, so that it is read once.
    """
    messages = [turn("system", SYSTEM)]
    for passage, shown in _SHOWN:
        for number, one in enumerate(shown):
            ask = QUESTION.format(sentence=one.sentence)
            messages += [
                turn("user", ask if number else f"{passage}\n\n{ask}"),
                turn("assistant", one.question),
                turn("user", ANSWER.format(sentence=one.sentence)),
                turn("assistant", one.answer),
            ]
    return [*messages, turn("user", f"{chunk.strip()}\n\n{QUESTION.format(sentence=sentence)}")]


def answer_messages(asking: Sequence[Message], question: str, sentence: str) -> list[Message]:
    """The same conversation, gone on to the answer."""
    ask = ANSWER.format(sentence=sentence)
    return [*asking, turn("assistant", question), turn("user", ask)]


def _tidy(text: str) -> str:
    """A generation without the quotation marks round all of it."""
    text = text.strip()
    quoted = len(text) > 1 and text[0] in '"“' and text[-1] in '"”'
    return text[1:-1].strip() if quoted else text


def ask(
    writer: Writer, chunk: str, number: int, config: QuestionConfig, asked: set[str]
) -> ChunkRecord:
    """A question about a chunk and its answer, or a record of why there is none."""
    order = [
        line
        for line in sentences(chunk)
        if len(WORD.findall(line)) >= FOCUS_WORDS
        and len(writer.tokenizer.encode(line)) <= FOCUS_TOKENS
        and content(line)
    ]
    random.Random(seed_of(config.seed, number)).shuffle(order)
    # A question about a long document must name what it is about.
    order.sort(key=lambda line: not names(line) or len(WORD.findall(line)) > EASY_WORDS)
    if not order:
        return ChunkRecord(chunk=number, refused=("chunk without a sentence to ask about",))
    # At temperature 0 the same sentence would bring the same question again.
    tries = config.tries if config.temperature else min(config.tries, len(order))
    refused: list[str] = []
    for attempt in range(tries):
        how = {
            "stop": "\n",
            "temperature": config.temperature,
            "seed": seed_of(config.seed, number, attempt),
        }
        sentence = order[attempt % len(order)]
        asking = question_messages(chunk, sentence)
        text = _tidy(writer.chat(asking, max_tokens=QUESTION_TOKENS, **how))
        question = text[: text.find("?") + 1] or text
        fault = _misuse(question, asked) or question_fault(question, sentence, chunk)
        if fault is None:
            answering = answer_messages(asking, question, sentence)
            answer = _tidy(writer.chat(answering, max_tokens=ANSWER_TOKENS, **how))
            fault = _misuse(answer) or answer_fault(answer, question, chunk)
            if fault is None:
                return ChunkRecord(
                    chunk=number, question=question, answer=answer, refused=tuple(refused)
                )
        refused.append(fault)
    return ChunkRecord(chunk=number, refused=tuple(refused))


_PROMPTS = tuple(
    text.lower()
    for text in (
        SYSTEM, *(text.partition("{")[0].strip() for text in (QUESTION, ANSWER)),
        *(part for _, shown in _SHOWN for one in shown for part in (one.question, one.answer)),
    )
)  # fmt: skip


def _misuse(text: str, asked: Container[str] = ()) -> str | None:
    """Whether a generation was taken from the prompt, or asked of an earlier chunk."""
    if any(prompt in text.lower() for prompt in _PROMPTS):
        return "prompt copied"
    return "question asked before" if text.lower() in asked else None


def needed_context(tokenizer: Tokenizer, chunk_tokens: int) -> int:
    """Tokens of the longest conversation that `ask` leads about a chunk."""
    messages = answer_messages(question_messages("", ""), "", "")
    prompt = render(choose_template("auto", tokenizer), messages, tokenizer)
    around = len(tokenizer.encode(prompt, specials=False))
    # A few for tokens that are written otherwise where texts meet.
    return around + chunk_tokens + 2 * FOCUS_TOKENS + QUESTION_TOKENS + ANSWER_TOKENS + 16


def fingerprint(writer: Writer, config: QuestionConfig, chunk: str) -> str:
    """Tells whether a record was made of this chunk, by this model, with these settings."""
    shown = (SYSTEM, QUESTION, ANSWER, _SHOWN, SUPPORT, writer.source, config, chunk)
    return hashlib.sha256(repr(shown).encode()).hexdigest()[:16]


class Records:
    """The file in which records are kept, a line a chunk in the order of the book.

    A line that a killed process left half written is forgotten.

    Args:
        prints: fingerprint of each chunk, which a line must bear.
    """

    def __init__(self, file: Path, prints: Sequence[str]) -> None:
        self._file, self._prints = file, prints
        self._done = 0

    def read(self) -> list[ChunkRecord]:
        """Records of the chunks that are done.

        Raises:
            InputError: the file was made with other settings, of another book, or is broken.
        """
        data = self._file.read_bytes() if self._file.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        records = [self._parse(number, line) for number, line in enumerate(whole.splitlines())]
        if len(whole) < len(data):
            os.truncate(self._file, len(whole))
        self._done = len(records)
        return records

    def _parse(self, number: int, line: bytes) -> ChunkRecord:
        try:
            value = json.loads(line)
            print_ = value.pop("fingerprint")
            record = ChunkRecord(**{**value, "refused": tuple(value["refused"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{self._file}, line {number + 1}, is no record of a chunk; remove the file to "
                "start anew"
            ) from error
        # What lies beyond the chunks that are wanted now cannot be told from another book's.
        if number < len(self._prints) and (record.chunk, print_) != (number, self._prints[number]):
            raise InputError(
                f"{self._file} was made with other settings or of another book; go on with those, "
                "or remove it to start anew"
            )
        return record

    def append(self, record: ChunkRecord) -> None:
        """Keeps the record of the next chunk; it is on the disk when this returns."""
        assert record.chunk == self._done
        value = {"fingerprint": self._prints[record.chunk], **vars(record)}
        with self._file.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(value, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._done += 1


def write_questions(
    writer: Writer,
    book: str,
    destination: Path,
    config: QuestionConfig,
    *,
    length: int = 8000,
    most_chunks: int | None = None,
    report: Callable[[ChunkRecord, int], Any] = lambda record, total: None,
) -> QuestionSummary:
    """Writes long chat examples about a book, JSON lines with the key `messages`.

    Interrupted and called again, it goes on behind the last finished chunk, and what it writes is
    what it would have written at once. What the model wrote stays in `chunks_file(destination)`.

    Args:
        length: most tokens of an example.
        most_chunks: only the first so many of the book; all if None.
        report: told of each record as it is made, and how many chunks there are.

    Raises:
        InputError: the book is empty, records do not fit, or no chunk got a question.
        ConfigError: `length` is too small for a chunk.
        CapacityError: a chunk is too long for the model.
    """
    tokenizer = writer.tokenizer
    context, limit = needed_context(tokenizer, config.chunk_tokens), writer.config
    if context > limit.max_sequence_length:
        most = config.chunk_tokens - (context - limit.max_sequence_length)
        remedy = (
            f"take chunk_tokens of at most {most:,}"
            if most > 0
            else "take a model of longer context"
        )
        raise CapacityError(
            f"a chunk of {config.chunk_tokens:,} tokens takes {context:,} with what is told and "
            f"asked about it, and the context of {writer.source} is "
            f"{limit.max_sequence_length:,}; {remedy}"
        )
    least = least_length(tokenizer, config.chunk_tokens + QUESTION_TOKENS + ANSWER_TOKENS)
    if length < least:
        raise ConfigError(
            f"the length is {length:,} tokens; a chunk of {config.chunk_tokens:,} with its "
            f"question and answer needs at least {least:,}"
        )
    chunks = cut(book, tokenizer, config.chunk_tokens)[:most_chunks]
    kept = Records(
        chunks_file(destination), [fingerprint(writer, config, chunk) for chunk in chunks]
    )
    records = kept.read()[: len(chunks)]
    for number in range(len(records), len(chunks)):
        # Each chunk starts from the same state, whether or not others came before it.
        writer.restart(context)
        asked = {record.question.lower() for record in records if record.question}
        record = ask(writer, chunks[number], number, config, asked)
        kept.append(record)
        records.append(record)
        report(record, len(chunks))
    written = sum(record.question is not None for record in records)
    refused = Counter(reason for record in records for reason in record.refused)
    if not written:
        raise InputError(
            f"{writer.source} wrote no usable question about {len(chunks):,} chunks "
            f"({', '.join(f'{reason} {count}' for reason, count in refused.most_common(3))}); "
            "take a stronger model or more tries"
        )
    lines = [
        json.dumps(example, ensure_ascii=False)
        for example in examples(chunks, records, tokenizer, length=length, seed=config.seed)
    ]
    partial = destination.with_name(f".{destination.name}.partial")
    try:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
        partial.replace(destination)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()
    return QuestionSummary(
        chunks=len(chunks), written=written, examples=len(lines), refused=refused
    )


def chunks_file(destination: Path) -> Path:
    """Where the records of a destination lie."""
    return destination.with_name(f"{destination.name}.chunks.jsonl")
