"""Define the texts around images and videos, the same in training and in prompts.

A captioned image makes one line of training data for both directions: the image from the caption,
or the caption from the image.

Source: LargeWorldModel paper (arXiv 2402.08268), section 4; the forms are those of its code.
"""

from typing import Any

import numpy as np
from jaxtyping import Int

SYSTEM = "You are a helpful assistant."

# Fields of a line, by what they train.
_IMAGE_FROM_CAPTION = "[drawing],vision"
_CAPTION_FROM_IMAGE = "[question+vision+closing],caption"
_IMAGE = "vision"


def image_or_video(frames: int) -> str:
    """Return the words for a number of frames in a sentence."""
    return "an image" if frames == 1 else "a video"


def generation_request(caption: str, kind: str) -> str:
    """Return the prompt that requests `an image` or `a video`; `<vision>` follows it."""
    return f"{SYSTEM} USER: Generate {kind} of {caption} ASSISTANT:"


def description_request(kind: str) -> str:
    """Return the user's request to describe `an image` or `a video`."""
    return f"Describe this {kind.split()[-1]}."


def question_parts(question: str) -> tuple[str, str]:
    """Return the texts before and after an image that a question is about, as the original's chat
    template writes a message of the question and then the image."""
    return f"{SYSTEM} USER: {question}\n", " ASSISTANT:"


def training_line(
    codes: Int[np.ndarray, "frames codes_per_frame"], caption: str, source: str
) -> dict[str, Any]:
    """Return one line of training data, whose key `fields` lists the ways to train on it.

    Args:
        caption: empty to train on the image without a prompt.
        source: name of the file, for the user.
    """
    line: dict[str, Any] = {"source": source, "caption": caption}
    if not caption:
        return line | {"fields": [_IMAGE], "vision": codes.ravel().tolist()}
    kind = image_or_video(len(codes))
    question, closing = question_parts(description_request(kind))
    return line | {
        "drawing": generation_request(caption, kind),
        "question": question,
        "closing": closing,
        "fields": [_IMAGE_FROM_CAPTION, _CAPTION_FROM_IMAGE],
        "vision": codes.ravel().tolist(),
    }
