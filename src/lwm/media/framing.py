"""The original's framing: the short side to a given size, then the centre cut out.

A picture may come as strips of rows, top to bottom, so that a large one is never whole in memory.
Pillow resizes in two passes, along the rows and then along the columns, and rounds to bytes
between them; done strip by strip, the first pass gives the very same bytes. Knows no files.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from lwm.core.errors import InputError

_MOST_PIXELS = 1 << 27  # of the picture between the passes, and of the resized one


def check_size(size: int) -> None:
    """Raises:
    InputError: the size is no sensible side of a square picture.
    """
    if not 1 <= size <= 8192:
        raise InputError(f"size is {size}; it must lie between 1 and 8192 pixels")


def resized_shape(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) with the short side at `size` and the long one rounded down."""
    if width < height:
        return size, size * height // width
    return size * width // height, size


def resize_strips(
    strips: Iterable[Image.Image], shape: tuple[int, int], to: tuple[int, int], name: str
) -> Image.Image:
    """What Pillow's `Image.resize` with its default filter makes of the RGB picture of `shape`
    (width, height) that the strips are rows of.

    Raises:
        InputError: the picture is so thin that the result would be unreasonably long.
    """
    if max(to[0] * shape[1], to[0] * to[1]) > _MOST_PIXELS:
        raise InputError(
            f"{name} is {shape[0]} x {shape[1]} pixels, too thin to be resized to "
            f"{to[0]} x {to[1]}; crop it first"
        )
    narrow = Image.new("RGB", (to[0], shape[1]))
    top = 0
    for strip in strips:
        assert strip.mode == "RGB", strip.mode
        assert strip.width == shape[0], (strip.size, shape)
        narrow.paste(strip.resize((to[0], strip.height)), (0, top))
        top += strip.height
    assert top == shape[1], (top, shape)
    return narrow.resize(to)


def crop_center(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The square in the middle; half a pixel over goes to the even side, as in the original."""
    left = round((image.width - size) / 2)
    top = round((image.height - size) / 2)
    return np.array(image.crop((left, top, left + size, top + size)))


def crop_square(image: Image.Image, size: int, name: str) -> UInt8[np.ndarray, "size size 3"]:
    """One RGB picture that is in memory already, resized and cut."""
    to = resized_shape(image.width, image.height, size)
    return crop_center(resize_strips([image], image.size, to, name), size)
