"""Frames of pictures and videos as codes, several at once in one engine.

Frames are drawn like text, a code at a time; what differs is which ids may come next, and that a
second prompt guides the first. Knows token ids; knows no text, no files and no pixels.

Source: LargeWorldModel paper (arXiv 2402.08268), section 4.1; classifier-free guidance, Ho &
Salimans 2022 (arXiv 2207.12598).
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Int

from lwm.core.errors import CapacityError, InputError
from lwm.core.progress import progress
from lwm.engine.engine import Engine
from lwm.engine.request import Request
from lwm.engine.sampling import Sampling
from lwm.models.llama import LlamaConfig
from lwm.models.vision_tokens import VisionVocabulary

IMAGE = Sampling(temperature=1.0, top_k=8192, guidance=5.0)
VIDEO = Sampling(temperature=1.0, top_k=1000, guidance=1.0)
"""The original's settings."""

FrameDone = Callable[[int, int, Int[np.ndarray, " codes_per_frame"]], None]
"""Told of each frame as it is done: which of the videos, which of its new frames, the codes."""


EngineFor = Callable[[int, int, int], Engine]
"""(tokens of the prompt, tokens behind it, slots) -> an engine that has room for them."""


def require_vision(config: LlamaConfig) -> VisionVocabulary:
    """Raises:
    InputError: the model does not see.
    """
    if config.vision is None:
        raise InputError(
            "this is a text model, which neither sees nor draws; load one that does, or give it a "
            "vision table with 'lwm convert --add-vision' and train it"
        )
    return config.vision


def frame_tokens(
    codes: Int[np.ndarray, "frames codes_per_frame"], config: LlamaConfig, *, ended: bool = True
) -> list[int]:
    """Ids of the one table for frames: the codes of each and the token that ends it.

    Args:
        ended: whether the last frame ends the video; else another is to follow.

    Raises:
        InputError: the model does not see, or the codes are not of its frames or its codebook.
    """
    ids = require_vision(config).interleave(np.asarray(codes), ended=ended)
    return (ids + config.vocab_size).tolist()


@dataclass(frozen=True)
class AllowedFrameIds:
    """The ids that may come next in `frames` frames: codes, and after each frame its end alone."""

    vision: VisionVocabulary
    first: int  # the id of code 0
    frames: int

    def __call__(self, answered: int) -> range:
        ids = self.vision.ids_at(answered, self.frames)
        return range(self.first + ids.start, self.first + ids.stop)


@dataclass(frozen=True, kw_only=True)
class FrameRequest:
    """Frames to draw, the same for each of `count` pictures or videos.

    Args:
        prompt: ids up to where the frames begin.
        unconditional: ids of the prompt that guides it away.
        frames: how many new ones.
        before: codes of frames that are there already, [1 or count, frames, codes_per_frame].
        sampling: the seed is that of the first; the next ones have the seeds after it. Guidance of
            1 takes the prompt alone, and half the time.
    """

    prompt: Sequence[int]
    unconditional: Sequence[int]
    frames: int = 1
    count: int = 1
    before: Int[np.ndarray, "videos frames codes_per_frame"] | None = None
    sampling: Sampling = field(default_factory=lambda: IMAGE)

    def __post_init__(self) -> None:
        for name in ("frames", "count"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.before is not None and len(self.before) not in (1, self.count):
            raise InputError(
                f"earlier frames of {len(self.before)} videos are given and {self.count} are "
                "asked for; give those of one or of each"
            )

    @property
    def guided(self) -> bool:
        return self.sampling.guidance != 1

    @property
    def slots(self) -> int:
        """Of the engine, for all to run at once."""
        return self.count * (2 if self.guided else 1)

    def positions(self, vision: VisionVocabulary) -> tuple[int, int]:
        """Tokens of the longest prompt, earlier frames included, and of what is drawn behind it.

        The token that ends the last frame is certain, so it is not drawn.
        """
        earlier = 0 if self.before is None else self.before.shape[1]
        prompt = max(len(self.prompt), len(self.unconditional) if self.guided else 0)
        drawn = self.frames * vision.tokens_per_frame - 1
        return prompt + earlier * vision.tokens_per_frame, drawn


def require_context(wanted: FrameRequest, config: LlamaConfig) -> None:
    """Refuses frames that go beyond the model's context.

    Raises:
        CapacityError: says how many frames would fit.
        InputError: the model does not see.
    """
    vision = require_vision(config)
    behind, drawn = wanted.positions(vision)
    limit, size = config.max_sequence_length, vision.tokens_per_frame
    if behind + drawn > limit:
        earlier = 0 if wanted.before is None else wanted.before.shape[1]
        prompt = behind - earlier * size
        raise CapacityError(
            f"{earlier + wanted.frames} frames of {size} tokens behind a prompt of {prompt:,} "
            f"make {behind + drawn:,} and the model's context is {limit:,}; ask for at most "
            f"{max(0, (limit - prompt + 1) // size)} or take a model of longer context"
        )


def generate_frames(
    engine_for: EngineFor,
    config: LlamaConfig,
    wanted: FrameRequest,
    *,
    frame_done: FrameDone | None = None,
) -> Int[np.ndarray, "count frames codes_per_frame"]:
    """Codes of new frames, all videos at once as far as the engine has slots.

    Raises:
        InputError: the model does not see, or earlier frames are not of its kind.
        CapacityError: the frames go beyond the context, or the cache does not fit into memory.
    """
    require_context(wanted, config)
    vision = require_vision(config)
    prompt, drawn = wanted.positions(vision)
    requests = _requests(wanted, config, drawn)
    engine = engine_for(prompt, drawn, wanted.slots)
    numbers = [engine.submit(request) for request in requests]
    rows: dict[int, list[int]] = {number: [] for number in numbers}
    size = vision.tokens_per_frame
    drawing = progress("drawing", len(numbers) * drawn)
    # Closed outright: whoever is told of a frame may have had enough.
    with drawing as advance, closing(engine.follow(numbers)) as tokens:
        for token in tokens:
            assert token.token is not None
            row = rows[token.request]
            row.append(token.token - config.vocab_size)
            advance()
            if frame_done is not None and len(row) % size == vision.codes_per_frame:
                codes = np.array(row[-vision.codes_per_frame :], np.int32)
                frame_done(numbers.index(token.request), len(row) // size, codes)
    whole = np.array([[*rows[number], vision.end_of_video] for number in numbers], np.int32)
    return np.stack([vision.split(ids) for ids in whole])


def _requests(wanted: FrameRequest, config: LlamaConfig, drawn: int) -> list[Request]:
    requests = []
    for i in range(wanted.count):
        earlier: list[int] = []
        if wanted.before is not None and wanted.before.shape[1]:
            codes = wanted.before[i if len(wanted.before) > 1 else 0]
            earlier = frame_tokens(codes, config, ended=False)
        requests.append(
            Request(
                prompt=[*wanted.prompt, *earlier],
                unconditional=[*wanted.unconditional, *earlier] if wanted.guided else None,
                max_tokens=drawn,
                sampling=replace(wanted.sampling, seed=(wanted.sampling.seed + i) % 2**32),
                allowed=AllowedFrameIds(require_vision(config), config.vocab_size, wanted.frames),
            )
        )
    return requests
