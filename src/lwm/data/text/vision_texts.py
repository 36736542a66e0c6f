"""What is said round pictures and videos, in training and when a model is asked: one place, so
that a model is asked in the very words it was taught by.

A captioned picture makes one line of training data that teaches either way: the picture from the
caption, or the caption from the picture. Knows texts and codes as numbers; knows no tokenizer, no
files and no pixels.

Source: LargeWorldModel paper (arXiv 2402.08268), section 4; the forms are those of its code.
"""

from typing import Any

import numpy as np
from jaxtyping import Int

SYSTEM = "You are a helpful assistant."

DRAWING = "[drawing],vision"
TELLING = "[question+vision+closing],caption"
ALONE = "vision"
"""Fields of a line: the picture from the caption, the caption from the picture, and the picture
of nothing in particular."""


def image_or_video(frames: int) -> str:
    """What so many frames are called in a sentence."""
    return "an image" if frames == 1 else "a video"


def generation_request(caption: str, kind: str) -> str:
    """Asks for `an image` or `a video` of something; `<vision>` follows."""
    return f"{SYSTEM} USER: Generate {kind} of {caption} ASSISTANT:"


def description_request(kind: str) -> str:
    """What a user says to have `an image` or `a video` told in words."""
    return f"Describe this {kind.split()[-1]}."


def question_parts(question: str) -> tuple[str, str]:
    """What stands before and behind a picture that the user asks something about, as the
    original's chat template writes a message of the question and then the picture."""
    return f"{SYSTEM} USER: {question}\n", " ASSISTANT:"


def training_line(
    codes: Int[np.ndarray, "frames codes_per_frame"], caption: str, source: str
) -> dict[str, Any]:
    """One line of training data; the key `fields` says how it is read, in all the ways that it can
    teach. Without a caption it teaches the picture alone.

    Args:
        source: the file, as the user would look it up.
    """
    line: dict[str, Any] = {"source": source, "caption": caption}
    if not caption:
        return line | {"fields": [ALONE], "vision": codes.ravel().tolist()}
    kind = image_or_video(len(codes))
    question, closing = question_parts(description_request(kind))
    return line | {
        "drawing": generation_request(caption, kind),
        "question": question,
        "closing": closing,
        "fields": [DRAWING, TELLING],
        "vision": codes.ravel().tolist(),
    }
