"""A card with a drawing, hidden among the frames of a long video: what is on it?

Cards are drawn here, so that their answers are known and as many can be had as are wanted; the
video is a file or is made up. Frames become codes once, some at a time; a case puts codes of the
card among those of the video. Knows a codec and the prompt's words; knows no engine and no files
of results.

Source: visual needle in a haystack, V-NIAH, of LongVA (arXiv 2406.16852), section 4.1: single
frames with a known answer at several depths of videos of several lengths, judged by whether each
token of the answer is the likeliest.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from lwm.core.errors import CapacityError, ConfigError, InputError
from lwm.data.text.templates import ORIGINAL
from lwm.data.text.tokenizer import Tokenizer
from lwm.evaluation.case import Case, Key, Verdict
from lwm.generation.codec import ImageCodec, encode_frames
from lwm.generation.frames import require_vision
from lwm.generation.vision_prompts import chat_tokens, codes_from_part
from lwm.media.videos import iterate_frames
from lwm.models.llama import LlamaConfig

ROUNDS = 4
"""As many as there are kinds of questions."""
_SCENE = 24  # frames of a made-up video between two cuts
_FINE = 4  # cards are drawn so many times larger, for smooth edges

COLOURS = {
    "red": (214, 32, 32), "orange": (245, 138, 18), "yellow": (242, 210, 20),
    "green": (24, 140, 52), "blue": (28, 72, 206), "purple": (122, 36, 160),
    "pink": (246, 130, 184), "black": (16, 16, 16),
}  # fmt: skip
# Corners round (0, 0), downwards; a circle is drawn as one.
_SHAPES: dict[str, Sequence[tuple[float, float]]] = {
    "circle": (),
    "square": ((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)),
    "triangle": ((0, -0.95), (0.95, 0.75), (-0.95, 0.75)),
    "star": [
        (r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5))
        for i in range(10)
        for r in [0.42 if i % 2 else 1.0]
    ],
    "cross": (
        (0.3, -0.9), (0.3, -0.3), (0.9, -0.3), (0.9, 0.3), (0.3, 0.3), (0.3, 0.9),
        (-0.3, 0.9), (-0.3, 0.3), (-0.9, 0.3), (-0.9, -0.3), (-0.3, -0.3), (-0.3, -0.9),
    ),
}  # fmt: skip
_NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
_DIGITS = tuple(str(n) for n in range(2, 10))  # "one" is said of many things

Kind = Literal["colour", "shape", "digit", "count"]
_ANSWERS: dict[Kind, tuple[str, ...]] = {
    "colour": tuple(COLOURS), "shape": tuple(_SHAPES), "digit": _DIGITS, "count": _DIGITS,
}  # fmt: skip
_QUESTIONS: dict[Kind, str] = {
    "colour": "a white card with one {shape}. What colour is the {shape}?",
    "shape": "a white card with one {colour} shape. Which shape is it?",
    "digit": "a white card with one large {colour} digit. Which digit is it?",
    "count": "a white card with {colour} dots. How many dots are there?",
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is on a card, and which of it is asked."""

    kind: Kind
    colour: str
    shape: str
    digit: str
    seed: int

    @property
    def question(self) -> str:
        what = _QUESTIONS[self.kind].format(shape=self.shape, colour=self.colour)
        return f"One picture does not belong to this video: {what} Answer in one word."

    @property
    def answer(self) -> str:
        return {"colour": self.colour, "shape": self.shape}.get(self.kind, self.digit)

    def judge(self, response: str) -> bool:
        """Whether a response says the answer as a word, and none of those it might have been
        else."""
        words = {
            _DIGITS[_NUMBERS.index(word)] if word in _NUMBERS else word
            for word in re.findall(r"[a-z]+|[0-9]+", response.lower())
        }
        return words & set(_ANSWERS[self.kind]) == {self.answer}


