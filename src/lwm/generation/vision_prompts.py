"""Build prompts of vision-language models: text with the codes of images and videos in it.

The codes of an image or video stand between `<vision>` and `</vision>`, which are ordinary text to
the tokenizer. Each piece of text is encoded separately, as in training.

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
from lwm.models.llama import LlamaConfig
from lwm.models.vision_tokens import VisionVocabulary

OPEN, CLOSE = "<vision>", "</vision>"

Part = Mapping[str, Any]
"""Part of a message's content: `{"type": "text", "text": ...}`, or an image or a video."""

EncodePart = Callable[[Part], Int[np.ndarray, "frames codes_per_frame"]]
"""Return the codes of an image or video part, or raise an `InputError`."""


def require_vision(config: LlamaConfig) -> VisionVocabulary:
    """Return the vision vocabulary of a model.

    Raises:
        InputError: it is a text model.
    """
    if config.vision is None:
        raise InputError(
            "this is a text model, which neither reads nor generates images; load a "
            "vision-language model, or add a vision table with 'lwm convert --add-vision' and "
            "train it"
        )
    return config.vision


def frame_tokens(codes: Any, config: LlamaConfig, *, ended: bool = True) -> list[int]:
    """Return the ids of frames in the model's one table: their codes and end tokens.

    Args:
        codes: [frames, codes_per_frame].
        ended: whether the last frame ends the video; otherwise another frame is to follow.

    Raises:
        InputError: it is a text model, or the codes do not fit its vision vocabulary.
    """
    ids = require_vision(config).interleave(np.asarray(codes), ended=ended)
    return (ids + config.vocab_size).tolist()


def start_of_frames(tokenizer: Tokenizer, text: str = "") -> list[int]:
    """Return a text with its beginning-of-text token, up to where frames start."""
    if tokenizer.bos:
        text = tokenizer.bos + text
    return [*tokenizer.encode_part(text), *tokenizer.encode_part(OPEN)]


def generation_prompt(tokenizer: Tokenizer, caption: str, kind: str) -> list[int]:
    """Return a prompt for `an image` or `a video` of something.

    Raises:
        InputError: the caption is empty.
    """
    if not caption.strip():
        raise InputError("the prompt is empty; say what to generate")
    return start_of_frames(tokenizer, generation_request(caption, kind))


def has_vision(messages: Sequence[Message]) -> bool:
    """Return whether any message has an image or a video."""
    return any(part.get("type") != "text" for message in messages for part in _parts(message))


def require_text(messages: Sequence[Message], source: str) -> None:
    """Refuse messages with images or videos.

    Raises:
        InputError: names the type of the part.
    """
    for part in (part for message in messages for part in _parts(message)):
        if part.get("type") != "text":
            raise InputError(
                f"the message has a part of type {part.get('type')!r} and {source} reads text "
                "only; send text parts, or load a vision-language model"
            )


def chat_tokens(
    template: str,
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    config: LlamaConfig,
    encode_part: EncodePart,
) -> list[int]:
    """Return a conversation as ids, with images and videos as codes in their places.

    Args:
        messages: in OpenAI's shape; parts of one message are separated by line breaks.

    Raises:
        InputError: a message is malformed, or codes do not fit the model's vision vocabulary.
    """
    parts = [part for message in messages for part in _parts(message)]
    texts_of_all = "".join(str(part.get("text", "")) for part in parts) + "".join(
        str(message.get("content")) for message in messages if isinstance(message, Mapping)
    )
    marker = unused_text(texts_of_all)
    plain = [_with_markers(message, marker) for message in messages]
    texts = render(template, plain, tokenizer).split(marker)
    media = [part for part in parts if part.get("type") != "text"]
    if len(texts) != len(media) + 1:
        raise InputError(
            f"the chat template writes {len(texts) - 1} of the conversation's {len(media)} "
            "images and videos; choose another with --template"
        )
    ids = tokenizer.encode_part(texts[0])
    for part, text in zip(media, texts[1:], strict=True):
        ids += tokenizer.encode_part(OPEN)
        ids += frame_tokens(encode_part(part), config)
        ids += tokenizer.encode_part(CLOSE) + tokenizer.encode_part(text)
    return ids


def codes_from_part(part: Part) -> np.ndarray:
    """Return the codes in a part `{"type": "codes", "codes": [[...], ...]}`, one row per frame.

    Raises:
        InputError: the part has another type, or its codes are not rows of whole numbers.
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
            "numbers [frames, codes_per_frame] are needed"
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


def _with_markers(message: Message, marker: str) -> Message:
    if not isinstance(message.get("content"), list):
        return message
    marked = {"type": "text", "text": marker}
    content = [part if part.get("type") == "text" else marked for part in _parts(message)]
    return {**message, "content": content}
