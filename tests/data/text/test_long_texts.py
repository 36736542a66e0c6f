"""Check that texts encoded in parts have the tokens that the library gives the whole text."""

from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_byte_level import MADE
from test_control_tokens import metaspace
from test_sentencepiece import KINDS, train
from tokenizers import normalizers, pre_tokenizers, processors

from lwm.data.text.long_texts import encode_parts
from lwm.data.text.tokenizer import Tokenizer, read_tokenizer

UNITS = [
    "the sea shells ", "It's ", "wood", "shellssea", "TheSea", "a", "aab", "0", "31415926", "12 ",
    "café ", "e\u0301", "東京タワー", "привет мир", "🙂👍🏽", "ﬁ½ﷺ", "-=", "'ll", ". ", "\0",
    " ", "   x", "\n", "\r\n\t", "\u3000", "<|im_end|>", "<|im_", "</s>",
]  # fmt: skip
NAMES = ["gpt-2", "smollm", "llama-bpe", "unsplit", "composed", "trimmed", "metaspace", *KINDS]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sentencepiece")


@cache
def backend(name: str, directory: Path) -> tokenizers.Tokenizer:
    if name == "metaspace":
        return metaspace("first")
    if name in KINDS:
        return read_tokenizer(train(directory, **KINDS[name])).backend
    result = tokenizers.Tokenizer.from_str(
        MADE[name if name in MADE else "qwen2"].backend.to_str()
    )
    result.add_special_tokens(["<|im_end|>"])
    if name == "unsplit":
        result.pre_tokenizer = pre_tokenizers.ByteLevel(  # type: ignore[assignment]
            add_prefix_space=True, use_regex=False
        )
    elif name == "composed":
        result.normalizer = normalizers.NFKC()  # type: ignore[assignment]
    elif name == "trimmed":
        result.post_processor = processors.ByteLevel(  # type: ignore[assignment]
            trim_offsets=True
        )
    return result


repeated = st.builds(lambda unit, count: unit * count, st.sampled_from(UNITS), st.integers(1, 300))
mixed = st.lists(st.sampled_from(UNITS), min_size=1, max_size=60).map("".join)


@given(text=st.lists(repeated | mixed, min_size=1, max_size=4).map("".join))
@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_the_whole_text(name: str, directory: Path, text: str) -> None:
    whole = backend(name, directory).encode(text, add_special_tokens=False)
    parts = list(encode_parts(backend(name, directory), text, size=256, overlap=64))
    assert [token for part in parts for token in part.ids] == whole.ids
    assert [start for part in parts for start in part.starts] == [at for at, _ in whole.offsets]


@pytest.mark.parametrize("name", ["llama-bpe", "unsplit", "trimmed", "llama"])
def test_parts_stay_short(name: str, directory: Path) -> None:
    """Check that no part is longer than a few times the size, whatever the text repeats. A unigram
    model makes one token of a run of spaces or of unknown characters, however long."""
    for unit in ("shells", "東京タワー", "3", " ", "🙂"):
        text = unit * (5_000 // len(unit))
        parts = list(encode_parts(backend(name, directory), text, size=1024, overlap=256))
        assert max(part.encoding.offsets[-1][1] for part in parts) <= 4 * 1024
        ids = [token for part in parts for token in part.ids]
        assert ids == backend(name, directory).encode(text, add_special_tokens=False).ids


def test_every_way_to_encode_takes_parts() -> None:
    """Check default sizes, tokens around the text, and control tokens that it spells."""
    text = "It was the best of times, </s><|endoftext|> " * 2000
    library = tokenizers.Tokenizer.from_str(MADE["smollm"].backend.to_str())
    library.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer = Tokenizer(backend=library)
    assert tokenizer.encode_controlled(text) == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode_controlled(text, specials=True) == library.encode(text).ids
    plain = tokenizer.encode("It was the best of times, </s><|endoftext|> ", specials=False)
    assert tokenizer.encode(text, specials=False) == plain * 2000
    assert tokenizer.encode(text) == [0, *plain * 2000, 0]


def test_a_file_that_truncates_or_pads_does_not_apply(tmp_path: Path) -> None:
    """Check that the library's settings in a file neither cut texts nor pad them."""
    library = tokenizers.Tokenizer.from_str(MADE["smollm"].backend.to_str())
    library.enable_truncation(4)
    library.enable_padding(length=16)
    library.save(str(tmp_path / "tokenizer.json"))
    text = "It was the best of times."
    assert read_tokenizer(tmp_path).encode(text) == MADE["smollm"].encode(text)
    assert read_tokenizer(tmp_path).encode("a") == MADE["smollm"].encode("a")
