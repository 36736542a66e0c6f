"""Hide a card among the frames of a long video, and ask what is on it.

The frames are encoded once; a case inserts the codes of its card among those of the video.

Source: visual needle in a haystack, V-NIAH, of LongVA (arXiv 2406.16852), section 4.1: single
frames with a known answer at several depths of videos of several lengths, judged by whether each
token of the answer is the likeliest.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge
from jaxtyping import Int

from lwm.core.config import Checked
from lwm.core.errors import CapacityError, InputError
from lwm.data.text.templates import ORIGINAL
from lwm.data.text.tokenizer import Tokenizer
from lwm.evaluation.results import Key
from lwm.evaluation.task import Case, Verdict
from lwm.evaluation.tasks.cards import Card, card_of, synthetic_frames
from lwm.generation.codec import ImageCodec, encode_frames
from lwm.generation.vision_prompts import chat_tokens, codes_from_part, require_vision
from lwm.media.videos import count_frames, iterate_frames
from lwm.models.llama import LlamaConfig


def haystack_codes(
    codec: ImageCodec, count: int, video: Path | None, fps: float = 1.0
) -> Int[np.ndarray, "frames codes_per_frame"]:
    """Encode the first frames of a video, or of a synthetic one; raise InputError if too few."""
    size = codec.config.image_size
    available = count if video is None else count_frames(video, fps=fps)
    if available < count:
        raise InputError(
            f"{video} gives {available:,} frames at {fps:g} a second and the longest case needs "
            f"{count:,}; name a longer --video, raise --fps, or shorten --frames"
        )
    frames: Iterable[np.ndarray] = (
        synthetic_frames(count, size)
        if video is None
        else islice(iterate_frames(video, size, fps=fps), count)
    )
    return encode_frames(codec, frames)


def _prompt(card: Card, codes: np.ndarray, tokenizer: Tokenizer, config: LlamaConfig) -> list[int]:
    content = [{"type": "text", "text": card.question}, {"type": "codes", "codes": codes}]
    message = {"role": "user", "content": content}
    return chat_tokens(ORIGINAL, [message], tokenizer, config, codes_from_part)


def require_context(
    tokenizer: Tokenizer, config: LlamaConfig, frames: int, seeds: Iterable[int], max_tokens: int
) -> None:
    """Raise CapacityError if the frames exceed the context with the question of any seed."""
    vision, limit = require_vision(config), config.generation_length
    frame = np.zeros((1, vision.codes_per_frame), np.int32)
    text = -vision.tokens_per_frame + max(
        len(_prompt(card, frame, tokenizer, config))
        + max(max_tokens, len(tokenizer.encode(card.answer, specials=False)))
        for card in map(card_of, seeds)
    )
    needed = text + frames * vision.tokens_per_frame
    if needed > limit:
        most = max(0, (limit - text) // vision.tokens_per_frame)
        raise CapacityError(
            f"{frames:,} frames with question and answer are {needed:,} tokens and the model's "
            f"context is {limit:,}; show at most {most:,} --frames, or extend the context with "
            "--theta"
        )


@dataclass(frozen=True, kw_only=True)
class VideoNeedleTask(Checked):
    """Ask for cards that are hidden in a video; `cards` are the codes from `card_of(seed)` on."""

    tokenizer: Tokenizer
    config: LlamaConfig
    video: Int[np.ndarray, "video_frames codes_per_frame"]
    cards: Int[np.ndarray, "rounds codes_per_frame"]
    frames: Sequence[int]
    depths: Sequence[float]
    seed: int = 0
    max_tokens: Annotated[int, Ge(1)] = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.video) < max(self.frames) - 1:
            raise InputError(
                f"the video has {len(self.video):,} frames and the longest case needs "
                f"{max(self.frames) - 1:,}; name a longer one"
            )
        seeds = range(self.seed, self.seed + len(self.cards))
        require_context(self.tokenizer, self.config, max(self.frames), seeds, self.max_tokens)

    @property
    def name(self) -> str:
        return "video-needle"

    def units(self) -> list[list[Key]]:
        return [
            [{"frames": n, "depth_percent": depth, "seed": seed} for depth in self.depths]
            for n in self.frames
            for seed in range(self.seed, self.seed + len(self.cards))
        ]

    def case(self, key: Key) -> Case:
        frames, seed = int(key["frames"]), int(key["seed"])
        index = round(float(key["depth_percent"]) / 100 * (frames - 1))
        card, rest = card_of(seed), self.video[: frames - 1]
        codes = np.insert(rest, index, self.cards[seed - self.seed], axis=0)
        prompt = _prompt(card, codes, self.tokenizer, self.config)
        return Case(
            prompt=prompt,
            # Encoded separately from the prompt, as training does.
            target=self.tokenizer.encode(card.answer, specials=False),
            max_tokens=self.max_tokens,
            reference=card.answer,
            columns={
                "question": card.question, "asks": card.kind, "place": index + 1,
                "context_tokens": len(prompt), "seed": seed,
            },
        )  # fmt: skip

    def judge(self, case: Case, response: str) -> Verdict:
        return card_of(int(case.columns["seed"])).judge(response)
