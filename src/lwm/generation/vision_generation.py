"""Pictures and videos from words: prompts into codes, codes into pixels.

Puts prompts, frames and a codec together; how frames are drawn is in `frames`, and what a codec is
inside is the vision room's affair.

Source: LargeWorldModel/LWM; the first frame of a video is drawn as a picture.
"""

from dataclasses import replace
from math import isqrt
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from lwm.core.errors import ConfigError, InputError
from lwm.data.text.tokenizer import Tokenizer
from lwm.engine.sampling import Sampling
from lwm.generation.frames import (
    IMAGE,
    VIDEO,
    EngineFor,
    FrameDone,
    FrameRequest,
    generate_frames,
    require_context,
    require_vision,
)
from lwm.generation.vision_prompts import begin, generation_prompt
from lwm.models.llama import LlamaConfig


@runtime_checkable
class ImageCodec(Protocol):
    """What turns pictures into codes and back, such as a VQGAN: pixels [n, height, width, 3] in
    [-1, 1], codes [n, rows, columns]. `config.image_size` is the side of the pictures."""

    @property
    def config(self) -> Any: ...

    def encode(self, pixels: Any, /) -> Any: ...

    def decode(self, codes: Any, /) -> Any: ...


def sampling_from(usual: Sampling, settings: dict[str, Any]) -> Sampling:
    """The usual settings with some of a user's own.

    Raises:
        ConfigError: one is not known or out of range.
    """
    try:
        return replace(usual, **settings)
    except TypeError as error:
        raise ConfigError(f"a setting is not known: {error}") from error


def image_codes(
    engine_for: EngineFor,
    config: LlamaConfig,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    count: int = 1,
    negative_prompt: str | None = None,
    sampling: Sampling = IMAGE,
    frame_done: FrameDone | None = None,
) -> Int[np.ndarray, "count 1 codes_per_frame"]:
    """Codes of pictures of a prompt; arguments and errors as for `Model.image`."""
    require_vision(config)
    wanted = FrameRequest(
        prompt=generation_prompt(tokenizer, prompt, "an image"),
        unconditional=_unwanted(tokenizer, negative_prompt, "an image"),
        count=count,
        sampling=sampling,
    )
    return generate_frames(engine_for, config, wanted, frame_done=frame_done)


def video_codes(
    engine_for: EngineFor,
    config: LlamaConfig,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    frames: int,
    count: int = 1,
    before: Any = None,
    negative_prompt: str | None = None,
    sampling: Sampling = VIDEO,
    first_sampling: Sampling = IMAGE,
    frame_done: FrameDone | None = None,
) -> Int[np.ndarray, "count frames codes_per_frame"]:
    """Codes of videos of a prompt, the earlier frames included; arguments and errors as for
    `Model.video`.

    Args:
        first_sampling: how the first frame is drawn where none is given.
        frame_done: told of the first frame too, which is frame 0; frames that were given are not
            told of.
    """
    vision = require_vision(config)
    if before is not None:
        before = _rectangle(before)
    given = 0 if before is None else before.shape[1]
    if frames <= given:
        raise InputError(
            f"frames is {frames} and {given} are there already; ask for at least {given + 1}"
        )
    earlier = max(1, given)
    placeholder = np.zeros((1, 1, vision.codes_per_frame), np.int32)
    rest = FrameRequest(
        prompt=generation_prompt(tokenizer, prompt, "a video"),
        unconditional=_unwanted(tokenizer, negative_prompt, "a video"),
        frames=max(1, frames - earlier),
        count=count,
        before=placeholder if before is None else before,
        sampling=sampling,
    )
    if frames > earlier:
        require_context(rest, config)  # before the first frame takes its time
    if before is None:
        before = image_codes(
            engine_for, config, tokenizer, prompt, count=count, negative_prompt=negative_prompt,
            sampling=first_sampling, frame_done=frame_done,
        )  # fmt: skip
    if frames == earlier:
        return before

    def told(video: int, frame: int, codes: np.ndarray) -> None:
        if frame_done is not None:
            frame_done(video, frame + earlier, codes)

    after = generate_frames(engine_for, config, replace(rest, before=before), frame_done=told)
    return np.concatenate([np.broadcast_to(before, (count, *before.shape[1:])), after], axis=1)


def decode_frames(
    codec: ImageCodec, codes: Int[np.ndarray, "videos frames codes_per_frame"]
) -> UInt8[np.ndarray, "videos frames height width 3"]:
    """Pixels of frames, from 0 to 255."""
    side = isqrt(codes.shape[-1])
    if side * side != codes.shape[-1]:
        raise ConfigError(
            f"a frame has {codes.shape[-1]} codes, which make no square; the model's "
            "codes_per_frame is not that of a VQGAN"
        )
    pixels = np.asarray(codec.decode(codes.reshape(-1, side, side)), np.float32)
    whole = np.clip((pixels + 1) * 127.5, 0, 255).astype(np.uint8)
    return whole.reshape(*codes.shape[:2], *whole.shape[1:])


def _rectangle(codes: Any) -> Int[np.ndarray, "videos frames codes_per_frame"]:
    """Raises:
    InputError: they are no codes of frames of videos.
    """
    try:
        array = np.asarray(codes)
    except ValueError:  # rows of different lengths
        array = np.array([])
    if array.ndim != 3 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(
            f"earlier frames have shape {list(array.shape)} and type {array.dtype}; codes "
            "[videos, frames, codes of a frame] are needed"
        )
    return array


def _unwanted(tokenizer: Tokenizer, negative_prompt: str | None, kind: str) -> list[int]:
    """The prompt that guides away: nothing at all but that frames begin, as the original's, unless
    told otherwise."""
    if negative_prompt is None:
        return begin(tokenizer)
    return generation_prompt(tokenizer, negative_prompt, kind)
