"""Check how the questions that a fake model writes are judged, stored, resumed and combined."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import tokenizers
from hypothesis import given
from tokenizers import models, pre_tokenizers

from lwm.core.errors import CapacityError, ConfigError, InputError
from lwm.curation.answer_checks import answer_fault, question_fault
from lwm.curation.book_questions import (
    ANSWER_TOKENS,
    QUESTION_TOKENS,
    QuestionConfig,
    QuestionSummary,
    chunks_file,
    write_questions,
)
from lwm.curation.long_chat import ChunkRecord, chat_examples, min_length, split_text
from lwm.data.text.templates import ORIGINAL, Message, render
from lwm.data.text.tokenizer import Tokenizer

NAMES = ("Ada", "Bea", "Cyd", "Dov", "Eli", "Fay", "Gil", "Hal", "Ida", "Jon")
BOOK = " ".join(
    f"In the year {year} the miller {NAMES[year % 10]} sold barrel {year} to the abbot."
    for year in range(1100, 1160)
)
CONFIG = QuestionConfig(chunk_tokens=60, tries=3)
LENGTH = 400


def make_tokenizer() -> Tokenizer:
    """Return a tokenizer with a token for each word and punctuation mark."""
    backend = tokenizers.Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return Tokenizer(backend=backend)


TOKENIZER = make_tokenizer()


class Killed(BaseException):
    """Stand for SIGKILL, which no handler may catch."""


class FakeWriter:
    """Ask and answer by a rule from the sentence at the end of the prompt.

    Args:
        change: changes the text, called with it and the number of the call.
        kill_at: number of the call at which the process dies.
    """

    source = "fake"
    tokenizer = TOKENIZER

    def __init__(
        self,
        change: Callable[[str, int], str] = lambda text, call: text,
        kill_at: int | None = None,
        context: int = 4096,
    ) -> None:
        self.config = SimpleNamespace(generation_length=context)
        self.calls, self.restarts = 0, 0
        self._change, self._kill_at = change, kill_at

    def restart(self, tokens: int) -> None:
        assert tokens <= self.config.generation_length
        self.restarts += 1

    def chat(self, messages: Sequence[Message], **settings: Any) -> str:
        self.calls += 1
        if self.calls - 1 == self._kill_at:
            raise Killed
        assert settings.keys() == {"max_tokens", "temperature", "seed", "stop"}
        assert [message["role"] for message in messages[:2]] == ["system", "user"]
        sentence = messages[-1]["content"].rpartition(": ")[2]
        year, name = sentence.split()[3], sentence.split()[6]
        if messages[-1]["content"].startswith("Answer"):
            text = f"The miller {name} sold barrel {year} to the abbot."
        else:
            text = f"What did the miller {name} do in the year {year}?"
        return self._change(text, self.calls - 1)


def write(
    writer: FakeWriter, file: Path, config: QuestionConfig = CONFIG, book: str = BOOK, **more: Any
) -> QuestionSummary:
    return write_questions(writer, book, file, config, **{"length": LENGTH, **more})


def tokens_of(example: dict[str, Any]) -> int:
    return len(
        TOKENIZER.encode_controlled(
            render(ORIGINAL, example["messages"], TOKENIZER), specials=True
        )
    )


@given(
    st.text("ab .!?\n“”é", min_size=1, max_size=200).filter(str.strip),
    st.integers(1, 20),
)
def test_splitting_preserves_the_text_and_bounds_chunks(text: str, size: int) -> None:
    chunks = split_text(text, TOKENIZER, size)
    assert "".join(chunks) == text
    assert all(chunks)
    # A chunk that begins or ends within a token counts that token too.
    assert all(len(TOKENIZER.encode(chunk)) <= size + 2 for chunk in chunks)


def test_chunks_end_with_sentences_where_possible() -> None:
    chunks = split_text(BOOK, TOKENIZER, 60)
    assert len(chunks) == 15  # four sentences of 14 tokens each, where five have 70
    assert all(chunk.rstrip().endswith(".") for chunk in chunks)
    words = "word " * 50
    assert {len(chunk) for chunk in split_text(words, TOKENIZER, 10)} == {50}


def test_examples_are_conversations_about_one_document(tmp_path: Path) -> None:
    file = tmp_path / "qa.jsonl"
    summary = write(FakeWriter(), file)
    assert (summary.chunks, summary.written, summary.refused) == (15, 15, {})
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert summary.examples == len(lines) > 3
    documents, asked = [], []
    for example in lines:
        assert example.keys() == {"messages"}
        roles = [message["role"] for message in example["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert LENGTH * 0.7 < tokens_of(example) <= LENGTH or example is lines[-1]
        document, _, first = example["messages"][0]["content"].partition("\n\n")
        documents.append(document)
        questions = [first, *(turn["content"] for turn in example["messages"][2::2])]
        for question, answer in zip(questions, example["messages"][1::2], strict=True):
            year = question.rstrip("?").split()[-1]
            assert f"barrel {year} " in answer["content"]
            assert f"year {year} " in document
        asked += questions
    assert " ".join(documents) == BOOK
    assert len(set(asked)) == 15
    assert asked != sorted(asked, key=lambda question: question.split()[-1])


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_run_killed_anywhere_resumes_to_the_same_file(
    tmp_path: Path, temperature: float
) -> None:
    config = replace(CONFIG, temperature=temperature)

    def change(text: str, call: int) -> str:
        return "" if "Eli" in text or "3?" in text else text

    whole = tmp_path / "whole.jsonl"
    writer = FakeWriter(change)
    expected = write(writer, whole, config)
    assert expected.written > 0
    assert expected.refused["question empty"] > 0
    for kill_at in range(0, writer.calls, 3):
        file = tmp_path / f"{kill_at}.jsonl"
        with pytest.raises(Killed):
            write(FakeWriter(change, kill_at=kill_at), file, config)
        assert not file.exists()
        rest = FakeWriter(change)
        assert write(rest, file, config) == expected
        assert rest.restarts <= 15
        assert file.read_bytes() == whole.read_bytes()
        assert chunks_file(file).read_bytes() == chunks_file(whole).read_bytes()


def test_a_record_truncated_at_any_byte_is_written_again(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    write(FakeWriter(), whole, most_chunks=3)
    records = chunks_file(whole).read_bytes()
    for length in range(0, len(records), 17):
        file = tmp_path / f"{length}.jsonl"
        chunks_file(file).write_bytes(records[:length])
        write(FakeWriter(), file, most_chunks=3)
        assert chunks_file(file).read_bytes() == records
        assert file.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()


def test_more_chunks_and_other_lengths_reuse_the_journal(tmp_path: Path) -> None:
    file = tmp_path / "qa.jsonl"
    assert write(FakeWriter(), file, most_chunks=3).chunks == 3
    more = FakeWriter()
    assert write(more, file, most_chunks=5, length=300).chunks == 5
    assert more.restarts == 2
    assert write(FakeWriter(kill_at=0), file, most_chunks=4).chunks == 4


@pytest.mark.parametrize("change", ["temperature", "seed", "tries", "chunk_tokens", "book"])
def test_records_of_other_settings_or_another_book_are_refused(
    tmp_path: Path, change: str
) -> None:
    file = tmp_path / "qa.jsonl"
    write(FakeWriter(), file, most_chunks=2)
    records = chunks_file(file).read_bytes()
    if change == "book":
        config, book = CONFIG, BOOK.replace("abbot", "bishop")
    else:
        config, book = replace(CONFIG, **{change: getattr(CONFIG, change) + 1}), BOOK
    with pytest.raises(InputError, match="other settings or of another book"):
        write(FakeWriter(), file, config, book, length=600)
    assert chunks_file(file).read_bytes() == records
    chunks_file(file).write_bytes(b"no record\n" + records)
    with pytest.raises(InputError, match="line 1, is not valid JSON"):
        write(FakeWriter(), file)


SENTENCE = "And Ruth gleaned in the field of Boaz until even."
TEXT = f"There was a famine in the land. The corn was ripe. {SENTENCE} And Boaz slept."


@pytest.mark.parametrize(
    ("question", "fault"),
    [
        ("Where did Ruth glean?", None),
        ("", "question empty"),
        ("Ruth gleaned in the field of Boaz.", "question without '?'"),
        ("Where did Ruth glean and" + " glean" * 50 + "?", "question too long"),
        ("Did Ruth glean in the field or glean in the field or glean in the field?", "repeats"),
        ("What would you do in the field of Boaz?", "about the reader"),
        ("What does the passage say of Ruth?", "about the reader"),
        ("What was the name of the man?", "something else"),
        ("Where did Ruth and Naomi glean?", "something else"),
    ],
)
def test_unusable_questions_are_refused(question: str, fault: str | None) -> None:
    result = question_fault(question, SENTENCE, TEXT)
    assert (result is None) if fault is None else (result is not None and fault in result)


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("Ruth gleaned in the field of Boaz.", None),
        ("She gleaned in Boaz's field until even.", None),
        ("", "answer empty"),
        ("Where did Ruth glean?", "answer asks"),
        ("Ruth gleaned in the field of", "cut off"),
        ("In the field of Boaz and in the field of Boaz and in the field of Boaz.", "repeats"),
        ("Ruth gleaned.", "adds nothing"),
        ("Ruth gleaned in the vineyard of Nineveh.", "without support"),
        ("She gleaned where a famine was in the land.", "without support"),
    ],
)
def test_unusable_answers_are_refused(answer: str, fault: str | None) -> None:
    result = answer_fault(answer, "Where did Ruth glean?", TEXT)
    assert (result is None) if fault is None else (result is not None and fault in result)


def test_malformed_generations_are_retried_then_dropped_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "qa.jsonl"
    reports: list[tuple[ChunkRecord, int]] = []

    def change(text: str, call: int) -> str:
        return "Who carried Marta's bread to the inn?" if call == 0 else text

    def report(record: ChunkRecord, total: int) -> None:
        reports.append((record, total))

    summary = write(FakeWriter(change), file, most_chunks=2, report=report)
    assert summary == QuestionSummary(
        chunks=2, written=2, examples=1, refused={"prompt copied": 1}
    )
    assert [(record.chunk, total) for record, total in reports] == [(0, 2), (1, 2)]
    chunks_file(file).unlink()
    summary = write(
        FakeWriter(lambda text, call: text if call > 2 else "Well."), file, most_chunks=2
    )
    assert (summary.written, summary.refused) == (1, {"question without '?'": 3})
    assert "1 dropped" in str(summary)
    assert "question without '?' 3" in str(summary)
    (example,) = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    assert "1100" in example["messages"][0]["content"]  # a dropped chunk stays in the document
    assert len(example["messages"]) == 2


def test_the_same_question_is_not_asked_twice(tmp_path: Path) -> None:
    def shorten(text: str, call: int) -> str:
        return text.partition(" in the year")[0] + "?" * text.endswith("?")

    config = replace(CONFIG, tries=1)
    summary = write(FakeWriter(shorten), tmp_path / "qa.jsonl", config)
    assert summary.written <= len(NAMES)
    assert summary.refused["question asked before"] > 0


def test_documents_without_a_question_are_dropped() -> None:
    chunks = split_text(BOOK, TOKENIZER, 60)[:12]
    records = [ChunkRecord(chunk=number) for number in range(12)]
    assert list(chat_examples(chunks, records, TOKENIZER, length=LENGTH)) == []


def test_bad_settings_and_books_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "qa.jsonl"
    with pytest.raises(InputError, match="no text"):
        write(FakeWriter(), file, book=" \n")
    with pytest.raises(
        CapacityError, match="context of fake is 1,000; take chunk_tokens of at most"
    ):
        write(FakeWriter(context=1000), file, replace(CONFIG, chunk_tokens=500))
    with pytest.raises(CapacityError, match="longer context"):
        write(FakeWriter(context=100), file)
    least = min_length(TOKENIZER, 60 + QUESTION_TOKENS + ANSWER_TOKENS)
    with pytest.raises(ConfigError, match=f"at least {least}"):
        write(FakeWriter(), file, length=least - 1)
    with pytest.raises(InputError, match=r"fake wrote no usable question.*question empty"):
        write(FakeWriter(lambda text, call: ""), file, most_chunks=1)
    for setting in ("chunk_tokens", "tries"):
        with pytest.raises(ConfigError, match=f"{setting} is 0"):
            replace(CONFIG, **{setting: 0})
    with pytest.raises(ConfigError, match="temperature is nan"):
        replace(CONFIG, temperature=float("nan"))
    assert not file.exists()
