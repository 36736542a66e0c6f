"""Read images as RGB arrays, write arrays as PNG and JPEG, and convert pixels to floats and back.

Transparent pixels become white, EXIF rotation is applied, 16-bit levels become 8-bit, and an
animation gives its first image. With a size, an image is framed as in `framing`. `still_images`
gives the limits on size and memory.
"""

import os
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from lwm.core.errors import InputError
from lwm.core.files import new_file
from lwm.media.files import (
    MediaSource,
    decoder_errors,
    image_format,
    open_media,
    require_extension,
)
from lwm.media.framing import check_size, crop_center, resize_strips, resized_shape
from lwm.media.still_images import ImageStrips, decode_image, open_image

_JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}
_WRITERS = {".png": {"format": "PNG"}, ".jpg": _JPEG, ".jpeg": _JPEG}


def is_image(source: MediaSource) -> bool:
    """Return whether `read_image` supports the format of a file, animations included.

    Reads only the header; the rest of the file may be broken.

    Raises:
        InputError: the file is missing or empty.
    """
    with open_media(source) as (file, name):
        if image_format(file) is None:
            return False
        try:
            with decoder_errors(name, "an image"):
                open_image(file, name)
        except InputError:
            return False
    return True


def read_image(source: MediaSource, size: int | None) -> UInt8[np.ndarray, "height width 3"]:
    """Read an image from a file, or from its bytes, as RGB.

    Args:
        size: side of the square to frame it to; None keeps the image as it is.

    Raises:
        InputError: the file is missing, broken, not an image, or too large.
    """
    if size is not None:
        check_size(size)
    with open_media(source) as (file, name), decoder_errors(name, "an image"):
        image = decode_image(file, name, size)
        if size is None:
            return _full_image(image)
        to = resized_shape(*image.full_shape, size)
        resized = resize_strips(image.strips, image.shape, to)
        if image.transpose is not None:
            resized = resized.transpose(image.transpose)
        return crop_center(resized, size)


def _full_image(image: ImageStrips) -> UInt8[np.ndarray, "height width 3"]:
    width, height = image.shape
    pixels = np.empty((height, width, 3), np.uint8)
    top = 0
    for strip in image.strips:
        pixels[top : top + strip.height] = np.asarray(strip)
        top += strip.height
    if image.transpose is not None:
        pixels = np.array(Image.fromarray(pixels).transpose(image.transpose))
    return pixels


def require_image_name(path: str | os.PathLike[str]) -> None:
    """Check that `write_image` accepts the name of a file.

    Raises:
        InputError: `write_image` would refuse it.
    """
    require_extension(path, _WRITERS, "an image")


def write_image(path: str | os.PathLike[str], pixels: UInt8[np.ndarray, "height width 3"]) -> None:
    """Write .png, or .jpg and .jpeg at quality 95 without chroma subsampling.

    An existing file is replaced when the new one is complete.

    Raises:
        InputError: the extension is another, the image has no pixels, or the file cannot be
            written.
    """
    height, width = pixels.shape[:2]
    if not height or not width:
        raise InputError(
            f"an image of {width} x {height} pixels cannot be written; give it pixels"
        )
    options = _WRITERS[require_extension(path, _WRITERS, "an image")]
    if options is _JPEG and max(width, height) > 65500:
        raise InputError(
            f"an image of {width} x {height} pixels is beyond JPEG's 65500; "
            f"write {Path(path).stem}.png"
        )
    with new_file(Path(path), replace=True) as partial:
        Image.fromarray(pixels).save(partial, **options)


def to_unit(pixels: UInt8[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Map levels 0 to 255 to float32 values from -1 to 1."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_pixels(values: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Map values from -1 to 1 to the nearest levels 0 to 255, clipping values outside.

    `to_pixels(to_unit(pixels))` equals `pixels`; the original truncates instead of rounding.
    """
    scaled = (values.astype(np.float32) + np.float32(1)) * np.float32(127.5)
    return np.rint(scaled.clip(0, 255)).astype(np.uint8)
