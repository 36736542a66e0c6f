"""Generate the codes of images and videos, several at a time in one engine.

Frames are generated like text, one code at a time, except that the place in a frame decides which
ids may come next, and that a second prompt guides the first one. The first frame of a video is
generated as an image, as in the original.

Source: LargeWorldModel paper (arXiv 2402.08268), section 4.1; classifier-free guidance, Ho &
Salimans 2022 (arXiv 2207.12598).
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge
from jaxtyping import Int

from lwm.core.config import Checked
from lwm.core.errors import CapacityError, InputError
from lwm.core.progress import progress
from lwm.data.text.tokenizer import Tokenizer
from lwm.engine.engine import Engine
from lwm.engine.request import Request
from lwm.engine.sampling import Sampling
from lwm.generation.vision_prompts import (
    frame_tokens,
    generation_prompt,
    integer_array,
    require_vision,
    start_of_frames,
)
from lwm.models.llama import LlamaConfig
from lwm.models.vision_tokens import VisionVocabulary

IMAGE = Sampling(temperature=1.0, top_k=8192, guidance=5.0)
"""The original's settings for images, and for the first frame of a video."""
VIDEO = Sampling(temperature=1.0, top_k=1000, guidance=1.0)
"""The original's settings for the other frames of a video."""


def default_sampling(config: LlamaConfig) -> tuple[Sampling, Sampling]:
    """Return a model's settings for images and first frames, and for later frames.

    The original's, except what its `VisionVocabulary` sets.
    """
    vision = require_vision(config)
    first = replace(IMAGE, guidance=vision.guidance, min_p=vision.min_p)
    return first, replace(VIDEO, min_p=vision.min_p)


FrameDone = Callable[[int, int, Int[np.ndarray, " codes_per_frame"]], None]
"""Called with each finished frame: the index of its video, the index of the frame, its codes."""

EngineFor = Callable[[int, int, int], Engine]
"""(tokens of the prompt, tokens to generate, slots) -> an engine with room for them."""


