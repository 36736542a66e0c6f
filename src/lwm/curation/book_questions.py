"""Write questions and answers about a book with a model, as long chat examples.

A book is split into chunks that fit a short context. For each chunk the model writes a question
and an answer; malformed or unsupported ones are retried, and the chunk is dropped in the end.
Neighboring chunks then become one long document, with their questions as turns of a conversation
(LargeWorldModel, arXiv 2402.08268, section 3.3).

A journal records the result of each chunk, so that an interrupted run resumes.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

from annotated_types import Ge

from lwm.core.config import Checked
from lwm.core.errors import CapacityError, ConfigError, InputError
from lwm.core.files import new_file
from lwm.core.journal import append, discard_incomplete, read_journal
from lwm.curation.answer_checks import (
    SUPPORT,
    WORD,
    answer_fault,
    content_stems,
    name_stems,
    question_fault,
    sentences,
)
from lwm.curation.long_chat import (
    ChunkRecord,
    chat_examples,
    message,
    min_length,
    seed_of,
    split_text,
)
from lwm.data.text.templates import Message, choose_template, render
from lwm.data.text.tokenizer import Tokenizer

QUESTION_TOKENS, ANSWER_TOKENS = 48, 64
# Limits of a sentence to ask about; a weak model fails with longer ones.
_MIN_WORDS, _EASY_WORDS, _SENTENCE_TOKENS = 6, 30, 96

_SYSTEM = "You write questions about passages of a book and answer them from the passage."
_QUESTION = "Write a question that this sentence answers: {sentence}"
_ANSWER = "Answer the question in one sentence. The answer stands here: {sentence}"

# Passages, and for each some sentences with a question and its answer. A weak model writes nothing
# usable from instructions only, but does from these; one passage has the style of old books.
_EXAMPLES = tuple(
    (passage, tuple(map(tuple, examples)))
    for passage, examples in json.loads(
        files("lwm.curation").joinpath("question_examples.json").read_text(encoding="utf-8")
    )
)

# Texts that a generation must not copy.
_PROMPT_TEXTS = tuple(
    text.lower()
    for text in (
        _SYSTEM,
        *(text.partition("{")[0].strip() for text in (_QUESTION, _ANSWER)),
        *(text for _, examples in _EXAMPLES for one in examples for text in one[1:]),
    )
)


@runtime_checkable
class Writer(Protocol):
    """Describe a model that writes questions, such as `lwm.generation.model.Model`."""

    source: str

    @property
    def config(self) -> Any: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    def restart(self, tokens: int) -> None: ...

    def chat(self, messages: Sequence[Message], **settings: Any) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class QuestionConfig(Checked):
    """Configure how a model writes questions; at temperature 0, tries differ in the sentence."""

    chunk_tokens: Annotated[int, Ge(1)] = 1000
    tries: Annotated[int, Ge(1)] = 8
    temperature: Annotated[float, Ge(0)] = 0.0
    seed: Annotated[int, Ge(0)] = 0


@dataclass(frozen=True, kw_only=True)
class QuestionSummary:
    """Count the chunks of a book, those with a question, the examples, and the refusals."""

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
            counts = ", ".join(f"{reason} {count:,}" for reason, count in reasons)
            text += f"; generations refused {sum(self.refused.values()):,}: {counts}"
        return text


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
    """Write long chat examples about a book, as JSON lines with the key `messages`.

    An interrupted call resumes after the last complete chunk and writes the same file. The journal
    `chunks_file(destination)` remains.

    Args:
        length: maximum length of an example in tokens.
        most_chunks: number of chunks to use, from the start of the book; None uses all.
        report: called with each new record and the number of chunks.
    """
    tokenizer = writer.tokenizer
    context = _require_context(writer, config.chunk_tokens)
    minimum = min_length(tokenizer, config.chunk_tokens + QUESTION_TOKENS + ANSWER_TOKENS)
    if length < minimum:
        raise ConfigError(
            f"the length is {length:,} tokens; a chunk of {config.chunk_tokens:,} with its "
            f"question and answer needs at least {minimum:,}"
        )
    chunks = split_text(book, tokenizer, config.chunk_tokens)[:most_chunks]
    records = _write_records(writer, chunks, context, chunks_file(destination), config, report)
    written = sum(record.question is not None for record in records)
    refused = Counter(reason for record in records for reason in record.refused)
    if not written:
        reasons = ", ".join(f"{reason} {count}" for reason, count in refused.most_common(3))
        raise InputError(
            f"{writer.source} wrote no usable question about {len(chunks):,} chunks ({reasons}); "
            "take a stronger model or more tries"
        )
    examples = list(chat_examples(chunks, records, tokenizer, length=length, seed=config.seed))
    with (
        new_file(destination, replace=True) as partial,
        partial.open("w", encoding="utf-8", newline="\n") as file,
    ):
        file.writelines(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
    return QuestionSummary(
        chunks=len(chunks), written=written, examples=len(examples), refused=refused
    )


def _write_records(
    writer: Writer,
    chunks: Sequence[str],
    context: int,
    journal: Path,
    config: QuestionConfig,
    report: Callable[[ChunkRecord, int], Any],
) -> list[ChunkRecord]:
    """Read the records of the journal, and append those of the other chunks."""
    fingerprints = [_fingerprint(writer, config, chunk) for chunk in chunks]
    records = _read_records(journal, fingerprints)
    for number in range(len(records), len(chunks)):
        # Each chunk starts from the same state, whether or not the run was interrupted before it.
        writer.restart(context)
        asked = {record.question.lower() for record in records if record.question}
        record = _ask(writer, chunks[number], number, config, asked)
        append(journal, {"fingerprint": fingerprints[number], **asdict(record)})
        records.append(record)
        report(record, len(chunks))
    return records


def chunks_file(destination: Path) -> Path:
    """Return the path of the journal for a destination."""
    return destination.with_name(f"{destination.name}.chunks.jsonl")


def _require_context(writer: Writer, chunk_tokens: int) -> int:
    """Return the tokens of the longest conversation about a chunk, which the model must have."""
    messages = _answer_messages(_question_messages("", ""), "", "")
    tokenizer = writer.tokenizer
    prompt = render(choose_template("auto", tokenizer), messages, tokenizer)
    context = len(tokenizer.encode_controlled(prompt)) + chunk_tokens
    # Where texts meet, tokens may be split differently; 16 covers these.
    context += 2 * _SENTENCE_TOKENS + QUESTION_TOKENS + ANSWER_TOKENS + 16
    limit = writer.config.generation_length
    if context <= limit:
        return context
    fitting = chunk_tokens - (context - limit)
    smaller = f"take chunk_tokens of at most {fitting:,}"
    raise CapacityError(
        f"a chunk of {chunk_tokens:,} tokens needs {context:,} with its prompt, question and "
        f"answer, and the context of {writer.source} is {limit:,}; "
        f"{smaller if fitting > 0 else 'take a model of longer context'}"
    )


def _ask(
    writer: Writer, chunk: str, number: int, config: QuestionConfig, asked: set[str]
) -> ChunkRecord:
    """Write a question about a chunk and its answer, or record why there is none."""
    order = [
        line
        for line in sentences(chunk)
        if len(WORD.findall(line)) >= _MIN_WORDS
        and len(writer.tokenizer.encode(line)) <= _SENTENCE_TOKENS
        and content_stems(line)
    ]
    if not order:
        return ChunkRecord(chunk=number, refused=("chunk without a sentence to ask about",))
    random.Random(seed_of(config.seed, number)).shuffle(order)
    # A question about a long document must name its subject.
    order.sort(key=lambda line: not name_stems(line) or len(WORD.findall(line)) > _EASY_WORDS)
    # At temperature 0 the same sentence would result in the same question.
    tries = config.tries if config.temperature else min(config.tries, len(order))
    refused: list[str] = []
    for attempt in range(tries):
        seed = seed_of(config.seed, number, attempt)
        settings = {"stop": "\n", "temperature": config.temperature, "seed": seed}
        sentence = order[attempt % len(order)]
        asking = _question_messages(chunk, sentence)
        text = _unquoted(writer.chat(asking, max_tokens=QUESTION_TOKENS, **settings))
        question = text[: text.find("?") + 1] or text
        fault = _copied_fault(question, asked) or question_fault(question, sentence, chunk)
        if fault is None:
            answering = _answer_messages(asking, question, sentence)
            answer = _unquoted(writer.chat(answering, max_tokens=ANSWER_TOKENS, **settings))
            fault = _copied_fault(answer) or answer_fault(answer, question, chunk)
            if fault is None:
                return ChunkRecord(
                    chunk=number, question=question, answer=answer, refused=tuple(refused)
                )
        refused.append(fault)
    return ChunkRecord(chunk=number, refused=tuple(refused))


def _unquoted(text: str) -> str:
    text = text.strip()
    quoted = len(text) > 1 and text[0] in '"“' and text[-1] in '"”'
    return text[1:-1].strip() if quoted else text


def _fingerprint(writer: Writer, config: QuestionConfig, chunk: str) -> str:
    """Identify everything that the record of a chunk depends on."""
    prompts = (_SYSTEM, _QUESTION, _ANSWER, _EXAMPLES, SUPPORT)
    text = repr((*prompts, writer.source, config, chunk))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class _JournalLine(ChunkRecord):
    """Hold the record of a chunk, and what it depends on."""

    fingerprint: str


def _read_records(journal: Path, fingerprints: Sequence[str]) -> list[ChunkRecord]:
    """Read the records of the first chunks, and refuse records of another run."""
    discard_incomplete(journal)
    records: list[ChunkRecord] = []
    # Further lines belong to chunks that this run does not use, and cannot be checked.
    lines = read_journal(journal, _JournalLine)
    for (_, record), fingerprint in zip(lines, fingerprints, strict=False):
        whole = (record.question is None) == (record.answer is None)
        if not whole or (record.chunk, record.fingerprint) != (len(records), fingerprint):
            raise InputError(
                f"{journal} was made with other settings or of another book; continue with those, "
                "or remove it to start again"
            )
        records.append(record)
    return records


def _question_messages(chunk: str, sentence: str) -> list[dict[str, str]]:
    """Build the conversation in which a model writes a question about a sentence of a chunk.

    The chunk comes before the parts that differ between tries, so that it is prefilled once.
    """
    messages = [message("system", _SYSTEM)]
    for passage, examples in _EXAMPLES:
        for number, (example_sentence, question, answer) in enumerate(examples):
            request = _QUESTION.format(sentence=example_sentence)
            messages += [
                message("user", request if number else f"{passage}\n\n{request}"),
                message("assistant", question),
                message("user", _ANSWER.format(sentence=example_sentence)),
                message("assistant", answer),
            ]
    request = _QUESTION.format(sentence=sentence)
    return [*messages, message("user", f"{chunk.strip()}\n\n{request}")]


def _answer_messages(asking: Sequence[Message], question: str, sentence: str) -> list[Message]:
    """Continue the conversation with the request for an answer."""
    request = _ANSWER.format(sentence=sentence)
    return [*asking, message("assistant", question), message("user", request)]


def _copied_fault(text: str, asked: Container[str] = ()) -> str | None:
    """Return a fault if a generation copies the prompt or one of the `asked` questions."""
    if any(prompt in text.lower() for prompt in _PROMPT_TEXTS):
        return "prompt copied"
    return "question asked before" if text.lower() in asked else None
