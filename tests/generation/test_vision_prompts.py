"""Check prompts of vision-language models against prompts written out by hand."""

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


def frame_ids(codes: Any) -> list[int]:
    """Return the ids of frames; 20 ends a frame and 21 a video."""
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


def test_a_question_about_an_image_has_the_originals_form() -> None:
    before = "<s>You are a helpful assistant. USER: What is it?\n"
    expected = [
        *ids(before), *ids("<vision>"), *frame_ids(ONE), *ids("</vision>"), *ids(" ASSISTANT:"),
    ]  # fmt: skip
    assert chat(text("What is it?"), part(ONE)) == expected


def test_parts_keep_their_order_over_several_turns() -> None:
    messages = [
        {"role": "user", "content": [part(ONE), text("and"), part(TWO), text("differ?")]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "How \ue0000\ue001?"},
    ]
    tokens = chat_tokens(CHATML, messages, tokenizer(), CONFIG, codes_from_part)
    expected = [
        *ids("<|im_start|>user\n"), *ids("<vision>"), *frame_ids(ONE), *ids("</vision>"),
        *ids("\nand\n"), *ids("<vision>"), *frame_ids(TWO), *ids("</vision>"),
        *ids(
            "\ndiffer?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
            "<|im_start|>user\nHow \ue0000\ue001?<|im_end|>\n<|im_start|>assistant\n"
        ),
    ]  # fmt: skip
    assert tokens == expected


def test_generation_prompts_have_the_originals_form() -> None:
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
        (
            [{"type": "image_url", "image_url": {"url": "x"}}],
            "'image_url'.*where the model has a VQGAN",
        ),
        (["text"], "of type 'str'"),
    ],
)
def test_bad_parts_of_messages_are_refused(content: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        chat(*content)


def test_a_template_that_leaves_out_an_image_is_refused() -> None:
    with pytest.raises(InputError, match="leaves out message 1, of the role 'user'"):
        chat(part(ONE), template="nothing")


def test_codes_come_from_the_encoder() -> None:
    def encode(part: Any) -> np.ndarray:
        return np.array([[part["shade"]] * 4])

    messages = [{"role": "user", "content": [{"type": "image", "shade": 7}]}]
    tokens = chat_tokens(ORIGINAL, messages, tokenizer(), CONFIG, encode)
    assert frame_ids([[7] * 4]) == [token for token in tokens if token >= CONFIG.vocab_size]
