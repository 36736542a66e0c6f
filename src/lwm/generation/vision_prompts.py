"""Build prompts of vision-language models: text with the codes of images and videos in it.

The codes of an image or video stand between `<vision>` and `</vision>`, which are control tokens
of some tokenizers and ordinary text to others. Each piece of text is encoded separately, as in
training.

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
EncodeMedia = Callable[[Part], Int[np.ndarray, "frames codes_per_frame"]]
"""Return the codes of an image or video part, or raise an `InputError`."""


def require_vision(config: LlamaConfig) -> VisionVocabulary:
    """Return the vision vocabulary of a model; refuse a text model."""
    if config.vision is None:
        raise InputError(
            "this is a text model, which neither reads nor generates images; load a "
            "vision-language model, or add a vision table with 'lwm convert --add-vision' and "
            "train it"
        )
    return config.vision


def frame_tokens(codes: Any, config: LlamaConfig, *, ended: bool = True) -> list[int]:
    """Return the ids of [frames, codes_per_frame] codes and end tokens; see `interleave`."""
    ids = require_vision(config).interleave(np.asarray(codes), ended=ended)
    return (ids + config.vocab_size).tolist()


def start_of_frames(tokenizer: Tokenizer, text: str = "") -> list[int]:
    """Return a text with its beginning-of-text token, up to where frames start."""
    text = (tokenizer.bos or "") + tokenizer.escape(text)
    return [*tokenizer.encode_part(text), *tokenizer.encode_part(OPEN)]


def generation_prompt(tokenizer: Tokenizer, caption: str, kind: str) -> list[int]:
    """Return a prompt for `an image` or `a video` of something."""
    if not caption.strip():
        raise InputError("the prompt is empty; say what to generate")
    return start_of_frames(tokenizer, generation_request(caption, kind))


def has_vision(messages: Sequence[Message]) -> bool:
    """Return whether any message has an image or a video."""
    return any(part.get("type") != "text" for message in messages for part in _parts(message))


def require_text(messages: Sequence[Message], source: str) -> None:
    """Refuse messages with images or videos."""
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
    encode_media: EncodeMedia,
) -> list[int]:
    """Return a conversation as ids, with images and videos as codes in their places.

    Parts of one message are separated by line breaks.
    """
    parts = [part for message in messages for part in _parts(message)]
    contents = [*(part.get("text", "") for part in parts), *(x.get("content") for x in messages)]
    marker = unused_text("".join(map(str, contents)))
    marked: Part = {"type": "text", "text": marker}
    plain = [replace_media(message, lambda part: marked) for message in messages]
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
        ids += frame_tokens(encode_media(part), config)
        ids += tokenizer.encode_part(CLOSE) + tokenizer.encode_part(text)
    return ids


def chat_length(
    template: str,
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    config: LlamaConfig,
    count_frames: Callable[[Part], int],
) -> int:
    """Return the number of tokens of `chat_tokens`, without encoding any image or video."""
    vision = require_vision(config)
    frames: list[int] = []

    def one_frame(part: Part) -> np.ndarray:
        frames.append(count_frames(part))
        return np.zeros((1, vision.codes_per_frame), np.int32)

    tokens = chat_tokens(template, messages, tokenizer, config, one_frame)
    return len(tokens) + sum(count - 1 for count in frames) * vision.tokens_per_frame


def codes_from_part(part: Part) -> np.ndarray:
    """Return the codes in a part `{"type": "codes", "codes": [[...], ...]}`, one row per frame."""
    kind = part.get("type")
    if kind != "codes":
        raise InputError(
            f"the message has a part of type {kind!r}; 'text' and 'codes' are supported, and "
            "'image', 'video', 'image_url' and 'video_url' where the model has a VQGAN"
        )
    return integer_array(part.get("codes"), "the codes of a message", "frames, codes_per_frame")


def integer_array(value: Any, name: str, axes: str) -> np.ndarray:
    """Return an array of whole numbers with the axes that `axes` lists, or refuse the value."""
    array = as_array(value)
    if array.ndim != len(axes.split(", ")) or not np.issubdtype(array.dtype, np.integer):
        raise InputError(
            f"{name} have shape {list(array.shape)} and type {array.dtype}; whole numbers "
            f"[{axes}] are needed"
        )
    return array


def as_array(value: Any) -> np.ndarray:
    """Return an array; an empty one of objects if rows have different lengths."""
    try:
        return np.asarray(value)
    except (ValueError, TypeError, OverflowError):
        return np.array([], object)


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


def replace_media(message: Message, replacement: Callable[[Part], Part]) -> Message:
    """Return a message with its images and videos replaced by other parts."""
    if not isinstance(message.get("content"), list):
        return message
    content = [x if x.get("type") == "text" else replacement(x) for x in _parts(message)]
    return {**message, "content": content}
