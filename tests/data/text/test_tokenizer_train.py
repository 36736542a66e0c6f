"""Check that trained tokenizers are deterministic and encode any text without loss."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import TEXTS, tokenizer

from lwm.core.errors import ConfigError, InputError
from lwm.data.text import documents
from lwm.data.text.tokenizer import read_tokenizer, train_tokenizer


def test_the_order_of_texts_does_not_matter() -> None:
    assert train_tokenizer(reversed(TEXTS), 300).backend.to_str() == tokenizer().backend.to_str()


def test_size_and_specials() -> None:
    assert train_tokenizer(TEXTS, 280).vocab_size == 280
    assert (tokenizer().bos, tokenizer().eos_text, tokenizer().eos) == ("<s>", "</s>", (1,))
    assert tokenizer().encode("In")[0] == 0


def test_each_digit_is_a_token() -> None:
    assert len(tokenizer().encode("18 4711", specials=False)) == 7
    assert not [
        piece
        for piece in tokenizer().backend.get_vocab()
        if len(piece) > 1 and any(map(str.isdigit, piece))
    ]


@given(st.text())
def test_any_text_survives_a_round_trip(text: str) -> None:
    assert tokenizer().decode(tokenizer().encode(text, specials=False)) == text


def test_survives_saving(tmp_path: Path) -> None:
    tokenizer().save(tmp_path)
    again = read_tokenizer(tmp_path)
    assert (again.bos, again.eos) == ("<s>", (1,))
    assert [again.encode(text) for text in TEXTS] == [tokenizer().encode(text) for text in TEXTS]


def test_long_texts_are_processed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that parts cut at spaces have the same words as the whole."""
    whole = train_tokenizer([" ".join(TEXTS)], 300).backend.to_str()
    monkeypatch.setattr(documents, "_PIECE", 64)
    assert train_tokenizer([" ".join(TEXTS)], 300).backend.to_str() == whole


def test_words_without_end_are_cut_for_training() -> None:
    trained = train_tokenizer(["a" * 50_000, *TEXTS], 300)
    assert max(map(len, trained.backend.get_vocab())) <= 128
    text = "a" * 1000 + " " + TEXTS[1]
    assert trained.decode(trained.encode(text, specials=False)) == text


def test_half_a_surrogate_pair_is_ignored() -> None:
    trained = train_tokenizer([*TEXTS, "\ud800"], 300)
    assert trained.backend.get_vocab() == tokenizer().backend.get_vocab()


def test_bad_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 258"):
        train_tokenizer(TEXTS, 257)
    with pytest.raises(InputError, match="no text to train"):
        train_tokenizer([""], 300)
