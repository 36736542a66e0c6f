"""Check byte-level tokenizers of GGUF files against a plain Python implementation: split by the
published regular expression, spell in bytes, merge the best pair until none is left."""

import json
from functools import cache
from itertools import pairwise

import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers
from transformers import GPT2Tokenizer

from lwm.core.errors import CheckpointError
from lwm.core.vocabulary import CONTROL, NORMAL, USER_DEFINED, Piece, Vocabulary
from lwm.data.text.tokenizer import Tokenizer, from_vocabulary

# As published: GPT-2's encoder.py, and the tokenizer.json of Llama 3 and of Qwen 2.
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")

CORPUS = [
    "It was the best of times, it was the worst of times, it was the age of wisdom.",
    "In 1984 and 2024 there were 12345 or 67890 dollars; 100% of 3.14159 isn't 31415926.",
    "We've said they'll do what I'd do, SHE'S said; you're 'quoting' it's.",
    "naïve café Ünïcödé 東京タワー привет мир 🙂👍🏽",
    "def f(x):\n    return x ** 2\n\n\n\tif a:\r\n        b()\n",
] * 3


@cache
def alphabet() -> dict[int, str]:
    """Return GPT-2's sign for each byte: itself if printable, else one beyond Latin-1."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }


@cache
def trained() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the pieces in the order of their ids, and the merge rules, of a small vocabulary."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(  # type: ignore[assignment]
        add_prefix_space=False
    )
    trainer = trainers.BpeTrainer(
        vocab_size=520,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=sorted(alphabet().values()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    data = json.loads(backend.to_str())["model"]
    pieces = sorted(data["vocab"], key=data["vocab"].get)
    return tuple(pieces), tuple(" ".join(pair) for pair in data["merges"])


def make(splitter: str, **changes: object) -> Tokenizer:
    texts, merges = trained()
    pieces = tuple(Piece(text, 0.0, NORMAL if i > 1 else CONTROL) for i, text in enumerate(texts))
    settings: dict[str, object] = {
        "method": "byte_level",
        "pieces": pieces,
        "merges": merges,
        "splitter": splitter,
        "space_prefix": False,
        "add_bos": False,
        "bos": 1,
        "eos": 0,
        **changes,
    }
    return from_vocabulary(Vocabulary(**settings))  # type: ignore[arg-type]


def words(splitter: str, text: str) -> list[str]:
    """Split a text by the published rules."""
    if splitter == "smollm":  # each digit separately, then GPT-2's rules
        parts = regex.split(r"(\p{N})", text)
        return [word for part in parts if part for word in regex.findall(GPT_2, part)]
    rules = {"gpt-2": GPT_2, "default": GPT_2, "llama-bpe": LLAMA_3, "qwen2": QWEN_2}[splitter]
    return regex.findall(rules, text)


def reference(splitter: str, text: str) -> list[int]:
    """Return ids by the definition of byte-level BPE."""
    texts, merges = trained()
    ids = {piece: i for i, piece in enumerate(texts)}
    ranks = {tuple(rule.split(" ")): i for i, rule in enumerate(merges)}
    result = []
    for word in words(splitter, text):
        parts = [alphabet()[byte] for byte in word.encode("utf-8")]
        if splitter == "llama-bpe" and "".join(parts) in ids:
            result.append(ids["".join(parts)])
            continue
        while True:
            candidates = [pair for pair in pairwise(parts) if pair in ranks]
            if not candidates:
                break
            best = min(candidates, key=ranks.__getitem__)
            at = list(pairwise(parts)).index(best)
            parts[at : at + 2] = ["".join(best)]
        result += [ids[part] for part in parts]
    return result


SPLITTERS = ["default", "gpt-2", "smollm", "llama-bpe", "qwen2"]
MADE = {splitter: make(splitter) for splitter in SPLITTERS}
symbols = st.sampled_from([*"ab tT'sSlLdD019 \n\r\t.,!é東½²٣🙂_-", "the", "it's", "1984"])
# The rules apply to plain text; hypothesis also tries the special token, which it reads in the
# sources.
texts = (st.text(max_size=60) | st.lists(symbols, max_size=40).map("".join)).filter(
    lambda text: "<|endoftext|>" not in text
)


@pytest.mark.parametrize("splitter", SPLITTERS)
def test_ids_follow_from_the_published_rules(splitter: str) -> None:
    for text in [*CORPUS[:5], " ".join(CORPUS[:5]), "", " ", "  a  b ", "a  1234567  ½ ²x"]:
        assert MADE[splitter].encode(text) == reference(splitter, text)


@given(text=texts, splitter=st.sampled_from(SPLITTERS))
@settings(max_examples=150, deadline=None)
def test_ids_follow_from_the_rules_for_any_text(text: str, splitter: str) -> None:
    tokenizer = MADE[splitter]
    ids = tokenizer.encode(text)
    assert ids == reference(splitter, text)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.decode_stream(iter(ids))) == text


@given(st.lists(st.integers(2, len(trained()[0]) - 1), max_size=30))
@settings(max_examples=150, deadline=None)
def test_streamed_pieces_join_to_the_decoded_text(ids: list[int]) -> None:
    """Check this also for bytes that form no characters."""
    tokenizer = MADE["gpt-2"]
    assert "".join(tokenizer.decode_stream(iter(ids))) == tokenizer.decode(ids)


def test_gpt_2_rules_match_transformers() -> None:
    pieces, merges = trained()
    peer = GPT2Tokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[tuple(rule.split(" ")) for rule in merges],  # type: ignore[arg-type]
        unk_token="<|endoftext|>",
    )
    for text in CORPUS[:5]:
        assert MADE["gpt-2"].encode(text) == peer(text)["input_ids"]


def test_special_tokens_are_encoded_and_not_decoded() -> None:
    tokenizer = make("smollm")
    ids = tokenizer.encode_controlled("<|im_start|>it was<|endoftext|>")
    assert (ids[0], ids[-1]) == (1, 0)
    assert tokenizer.decode(ids) == "it was"
    assert (tokenizer.bos, tokenizer.eos, tokenizer.eos_text) == (
        "<|im_start|>",
        (0,),
        "<|endoftext|>",
    )


def test_bos_is_added_if_the_file_requests_it() -> None:
    with_bos, without = make("llama-bpe", add_bos=True), make("llama-bpe")
    assert with_bos.encode("it was") == [1, *without.encode("it was")]
    assert with_bos.encode("it was", specials=False) == without.encode("it was")


def test_user_defined_pieces_stay_whole() -> None:
    pieces, _ = trained()
    extended = tuple(Piece(text, 0.0, NORMAL) for text in pieces)
    extended += (Piece("<tool>", 0.0, USER_DEFINED),)
    tokenizer = make("gpt-2", pieces=extended)
    ids = tokenizer.encode("it<tool>was")
    assert len(pieces) in ids
    assert tokenizer.decode(ids) == "it<tool>was"


def test_unknown_splitting_rules_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'tekken'.*--tokenizer"):
        make("tekken")
    with pytest.raises(CheckpointError, match="do not fit together"):
        make("gpt-2", merges=("zebra giraffe",))
