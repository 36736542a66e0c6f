"""Check `tokenizer.model` files and the vocabularies of GGUF files against sentencepiece, with
models trained here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from lwm.core.errors import CheckpointError
from lwm.core.vocabulary import Piece, Vocabulary
from lwm.data.text.tokenizer import Tokenizer, from_vocabulary, read_tokenizer

SENTENCES = [
    "It was the best of times, it was the worst of times, it was the age of wisdom.",
    "She sells sea shells by the sea shore; the shells she sells are sea shells I'm sure.",
    "How much wood would a woodchuck chuck if a woodchuck could chuck wood?",
    "In 1984 and 2024 there were 12345 or 67890 dollars, 100% of 3.14159.",
    "Der Fluß fließt über grüne Wiesen; naïve café, привет мир, 東京.",
    "Call me Ishmael. Some years ago, never mind how long precisely, I went to sea.",
    "    def f(x):  return x ** 2",
]
TEXTS = [
    *SENTENCES,
    "",
    "a",
    "the sea",
    " leading and trailing ",
    "two  spaces   three",
    "unseen: žluťoučký 🙂👍🏽 ½",
    "line\nbreak\ttab",
]


@dataclass(frozen=True)
class Pair:
    """Hold the processor of sentencepiece and our tokenizer from the same file."""

    theirs: sentencepiece.SentencePieceProcessor
    ours: Tokenizer

    def agree(self, text: str) -> None:
        expected = self.theirs.encode(text)
        assert self.ours.encode(text, specials=False) == expected
        assert self.ours.decode(expected) == self.theirs.decode(expected)


def train(directory: Path, **settings: Any) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_prefix=str(directory / "tokenizer"),
        character_coverage=1.0,
        minloglevel=9,
        **settings,
    )
    return directory / "tokenizer.model"


# Llama 2's settings; without a space before the text; sentencepiece's defaults with unigram.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
    },
    "no prefix": {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
    "unigram": {"model_type": "unigram", "vocab_size": 360, "byte_fallback": True},
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    file = train(tmp_path_factory.mktemp("trained"), **KINDS[request.param])
    return Pair(
        sentencepiece.SentencePieceProcessor(model_file=str(file)), read_tokenizer(file.parent)
    )


def test_ids_and_texts_match_sentencepiece(pair: Pair) -> None:
    for text in TEXTS:
        pair.agree(text)
    assert pair.ours.vocab_size == pair.theirs.vocab_size()


@given(
    text=st.text(st.sampled_from("abcdefghiklmnorstuw SW.,;I'19éß東🙂\n"), max_size=40)
    | st.text(max_size=20).filter(lambda text: "▁" not in text and "\0" not in text)
)
@settings(max_examples=80, deadline=None)
def test_any_text_under_llamas_rules(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    directory = tmp_path_factory.getbasetemp() / "any_text"
    if not directory.exists():
        directory.mkdir()
        train(directory, **KINDS["llama"])
    file = directory / "tokenizer.model"
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ours = read_tokenizer(file)
    assert ours.encode(text, specials=False) == theirs.encode(text)
    assert "".join(ours.decode_stream(iter(theirs.encode(text)))).strip() == text.strip()


def test_beginning_and_end(pair: Pair) -> None:
    assert pair.ours.bos == pair.theirs.id_to_piece(pair.theirs.bos_id()) == "<s>"
    assert pair.ours.eos == (pair.theirs.eos_id(),)
    text = "the sea"
    assert pair.ours.encode(text) == pair.theirs.encode(text, add_bos=True)


def test_the_vocabulary_of_a_gguf_file_is_the_same_tokenizer(tmp_path: Path) -> None:
    """Check tokens, scores and types as llama.cpp's converter writes them."""
    file = train(tmp_path, **KINDS["llama"])
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))

    def kind(i: int) -> int:
        tests = (theirs.is_unknown, theirs.is_control, theirs.is_unused, theirs.is_byte)
        for code, test in zip((2, 3, 5, 6), tests, strict=True):
            if test(i):
                return code
        return 1

    pieces = tuple(
        Piece(theirs.id_to_piece(i), theirs.get_score(i), kind(i))
        for i in range(theirs.vocab_size())
    )
    ours = from_vocabulary(Vocabulary(method="pieces", pieces=pieces, bos=1, eos=2))
    for text in TEXTS:
        Pair(theirs, ours).agree(text)


def test_a_saved_tokenizer_reads_back_the_same(pair: Pair, tmp_path: Path) -> None:
    pair.ours.save(tmp_path)
    again = read_tokenizer(tmp_path)
    assert (again.bos, again.eos) == (pair.ours.bos, pair.ours.eos)
    for text in TEXTS:
        assert again.encode(text) == pair.ours.encode(text)


def test_a_file_beats_a_directory_that_holds_both(pair: Pair, tmp_path: Path) -> None:
    pair.ours.save(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"junk")
    assert read_tokenizer(tmp_path).vocab_size == pair.ours.vocab_size
    with pytest.raises(CheckpointError, match=r"tokenizer.model"):
        read_tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("content", [b"", b"junk", b"\x0a\xff\xff\xff\xff\x0f", b"{}"])
def test_files_that_are_not_models_are_refused(tmp_path: Path, content: bytes) -> None:
    for name in ("tokenizer.model", "tokenizer.json"):
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=name) as raised:
            read_tokenizer(file)
        assert "\n" not in str(raised.value)


def test_character_models_and_truncated_files_are_refused(tmp_path: Path) -> None:
    file = train(tmp_path, model_type="char", vocab_size=70)
    with pytest.raises(CheckpointError, match="not a sentencepiece model of kind BPE or unigram"):
        read_tokenizer(file)
    whole = train(tmp_path, **KINDS["llama"]).read_bytes()
    middle = len(whole) // 2
    for length in range(middle, middle + 30):  # between two pieces as well as inside one
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"tokenizer.model is not a sentencepiece model"):
            read_tokenizer(file)


def test_missing_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_tokenizer(tmp_path / "missing.json")
    with pytest.raises(CheckpointError, match=r"neither tokenizer.json nor tokenizer.model"):
        read_tokenizer(tmp_path)
