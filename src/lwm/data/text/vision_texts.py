"""Define the texts around images and videos, the same in training and in prompts.

Source: LargeWorldModel paper (arXiv 2402.08268), section 4, and its code.
"""

from typing import Any

import numpy as np
from jaxtyping import Int

SYSTEM = "You are a helpful assistant."
CLOSING = " ASSISTANT:"
"""The text between an image or a video and the answer."""


def generation_request(caption: str, kind: str) -> str:
    """Return the prompt that requests `an image` or `a video`; `<vision>` follows it."""
    return f"{SYSTEM} USER: Generate {kind} of {caption}{CLOSING}"


def question_opening(question: str) -> str:
    """Return the text of a question up to its image or video, which `CLOSING` follows."""
    return f"{SYSTEM} USER: {question}\n"


def question_after(question: str) -> tuple[str, str]:
    """Return the texts before and after an image or a video that comes before its question."""
    return f"{SYSTEM} USER: ", f"\n{question}{CLOSING}"


def description_request(kind: str) -> str:
    """Return the user's request to describe `an image` or `a video`."""
    return f"Describe this {kind.split()[-1]}."


def training_line(
    codes: Int[np.ndarray, "frames codes_per_frame"], caption: str, source: str
) -> dict[str, Any]:
    """Return one line of training data, whose key `fields` lists the ways to train on it: the
    image from the caption or the caption from the image, or without a caption only the image."""
    texts: dict[str, Any] = {"fields": ["vision"]}
    if caption:
        kind = "an image" if len(codes) == 1 else "a video"
        texts = {
            "drawing": generation_request(caption, kind),
            "question": question_opening(description_request(kind)),
            "closing": CLOSING,
            "fields": ["[drawing],vision", "[question+vision+closing],caption"],
        }
    return {"source": source, "caption": caption, **texts, "vision": codes.ravel().tolist()}
