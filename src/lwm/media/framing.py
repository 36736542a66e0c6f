"""Frame images as the original does: resize the short side, then crop the square in the middle.

An image may come as strips of rows, so that a large one is never in memory as a whole. Pillow
resizes in two passes, along the rows and then along the columns, and rounds to bytes between
them; the first pass gives the same bytes strip by strip.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from lwm.core.errors import InputError

_MAX_PIXELS = 1 << 27  # of the image between the two passes, and of the resized image


def check_size(size: int) -> None:
    """Raise InputError if the side of a square image, in pixels, is out of range."""
    if not 1 <= size <= 8192:
        raise InputError(f"size is {size}; it must lie between 1 and 8192 pixels")


def resized_shape(width: int, height: int, size: int) -> tuple[int, int]:
    """Return (width, height) with the short side at `size` and the long side rounded down."""
    if width < height:
        return size, size * height // width
    return size * width // height, size


def refuse_thin(shape: tuple[int, int], size: int, name: str) -> None:
    """Raise InputError if an image of `shape` (width, height) is too thin to resize in memory."""
    width, height = resized_shape(*shape, size)
    if max(width * shape[1], width * height) > _MAX_PIXELS:
        raise InputError(
            f"{name} is {shape[0]} x {shape[1]} pixels, too thin to be resized to "
            f"{width} x {height}; crop it first"
        )


def resize_strips(
    strips: Iterable[Image.Image], shape: tuple[int, int], to: tuple[int, int]
) -> Image.Image:
    """Resize an RGB image of `shape` (width, height) from strips of its rows.

    The result equals Pillow's `Image.resize` with its default filter.
    """
    columns = Image.new("RGB", (to[0], shape[1]))
    top = 0
    for strip in strips:
        assert strip.mode == "RGB", strip.mode
        assert strip.width == shape[0], (strip.size, shape)
        columns.paste(strip.resize((to[0], strip.height)), (0, top))
        top += strip.height
    assert top == shape[1], (top, shape)
    return columns.resize(to)


def crop_center(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Crop the square in the middle; half a pixel rounds to even, as in the original."""
    left = round((image.width - size) / 2)
    top = round((image.height - size) / 2)
    return np.array(image.crop((left, top, left + size, top + size)))


def crop_square(image: Image.Image, size: int, name: str) -> UInt8[np.ndarray, "size size 3"]:
    """Resize and crop one RGB image."""
    refuse_thin(image.size, size, name)
    to = resized_shape(image.width, image.height, size)
    return crop_center(resize_strips([image], image.size, to), size)
