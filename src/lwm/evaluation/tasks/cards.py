"""Draw the cards of the video needle test, and a synthetic video to hide them in.

Cards are drawn from a seed, so their answers are known.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

_Ink = tuple[int, int, int]
_SCENE = 24  # frames of a synthetic video between two cuts
_SUPERSAMPLING = 4  # cards are drawn larger and reduced, for smooth edges

COLORS = {
    "red": (214, 32, 32), "orange": (245, 138, 18), "yellow": (242, 210, 20),
    "green": (24, 140, 52), "blue": (28, 72, 206), "purple": (122, 36, 160),
    "pink": (246, 130, 184), "black": (16, 16, 16),
}  # fmt: skip
# Corners around (0, 0), y downwards; a circle has none.
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
_DIGITS = tuple(str(n) for n in range(2, 10))  # "one" occurs in most answers

CardKind = Literal["color", "shape", "digit", "count"]
_ANSWERS: dict[CardKind, tuple[str, ...]] = {
    "color": tuple(COLORS), "shape": tuple(_SHAPES), "digit": _DIGITS, "count": _DIGITS,
}  # fmt: skip
_QUESTIONS: dict[CardKind, str] = {
    "color": "a white card with one {shape}. What color is the {shape}?",
    "shape": "a white card with one {color} shape. Which shape is it?",
    "digit": "a white card with one large {color} digit. Which digit is it?",
    "count": "a white card with {color} dots. How many dots are there?",
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """Describe what a card shows, and which part of it the question is about."""

    kind: CardKind
    color: str
    shape: str
    digit: str
    seed: int

    @property
    def question(self) -> str:
        """Return the question."""
        what = _QUESTIONS[self.kind].format(shape=self.shape, color=self.color)
        return f"One picture does not belong to this video: {what} Answer in one word."

    @property
    def answer(self) -> str:
        """Return the answer, one word."""
        return {"color": self.color, "shape": self.shape}.get(self.kind, self.digit)

    def judge(self, response: str) -> bool:
        """Return whether a response has the answer as a word, and no other possible answer."""
        words = {
            _DIGITS[_NUMBERS.index(word)] if word in _NUMBERS else word
            for word in re.findall(r"[a-z]+|[0-9]+", response.lower())
        }
        return words & set(_ANSWERS[self.kind]) == {self.answer}


def card_of(seed: int) -> Card:
    """Return the card of a seed; consecutive seeds have different kinds of questions."""
    rng = np.random.default_rng([seed, 1])
    return Card(
        kind=tuple(_ANSWERS)[seed % len(_ANSWERS)],
        color=str(rng.choice(list(COLORS))),
        shape=str(rng.choice(list(_SHAPES))),
        digit=str(rng.choice(_DIGITS)),
        seed=seed,
    )


def paint(card: Card, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Draw a card as a frame."""
    side = size * _SUPERSAMPLING
    image = Image.new("RGB", (side, side), "white")
    canvas, ink = ImageDraw.Draw(image), COLORS[card.color]
    edge = max(1, side // 40)
    canvas.rectangle((0, 0, side - 1, side - 1), outline=(60, 60, 60), width=edge)
    if card.kind == "digit":
        _paint_digit(image, card.digit, ink)
    elif card.kind == "count":
        places = np.random.default_rng([card.seed, 2]).permutation(9)[: int(card.digit)]
        for row, column in (divmod(int(place), 3) for place in places):
            x, y = side * (column + 1) / 4, side * (row + 1) / 4
            _paint_shape(canvas, "circle", x, y, side / 11, ink)
    else:
        _paint_shape(canvas, card.shape, side / 2, side / 2, side * 0.36, ink)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def _paint_digit(image: Image.Image, digit: str, ink: _Ink) -> None:
    # Drawn large, cut out and scaled, the glyph is the same in every size.
    mask, font = Image.new("L", (512, 512)), ImageFont.load_default(size=400)
    ImageDraw.Draw(mask).text((256, 256), digit, fill=255, font=font, anchor="mm", stroke_width=14)
    glyph = mask.crop(mask.getbbox())
    height = round(image.height * 0.72)
    glyph = glyph.resize((round(glyph.width * height / glyph.height), height))
    image.paste(ink, ((image.width - glyph.width) // 2, (image.height - height) // 2), glyph)


def _paint_shape(
    canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, ink: _Ink
) -> None:
    corners = _SHAPES[shape]
    if corners:
        canvas.polygon([(x + radius * a, y + radius * b) for a, b in corners], fill=ink)
    else:
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)


def synthetic_frames(
    count: int, size: int, seed: int = 0
) -> Iterator[UInt8[np.ndarray, "size size 3"]]:
    """Yield the frames of a video of scenes with drifting soft patches of muted colors."""
    for first in range(0, count, _SCENE):
        rng = np.random.default_rng([seed, first])
        low = rng.integers(0, 120, 3)
        patches = [rng.integers(low, low + 100, (n, n, 3)).astype(np.uint8) for n in (4, 9)]
        layers = [
            Image.fromarray(patch).resize((2 * size, 2 * size), Image.Resampling.BICUBIC)
            for patch in patches
        ]
        directions = rng.uniform(-1, 1, (2, 2))
        for moment in range(min(_SCENE, count - first)):
            shift = directions * (2 * moment / _SCENE - 1)
            corners = np.round(size / 2 * (1 + shift)).astype(int)
            far, near = (
                layer.crop((x, y, x + size, y + size))
                for layer, (x, y) in zip(layers, corners.tolist(), strict=True)
            )
            yield np.asarray(Image.blend(far, near, 0.4))
