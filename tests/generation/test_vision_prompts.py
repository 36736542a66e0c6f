"""Prompts of models that see, spelt out by hand."""

from typing import Any

import numpy as np
import pytest
from tiny_vision_model import CONFIG, ids, tokenizer

from lwm.core.errors import InputError
from lwm.data.text.templates import CHATML, ORIGINAL
from lwm.generation.vision_prompts import (
    chat_tokens,
    codes_from_part,
    generation_prompt,
    start_of_frames,
)

ONE, TWO = [[1, 2, 3, 4]], [[5, 6, 7, 8], [9, 10, 11, 12]]


def shown(codes: Any) -> list[int]:
    """20 ends a frame and 21 a video."""
    ends = [20] * (len(codes) - 1) + [21]
    rows = [(*row, end) for row, end in zip(codes, ends, strict=True)]
    return [CONFIG.vocab_size + n for row in rows for n in row]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def part(codes: Any) -> dict[str, Any]:
    return {"type": "codes", "codes": codes}


def chat(*content: Any, template: str = ORIGINAL) -> list[int]:
    messages = [{"role": "user", "content": list(content)}]
    return chat_tokens(template, messages, tokenizer(), CONFIG, codes_from_part)


def test_a_question_about_a_picture_is_the_originals() -> None:
    before = "<s>You are a helpful assistant. USER: What is it?\n"
    expected = [
        *ids(before), *ids("<vision>"), *shown(ONE), *ids("</vision>"), *ids(" ASSISTANT:"),
    ]  # fmt: skip
    assert chat(text("What is it?"), part(ONE)) == expected


def test_parts_keep_their_order_over_several_turns() -> None:
    messages = [
        {"role": "user", "content": [part(ONE), text("and"), part(TWO), text("differ?")]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "How \ue0000\ue001?"},
    ]
    found = chat_tokens(CHATML, messages, tokenizer(), CONFIG, codes_from_part)
    expected = [
        *ids("<|im_start|>user\n"), *ids("<vision>"), *shown(ONE), *ids("</vision>"),
        *ids("\nand\n"), *ids("<vision>"), *shown(TWO), *ids("</vision>"),
        *ids(
            "\ndiffer?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
            "<|im_start|>user\nHow \ue0000\ue001?<|im_end|>\n<|im_start|>assistant\n"
        ),
    ]  # fmt: skip
    assert found == expected


def test_drawing_prompts_are_the_originals() -> None:
    asked = "<s>You are a helpful assistant. USER: Generate a video of a cat ASSISTANT:"
    assert generation_prompt(tokenizer(), "a cat", "a video") == ids(asked) + ids("<vision>")
    assert start_of_frames(tokenizer()) == ids("<s><vision>")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([part([[1, 2, 3]])], r"shape \[1, 3\].*frame of 4"),
        ([part([[1, 2, 3, 20]])], "1 to 20.*0 to 19"),
        ([part([])], r"shape \[0\]"),
        ([part([[1.5, 2, 3, 4]])], "float64"),
        ([part([[1], [2, 3]])], r"shape \[0\]"),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "'image_url'.*no VQGAN"),
        (["text"], "of type 'str'"),
    ],
)
def test_parts_that_cannot_be_shown_are_refused(content: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        chat(*content)


def test_a_template_that_leaves_a_picture_out_is_refused() -> None:
    with pytest.raises(InputError, match="writes 0 of the conversation's 1 images"):
        chat(part(ONE), template="nothing")


def test_codes_come_from_whoever_sees() -> None:
    def see(part: Any) -> np.ndarray:
        return np.array([[part["shade"]] * 4])

    messages = [{"role": "user", "content": [{"type": "image", "shade": 7}]}]
    found = chat_tokens(ORIGINAL, messages, tokenizer(), CONFIG, see)
    assert shown([[7] * 4]) == [token for token in found if token >= CONFIG.vocab_size]
