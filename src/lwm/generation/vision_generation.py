"""Generate the codes of images and videos from a prompt in words.

Source: LargeWorldModel/LWM; the first frame of a video is generated as an image.
"""

from typing import Any

import numpy as np
from jaxtyping import Int

from lwm.core.errors import InputError
from lwm.data.text.tokenizer import Tokenizer
from lwm.engine.sampling import Sampling
from lwm.generation.frames import (
    IMAGE,
    VIDEO,
    EngineFor,
    FrameDone,
    FrameRequest,
    generate_frames,
    require_vision,
)
from lwm.generation.vision_prompts import generation_prompt, start_of_frames
from lwm.models.llama import LlamaConfig


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
    """Generate the codes of videos, and return them with those of earlier frames.

    Arguments and errors are those of `Model.video`; a video of one frame is an image.

    Args:
        first_sampling: settings for the first frame, if there are no earlier frames.
        frame_done: called for the first frame too, as frame 0, but not for earlier frames.
    """
    vision = require_vision(config)
    earlier = None if before is None else _frame_codes(before)
    existing = 0 if earlier is None else earlier.shape[1]
    if frames <= existing:
        raise InputError(
            f"frames is {frames} and there are {existing} already; ask for at least {existing + 1}"
        )

    def request(kind: str, frames: int, codes: np.ndarray | None, how: Sampling) -> FrameRequest:
        if negative_prompt is None:  # an empty prompt, as in the original
            unconditional = start_of_frames(tokenizer)
        else:
            unconditional = generation_prompt(tokenizer, negative_prompt, kind)
        return FrameRequest(
            prompt=generation_prompt(tokenizer, prompt, kind),
            unconditional=unconditional,
            frames=frames,
            count=count,
            before=codes,
            sampling=how,
        )

    if earlier is None or not existing:
        if frames > 1:  # refuse a video that is too long before its first frame is generated
            placeholder = np.zeros((1, 1, vision.codes_per_frame), np.int32)
            request("a video", frames - 1, placeholder, sampling).require_context(config)
        first = request("an image", 1, None, first_sampling)
        earlier, existing = generate_frames(engine_for, config, first, frame_done=frame_done), 1
    if frames == existing:
        return earlier

    def later_frame_done(video: int, frame: int, codes: np.ndarray) -> None:
        if frame_done is not None:
            frame_done(video, frame + existing, codes)

    rest = request("a video", frames - existing, earlier, sampling)
    later = generate_frames(engine_for, config, rest, frame_done=later_frame_done)
    return np.concatenate([np.broadcast_to(earlier, (count, *earlier.shape[1:])), later], axis=1)


def _frame_codes(codes: Any) -> Int[np.ndarray, "videos frames codes_per_frame"]:
    try:
        array = np.asarray(codes)
    except ValueError:  # rows of different lengths
        array = np.array([])
    if array.ndim != 3 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(
            f"earlier frames have shape {list(array.shape)} and type {array.dtype}; codes "
            "[videos, frames, codes_per_frame] are needed"
        )
    return array
