"""Check the fields grammar: tokens, loss, vision masks and refusals."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from small_data import ids, tokenizer

from lwm.core.errors import ConfigError
from lwm.data.examples.examples import Broken, Example
from lwm.data.examples.fields import FieldsEncoder, parse_fields
from lwm.models.vision_tokens import VisionVocabulary

BOS, EOS = 0, 1
RECORD = {"question": "who?", "answer": "a shepherd", "hint": "sheep", "vision": list(range(512))}


def encode(fields: str, record: dict[str, Any] = RECORD, **settings: Any) -> Example:
    encoder = FieldsEncoder(
        tokenizer=tokenizer(), fields=fields, vision=VisionVocabulary(), **settings
    )
    made = encoder(record, 1)
    assert made is not None
    return made


def columns(example: Example) -> list[tuple[int, float, bool]]:
    arrays = (example.tokens, example.weights, example.vision)
    return list(zip(*(array.tolist() for array in arrays), strict=True))


def text(words: str, weight: float) -> list[tuple[int, float, bool]]:
    return [(token, weight, False) for token in ids(words)]


FRAMES = [
    *((code, True) for code in range(256)),
    (8192, True),
    *((code, True) for code in range(256, 512)),
    (8193, True),
]


def vision(weight: float) -> list[tuple[int, float, bool]]:
    codes = [(code, weight, is_vision) for code, is_vision in FRAMES]
    return text("<vision>", weight) + codes + text("</vision>", weight)


def test_text_gets_begin_and_end_tokens() -> None:
    expected = [(BOS, 0.0, False), *text("a shepherd", 1.0), (EOS, 1.0, False)]
    assert columns(encode("answer")) == expected


def test_brackets_carry_no_loss_and_plus_joins_text() -> None:
    made = encode("[question+hint],answer", add_bos=False, add_eos=False)
    assert columns(made) == text("who? sheep", 0.0) + text("a shepherd", 1.0)


def test_fields_are_tokenized_separately() -> None:
    made = encode("question,hint", add_bos=False, add_eos=False)
    assert columns(made) == text("who?", 1.0) + text("sheep", 1.0)


def test_special_tokens_carry_loss_by_their_brackets() -> None:
    made = encode("[<|bos|>],answer,<|eos|>,[<|eos|>]", add_bos=False, add_eos=False)
    ends = [(EOS, 1.0, False), (EOS, 0.0, False)]
    assert columns(made) == [(BOS, 0.0, False), *text("a shepherd", 1.0), *ends]


def test_separator_and_prepended_text() -> None:
    made = encode(
        "[question+hint],answer",
        subfield_separator=" | ",
        prepend_text="Q: ",
        add_bos=False,
        add_eos=False,
    )
    assert columns(made) == text("Q: who? | sheep", 0.0) + text("a shepherd", 1.0)


@pytest.mark.parametrize(("fields", "weight"), [("[<|bos|>],answer", 0.0), ("vision", 1.0)])
def test_prepended_text_is_never_lost(fields: str, weight: float) -> None:
    made = columns(encode(fields, prepend_text="See: ", add_bos=False, add_eos=False))
    start = text("See: ", weight)
    assert made[: len(start)] == start


def test_vision_to_text() -> None:
    made = encode("[vision+question],answer")
    expected = vision(0.0) + text("who?", 0.0) + text("a shepherd", 1.0)
    assert columns(made) == [(BOS, 0.0, False), *expected, (EOS, 1.0, False)]


def test_text_to_vision() -> None:
    made = encode("[question],vision,<|eos|>", add_eos=False)
    expected = text("who?", 0.0) + vision(1.0)
    assert columns(made) == [(BOS, 0.0, False), *expected, (EOS, 1.0, False)]


def test_dtypes() -> None:
    made = encode("vision")
    assert (made.tokens.dtype, made.weights.dtype) == (np.int32, np.float32)
    assert made.vision.dtype == bool


def from_example(grammar: Any, line: int = 1, **settings: Any) -> Example:
    encoder = FieldsEncoder(tokenizer=tokenizer(), fields_from_example="fields", **settings)
    made = encoder(RECORD | {"fields": grammar}, line)
    assert made is not None
    return made


def test_example_may_hold_its_fields() -> None:
    assert columns(from_example("[question],answer")) == columns(encode("[question],answer"))
    assert columns(from_example(["hint", "answer"], fields_index=1)) == columns(encode("answer"))


def test_line_number_chooses_among_several_fields() -> None:
    choices = ["hint", "answer", "question"]
    for line in range(20):
        chosen = choices[random.Random(line).randrange(3)]
        assert columns(from_example(choices, line)) == columns(encode(chosen))


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (5, "holds a number, where a text of fields"),
        ([], "holds a list"),
        ([5], "holds a number"),
        ("a,,b", "empty field"),
    ],
)
def test_malformed_fields_in_an_example_break_it(grammar: Any, message: str) -> None:
    with pytest.raises(Broken, match=message):
        from_example(grammar)


def test_index_beyond_the_alternatives_is_refused() -> None:
    with pytest.raises(Broken, match="has 2 alternatives, but fields_index is 2"):
        from_example(["hint", "answer"], fields_index=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("", "empty field"),
        ("a,,b", "empty field"),
        ("[]", "empty field"),
        ("a+", "empty field"),
        ("[a,b]", "brackets enclose one whole field"),
        ("[a]+b", "brackets enclose one whole field"),
        ("a+<|eos|>", "separate it by a comma"),
    ],
)
def test_malformed_fields(fields: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_fields(fields)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"title": "x", "body": "y"}, r"no key 'text' \(its keys: body, title\)"),
        ({}, "its keys: none"),
        ({"text": None}, "holds null, where text is needed"),
        ({"text": ["a"]}, "holds a list, where text is needed"),
        ({"text": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_broken_texts(record: dict[str, Any], message: str) -> None:
    with pytest.raises(Broken, match=message):
        encode("text", record)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([], "holds 0 codes"),
        ([0] * 255, "holds 255 codes, which is not a multiple of 256"),
        ([0] * 255 + [8192], "code 8192, outside 0 to 8191"),
        ([-1] + [0] * 255, "code -1"),
        ([0.0] * 256, "where a list of codes"),
        ([True] * 256, "where a list of codes"),
        ("text", "where a list of codes"),
        ([10**30] * 256, "outside 0 to 8191"),
    ],
)
def test_broken_codes(codes: Any, message: str) -> None:
    with pytest.raises(Broken, match=message):
        encode("vision", {"vision": codes})


def test_empty_texts_give_no_example() -> None:
    encoder = FieldsEncoder(tokenizer=tokenizer(), fields="[question],answer")
    assert encoder({"question": "", "answer": ""}, 1) is None


def test_tokenizer_without_begin_and_end_tokens() -> None:
    bare = replace(tokenizer(), bos=None, eos=())
    with pytest.raises(ConfigError, match="set add_bos and add_eos to false"):
        FieldsEncoder(tokenizer=bare)
    FieldsEncoder(tokenizer=bare, add_bos=False, add_eos=False)
    with pytest.raises(ConfigError, match="no token that begins or ends"):
        FieldsEncoder(tokenizer=bare, fields="text,<|eos|>", add_bos=False, add_eos=False)


def test_begin_token_is_added_once() -> None:
    assert isinstance(tokenizer().backend, tokenizers.Tokenizer)
    assert tokenizer().encode("who?")[0] == BOS
    assert encode("question,hint").tokens.tolist().count(BOS) == 1


KEYS = st.sampled_from(["question", "answer", "hint", "vision", "<|bos|>", "<|eos|>"])


@given(st.lists(st.tuples(KEYS, st.booleans()), min_size=1, max_size=6))
def test_loss_follows_brackets(fields: list[tuple[str, bool]]) -> None:
    """Check that each field's tokens occur once, with loss by its brackets, in any order."""
    grammar = ",".join(f"[{key}]" if silent else key for key, silent in fields)
    parts = {
        "<|bos|>": lambda w: [(BOS, w, False)],
        "<|eos|>": lambda w: [(EOS, w, False)],
        "vision": vision,
    }
    expected = []
    for key, silent in fields:
        weight = 0.0 if silent else 1.0
        part = parts.get(key)
        expected += part(weight) if part else text(str(RECORD[key]), weight)
    made = FieldsEncoder(
        tokenizer=tokenizer(),
        fields=grammar,
        add_bos=False,
        add_eos=False,
        vision=VisionVocabulary(),
    )
    result = made(RECORD, 1)
    if all(key.startswith("<") for key, _ in fields):
        assert result is None
    else:
        assert result is not None
        assert columns(result) == expected
