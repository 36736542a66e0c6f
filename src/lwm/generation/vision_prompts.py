"""Prompts of models that see: what is asked in words, round the codes of pictures.

A prompt is ids of text with ids of vision between `<vision>` and `</vision>`, which are ordinary
text to the tokenizer; each piece of text is encoded by itself, as in training. Knows messages and
codes; knows no pixels, so somebody else turns a picture into codes.

Source: LargeWorldModel paper (arXiv 2402.08268), section 4; the forms are those of its code.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from lwm.core.errors import InputError
from lwm.data.text.templates import Message, render, unused_text
from lwm.data.text.tokenizer import Tokenizer
from lwm.data.text.vision_texts import generation_request
from lwm.generation.frames import frame_tokens
from lwm.models.llama import LlamaConfig

OPEN, CLOSE = "<vision>", "</vision>"

Part = Mapping[str, Any]
"""Part of a message's content: `{"type": "text", "text": ...}`, or one that shows something."""

See = Callable[[Part], Int[np.ndarray, "frames codes_per_frame"]]
"""Turns a part that shows something into codes, or refuses it with an `InputError`."""


def begin(tokenizer: Tokenizer, text: str = "") -> list[int]:
    """A text from its very beginning, up to where frames begin."""
    if tokenizer.bos:
        text = tokenizer.bos + text
    return [*tokenizer.encode_part(text), *tokenizer.encode_part(OPEN)]


def generation_prompt(tokenizer: Tokenizer, caption: str, kind: str) -> list[int]:
    """Asks for `an image` or `a video` of something.

    Raises:
        InputError: the caption is empty.
    """
    if not caption.strip():
        raise InputError("the prompt is empty; say what is to be drawn")
    return begin(tokenizer, generation_request(caption, kind))


def has_vision(messages: Sequence[Message]) -> bool:
    """Whether a message shows something."""
    return any(part.get("type") != "text" for message in messages for part in _parts(message))


def text_of(message: Message, *, source: str) -> Any:
    """The text of a message whose content may be a list of parts.

    Raises:
        InputError: a part is not text.
    """
    content = message.get("content")
    if not isinstance(content, list):
        return content
    for part in _parts(message):
        if part.get("type") != "text":
            raise InputError(
                f"the message has a part of type {part.get('type')!r} and {source} reads text "
                "alone; send text parts, or load a model that sees"
            )
    return "\n".join(str(part.get("text", "")) for part in content)


def chat_tokens(
    template: str,
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    config: LlamaConfig,
    see: See,
) -> list[int]:
    """A conversation as ids, its pictures and videos as codes where they stand among the words.

    Args:
        messages: OpenAI's shape; parts of one message are put on lines of their own.

    Raises:
        InputError: a message is malformed, or the codes are not of the model's kind.
    """
    parts = [part for message in messages for part in _parts(message)]
    said = "".join(str(part.get("text", "")) for part in parts) + "".join(
        str(message.get("content")) for message in messages if isinstance(message, Mapping)
    )
    marker = unused_text(said)
    plain = [{**message, "content": _with_markers(message, marker)} for message in messages]
    texts = render(template, plain, tokenizer).split(marker)
    shown = [part for part in parts if part.get("type") != "text"]
    if len(texts) != len(shown) + 1:
        raise InputError(
            f"the chat template writes {len(texts) - 1} of the conversation's {len(shown)} "
            "pictures; choose another with --template"
        )
    ids = tokenizer.encode_part(texts[0])
    for part, text in zip(shown, texts[1:], strict=True):
        ids += tokenizer.encode_part(OPEN)
        ids += frame_tokens(see(part), config)
        ids += tokenizer.encode_part(CLOSE) + tokenizer.encode_part(text)
    return ids


def codes_from_part(part: Part) -> np.ndarray:
    """Codes from a part that brings them itself, `{"type": "codes", "codes": [[...], ...]}`, a row
    for each frame.

    Raises:
        InputError: it is another kind of part, or its codes are no rows of whole numbers.
    """
    kind = part.get("type")
    if kind != "codes":
        raise InputError(
            f"the message has a part of type {kind!r}, and the model has no VQGAN to turn it into "
            "codes; load one, or send parts of type 'text' and 'codes'"
        )
    try:
        codes = np.asarray(part.get("codes"))
    except ValueError:  # rows of different lengths
        codes = np.array([])
    if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer):
        raise InputError(
            f"the codes of a message have shape {list(codes.shape)} and type {codes.dtype}; whole "
            "numbers [frames, codes of a frame] are needed"
        )
    return codes


def _parts(message: Message) -> list[Part]:
    content = message.get("content")
    if not isinstance(content, list):
        return []
    for part in content:
        if not isinstance(part, Mapping):
            raise InputError(
                f"the message has a part of type {type(part).__name__!r}; each must be an object "
                "with a type"
            )
    return content


def _with_markers(message: Message, marker: str) -> Any:
    if not isinstance(message.get("content"), list):
        return message.get("content")
    return "\n".join(
        str(part.get("text", "")) if part.get("type") == "text" else marker
        for part in _parts(message)
    )