def card_of(seed: int) -> Card:
    """The card of a seed; kinds of questions take turns."""
    draw = np.random.default_rng([seed, 1])
    return Card(
        kind=tuple(_ANSWERS)[seed % len(_ANSWERS)],
        colour=str(draw.choice(list(COLOURS))),
        shape=str(draw.choice(list(_SHAPES))),
        digit=str(draw.choice(_DIGITS)),
        seed=seed,
    )


def paint(card: Card, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The card as a frame."""
    side = size * _FINE
    image = Image.new("RGB", (side, side), "white")
    pen, ink = ImageDraw.Draw(image), COLOURS[card.colour]
    edge = max(1, side // 40)
    pen.rectangle((0, 0, side - 1, side - 1), outline=(60, 60, 60), width=edge)
    if card.kind == "digit":
        # The same glyph in every size: drawn large, cut out, brought to the card's.
        mask, font = Image.new("L", (512, 512)), ImageFont.load_default(size=400)
        ImageDraw.Draw(mask).text(
            (256, 256), card.digit, fill=255, font=font, anchor="mm", stroke_width=14
        )
        glyph = mask.crop(mask.getbbox())
        height = round(side * 0.72)
        glyph = glyph.resize((round(glyph.width * height / glyph.height), height))
        image.paste(ink, ((side - glyph.width) // 2, (side - height) // 2), glyph)
    elif card.kind == "count":
        places = np.random.default_rng([card.seed, 2]).permutation(9)[: int(card.digit)]
        for row, column in (divmod(int(place), 3) for place in places):
            _shape(pen, "circle", (side * (column + 1) / 4, side * (row + 1) / 4), side / 11, ink)
    else:
        _shape(pen, card.shape, (side / 2, side / 2), side * 0.36, ink)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def _shape(
    pen: ImageDraw.ImageDraw,
    shape: str,
    middle: tuple[float, float],
    radius: float,
    ink: tuple[int, int, int],
) -> None:
    x, y = middle
    corners = _SHAPES[shape]
    if corners:
        pen.polygon([(x + radius * a, y + radius * b) for a, b in corners], fill=ink)
    else:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)


def made_up_frames(
    count: int, size: int, seed: int = 0
) -> Iterator[UInt8[np.ndarray, "size size 3"]]:
    """A video of scenes in which soft patches of muted colours drift over each other."""
    for first in range(0, count, _SCENE):
        draw = np.random.default_rng([seed, first])
        low = draw.integers(0, 120, 3)
        patches = [draw.integers(low, low + 100, (n, n, 3)).astype(np.uint8) for n in (4, 9)]
        layers = [
            Image.fromarray(patch).resize((2 * size, 2 * size), Image.Resampling.BICUBIC)
            for patch in patches
        ]
        ways = draw.uniform(-1, 1, (2, 2))
        for moment in range(min(_SCENE, count - first)):
            corners = np.round(size / 2 * (1 + ways * (2 * moment / _SCENE - 1))).astype(int)
            far, near = (
                layer.crop((x, y, x + size, y + size))
                for layer, (x, y) in zip(layers, corners.tolist(), strict=True)
            )
            yield np.asarray(Image.blend(far, near, 0.4))


def haystack_codes(
    codec: ImageCodec, count: int, video: Path | None, fps: float = 1.0
) -> Int[np.ndarray, "frames codes_per_frame"]:
    """Codes of the first frames of a video, or of a made-up one.

    Args:
        fps: frames taken for a second of the video.

    Raises:
        InputError: the video cannot be read, or is too short.
    """
    size = codec.config.image_size
    frames: Iterable[np.ndarray] = (
        made_up_frames(count, size)
        if video is None
        else islice(iterate_frames(video, size, fps=fps), count)
    )
    codes = encode_frames(codec, frames)
    if len(codes) < count:
        raise InputError(
            f"{video} gives {len(codes):,} frames at {fps:g} a second and the longest case needs "
            f"{count:,}; name a longer --video, raise --fps, or shorten --frames"
        )
    return codes


def _prompt(card: Card, codes: np.ndarray, tokenizer: Tokenizer, config: LlamaConfig) -> list[int]:
    """In the words that models learn to see by."""
    content = [{"type": "text", "text": card.question}, {"type": "codes", "codes": codes}]
    message = {"role": "user", "content": content}
    return chat_tokens(ORIGINAL, [message], tokenizer, config, codes_from_part)


def _answer(card: Card, tokenizer: Tokenizer) -> list[int]:
    """By itself, as training writes what is said about a picture."""
    return tokenizer.encode(card.answer, specials=False)


def require_room(
    tokenizer: Tokenizer, config: LlamaConfig, frames: int, seeds: Iterable[int], max_tokens: int
) -> None:
    """Raises:
    InputError: the model does not see.
    CapacityError: so many frames with any of the seeds' questions are beyond its context.
    """
    vision, limit = require_vision(config), config.max_sequence_length
    one = np.zeros((1, vision.codes_per_frame), np.int32)
    words = (
        max(
            len(_prompt(card, one, tokenizer, config))
            + max(max_tokens, len(_answer(card, tokenizer)))
            for card in map(card_of, seeds)
        )
        - vision.tokens_per_frame
    )
    needed = words + frames * vision.tokens_per_frame
    if needed > limit:
        most = max(0, (limit - words) // vision.tokens_per_frame)
        raise CapacityError(
            f"{frames:,} frames with question and answer are {needed:,} tokens and the model's "
            f"context is {limit:,}; show at most {most:,} --frames, or give a larger --theta to "
            "go beyond it"
        )


@dataclass(frozen=True, kw_only=True)
class VideoNeedleTask:
    """Cards in a video.

    Args:
        video: codes of its frames, at least one less than the most of `frames`.
        cards: codes of each round's card, from `card_of(seed)` on.
        frames: of the whole video that is shown, the card's among them.
        depths: per cent of the video before the card.
        seed: of the first card; the following count on.

    Raises:
        InputError: the model does not see, or the video is too short.
        CapacityError: the longest video is beyond the model's context.
    """

    tokenizer: Tokenizer
    config: LlamaConfig
    video: Int[np.ndarray, "video_frames codes_per_frame"]
    cards: Int[np.ndarray, "rounds codes_per_frame"]
    frames: Sequence[int]
    depths: Sequence[float]
    seed: int = 0
    max_tokens: int = 16

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if len(self.video) < max(self.frames) - 1:
            raise InputError(
                f"the video has {len(self.video):,} frames and the longest case needs "
                f"{max(self.frames) - 1:,}; name a longer one"
            )
        seeds = range(self.seed, self.seed + len(self.cards))
        require_room(self.tokenizer, self.config, max(self.frames), seeds, self.max_tokens)

    @property
    def name(self) -> str:
        return "video-needle"

    def units(self) -> list[list[Key]]:
        return [
            [
                {"frames": frames, "depth_percent": depth, "seed": self.seed + number}
                for depth in self.depths
            ]
            for frames in self.frames
            for number in range(len(self.cards))
        ]

    def case(self, key: Key) -> Case:
        frames, seed = int(key["frames"]), int(key["seed"])
        place = round(float(key["depth_percent"]) / 100 * (frames - 1))
        card, rest = card_of(seed), self.video[: frames - 1]
        codes = np.insert(rest, place, self.cards[seed - self.seed], axis=0)
        prompt = _prompt(card, codes, self.tokenizer, self.config)
        return Case(
            prompt=prompt,
            target=_answer(card, self.tokenizer),
            max_tokens=self.max_tokens,
            reference=card.answer,
            told={
                "question": card.question, "asks": card.kind, "place": place + 1,
                "context_tokens": len(prompt), "seed": seed,
            },
        )  # fmt: skip

    def judge(self, case: Case, response: str) -> Verdict:
        correct = card_of(int(case.told["seed"])).judge(response)
        return Verdict(correct=correct, score=float(correct))