@dataclass(frozen=True, kw_only=True)
class FrameRequest(Checked):
    """Describe the frames to generate for each of `count` images or videos.

    Args:
        prompt: ids up to where the frames begin.
        unconditional: ids of the prompt that guidance leads away from.
        frames: number of new frames.
        before: codes of earlier frames, of one video or of each.
        sampling: the seed is that of the first video; the next ones have the seeds after it.
    """

    prompt: Sequence[int]
    unconditional: Sequence[int]
    frames: Annotated[int, Ge(1)] = 1
    count: Annotated[int, Ge(1)] = 1
    before: Int[np.ndarray, "videos frames codes_per_frame"] | None = None
    sampling: Sampling = field(default_factory=lambda: IMAGE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.before is not None and len(self.before) not in (1, self.count):
            raise InputError(
                f"there are earlier frames of {len(self.before)} videos, but {self.count} are to "
                "be generated; give those of one video or of each"
            )

    @property
    def _guided(self) -> bool:
        return self.sampling.guidance != 1

    @property
    def earlier(self) -> int:
        """Return the number of earlier frames."""
        return 0 if self.before is None else self.before.shape[1]

    def length(self, vision: VisionVocabulary) -> tuple[int, int]:
        """Return the tokens of the longest prompt with earlier frames, and those to generate."""
        prompt = max(len(self.prompt), len(self.unconditional) if self._guided else 0)
        size = vision.tokens_per_frame
        # The token that ends the last frame is certain, so it is not generated.
        return prompt + self.earlier * size, self.frames * size - 1

    def requests(self, config: LlamaConfig) -> list[Request]:
        """Build the engine's request for each video."""
        vision = require_vision(config)

        def allowed(answered: int) -> range:
            ids = vision.ids_at(answered, self.frames)
            return range(ids.start + config.vocab_size, ids.stop + config.vocab_size)

        def build(index: int) -> Request:
            earlier: list[int] = []
            if self.before is not None:
                codes = self.before[index % len(self.before)]
                earlier = frame_tokens(codes, config, ended=False)
            return Request(
                prompt=[*self.prompt, *earlier],
                unconditional=[*self.unconditional, *earlier] if self._guided else None,
                max_tokens=self.length(vision)[1],
                sampling=replace(self.sampling, seed=(self.sampling.seed + index) % 2**32),
                allowed=allowed,
            )

        return [build(index) for index in range(self.count)]

    def require_context(self, config: LlamaConfig) -> None:
        """Refuse frames that exceed the model's context, or a text model."""
        vision = require_vision(config)
        limit, size = config.generation_length, vision.tokens_per_frame
        total, frames = sum(self.length(vision)), self.earlier + self.frames
        if total > limit:
            prompt = total + 1 - frames * size
            raise CapacityError(
                f"{frames} frames of {size} tokens after a prompt of {prompt:,} make {total:,} "
                f"and the model's context is {limit:,}; generate at most "
                f"{max(0, (limit - prompt + 1) // size)} or use a model of longer context"
            )


def generate_frames(
    engine_for: EngineFor,
    config: LlamaConfig,
    request: FrameRequest,
    *,
    frame_done: FrameDone | None = None,
) -> Int[np.ndarray, "count frames codes_per_frame"]:
    """Generate the codes of new frames, all videos at once as far as the engine has slots."""
    request.require_context(config)
    vision = require_vision(config)
    requests = request.requests(config)
    prompt, new = request.length(vision)
    slots = sum(len(one.prompts) for one in requests)
    engine = engine_for(prompt, new, slots)
    numbers = [engine.submit(one) for one in requests]
    rows: dict[int, list[int]] = {number: [] for number in numbers}
    generating = progress("generating", len(numbers) * new)
    # Closed explicitly, because `frame_done` may raise.
    with generating as advance, closing(engine.follow(numbers)) as tokens:
        for token in tokens:
            assert token.token is not None
            row = rows[token.request]
            row.append(token.token - config.vocab_size)
            advance()
            frame, place = divmod(len(row), vision.tokens_per_frame)
            if frame_done is not None and place == vision.codes_per_frame:
                codes = np.array(row[-vision.codes_per_frame :], np.int32)
                frame_done(numbers.index(token.request), request.earlier + frame, codes)
    ids = np.array([[*rows[number], vision.end_of_video] for number in numbers], np.int32)
    return np.stack([vision.split(row) for row in ids])


@dataclass(frozen=True)
class EarlierFrames:
    """Hold the number of frames to continue, and a function that encodes them."""

    count: int
    encode: Callable[[], Int[np.ndarray, "videos frames codes_per_frame"]]


def video_codes(
    engine_for: EngineFor,
    config: LlamaConfig,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    frames: int,
    count: int = 1,
    before: EarlierFrames | Any = None,
    negative_prompt: str | None = None,
    sampling: Sampling = VIDEO,
    first_sampling: Sampling = IMAGE,
    frame_done: FrameDone | None = None,
) -> Int[np.ndarray, "count frames codes_per_frame"]:
    """Generate the codes of videos, and return them with those of earlier frames.

    Arguments are those of `Model.video`; a video of one frame is an image. `first_sampling` holds
    the settings for the first frame, if there are no earlier ones.
    """
    vision = require_vision(config)
    if before is not None and not isinstance(before, EarlierFrames):
        codes = integer_array(before, "earlier frames", "videos, frames, codes_per_frame")
        before = EarlierFrames(codes.shape[1], lambda: codes)
    existing = 0 if before is None else before.count
    if frames <= existing:
        raise InputError(
            f"frames is {frames} and there are {existing} already; request at least {existing + 1}"
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

    if frames > 1:  # refuse a video that is too long before a frame is encoded or generated
        placeholder = np.zeros((1, 1, vision.codes_per_frame), np.int32)
        request("a video", frames - 1, placeholder, sampling).require_context(config)
    if before is not None and existing:
        earlier = before.encode()
    else:
        first = request("an image", 1, None, first_sampling)
        earlier, existing = generate_frames(engine_for, config, first, frame_done=frame_done), 1
    if frames == existing:
        return earlier
    rest = request("a video", frames - existing, earlier, sampling)
    later = generate_frames(engine_for, config, rest, frame_done=frame_done)
    return np.concatenate([np.broadcast_to(earlier, (count, *earlier.shape[1:])), later], axis=1)
