"""Check `lwm data qa`: a file of examples from a book, and mistakes a user can make."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from commands import Run

from lwm.cli.flags import LoadFlags
from lwm.data.text.templates import Message
from lwm.data.text.tokenizer import Tokenizer, read_tokenizer


class Parrot:
    source = "parrot"

    class config:
        max_sequence_length = generation_length = 8192

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def restart(self, tokens: int) -> None:
        pass

    def chat(self, messages: Sequence[Message], **settings: Any) -> str:
        asking, _, sentence = messages[-1]["content"].rpartition(": ")
        last = re.findall(r"[a-z]{4,}", sentence)[-1]
        return sentence if "Answer" in asking[-60:] else f"Where does {last} occur?"


@pytest.fixture
def parrot(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Parrot(read_tokenizer(tiny / "tokenizer.json"))
    monkeypatch.setattr(LoadFlags, "load", lambda self, name: model)


@pytest.mark.usefixtures("parrot")
def test_a_book_becomes_examples(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "ruth.jsonl"
    command = ("data", "qa", "parrot", "book:Ruth", "--out", out, "--chunk-tokens", 900)
    ran = run(*command, "--length", 3000, "--chunks", 4)
    assert (ran.code, ran.out.strip()) == (0, str(out))
    assert "chunk 4 of 4: " in ran.err
    assert re.search(r"4 chunks: \d with question and answer, \d dropped", ran.err)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert lines[0]["messages"][0]["content"].startswith("Now it came to pass")
    assert lines[0]["messages"][1]["role"] == "assistant"
    again = run(*command)
    assert (again.code, again.out) == (2, "")
    assert "exists; name another or remove it" in again.err
    out.unlink()
    other = run(*command, "--seed", 1)
    assert (other.code, other.out) == (2, "")
    assert "other settings or of another book" in other.err


def test_mistakes_are_reported_in_one_sentence(run: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "book.txt").write_text("Once upon a time. " * 50, encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    out, book = ("--out", tmp_path / "qa.jsonl"), tmp_path / "book.txt"
    for message, *arguments in (
        ("missing.txt cannot be read", tmp_path / "missing.txt", *out),
        ("empty.txt holds no text", tmp_path / "empty.txt", *out),
        ("no book 'Rut'", "book:Rut", *out),
        ("context of .* is 128; take a model of longer", book, *out),
        ("directory .*nowhere does not exist", book, "--out", tmp_path / "nowhere" / "qa.jsonl"),
        ("--chunks is 0", book, *out, "--chunks", 0),
        ("tries is 0", book, *out, "--tries", 0),
        ("chunk_tokens is 0", book, *out, "--chunk-tokens", 0),
        ("temperature is -1", book, *out, "--temperature", -1),
        ("seed is -1", book, *out, "--seed", -1),
    ):
        ran = run("data", "qa", tiny, *arguments)
        assert (ran.code, ran.out) == (2, "")
        assert re.fullmatch(r"lwm: [^\n]+\n", ran.err)
        assert re.search(message, ran.err)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("parrot")
def test_a_length_too_short_for_a_chunk(run: Run, tmp_path: Path) -> None:
    ran = run("data", "qa", "parrot", "book:Ruth", "--out", tmp_path / "o", "--length", 1000)
    assert ran.code == 2
    assert re.search("length is 1,000 tokens; a chunk of 1,000 .* at least 1,", ran.err)
