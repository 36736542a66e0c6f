"""Images in and out: PNG, JPEG, WebP, GIF and BMP to RGB arrays, arrays to PNG and JPEG, and
pixels to the numbers that the model of vision tokens reads. Knows nothing of that model.

An image is told by its content, never by its name. Transparency is laid over white, EXIF rotation
is done, 16 bits are brought to 8, and of an animation the first picture is taken. With a size the
picture is framed as the original does it: the short side resized with Pillow's default filter, the
centre cut out. What exceeds the bounds of `pictures` is refused; above 512 MiB of bitmap a PNG is
read in strips, with the same result, and a JPEG is reduced by libjpeg first, with nearly the same.
"""

import os
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from lwm.core.errors import InputError
from lwm.media.framing import check_size, crop_center, resize_strips, resized_shape
from lwm.media.outputs import extension_of, new_file
from lwm.media.sources import MediaSource, decoder_errors, image_format, open_media
from lwm.media.still_images import MOST_BYTES, decode, open_picture

_WRITERS = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
}


def is_image(source: MediaSource) -> bool:
    """Whether `read_image` knows the kind of file, an animation included; it may still be broken.

    Raises:
        InputError: the file is missing or empty.
    """
    with open_media(source) as (file, name):
        if image_format(file) is None:
            return False
        try:
            with decoder_errors(name, "an image"):
                open_picture(file, name)
        except InputError:
            return False
    return True


def read_image(source: MediaSource, size: int | None) -> UInt8[np.ndarray, "height width 3"]:
    """The image of a file, or of its bytes, as RGB.

    Args:
        size: side of the square to frame it to; None leaves it as it is.

    Raises:
        InputError: the file is missing, broken, no image, or beyond the bounds on size.
    """
    if size is not None:
        check_size(size)
    with open_media(source) as (file, name), decoder_errors(name, "an image"):
        picture = decode(file, name, size)
        width, height = picture.shape
        if size is None:
            if width * height * 3 > MOST_BYTES:
                raise InputError(
                    f"{name} is {width} x {height} pixels, more than {MOST_BYTES >> 20} MiB; "
                    "read it at a size"
                )
            pixels = np.empty((height, width, 3), np.uint8)
            top = 0
            for strip in picture.strips:
                pixels[top : top + strip.height] = np.asarray(strip)
                top += strip.height
            return pixels
        to = resized_shape(*picture.stored, size)
        small = resize_strips(picture.strips, picture.shape, to, name)
        if picture.turn is not None:
            small = small.transpose(picture.turn)
        return crop_center(small, size)


def require_image_name(path: str | os.PathLike[str]) -> None:
    """Raises:
    InputError: `write_image` would refuse this name.
    """
    extension_of(path, _WRITERS, "an image")


def write_image(path: str | os.PathLike[str], pixels: UInt8[np.ndarray, "height width 3"]) -> None:
    """Writes .png, or .jpg and .jpeg at quality 95 without subsampled colour. A file that is there
    is replaced once the new one is whole.

    Raises:
        InputError: another extension, an image without pixels, or a place that cannot be written.
    """
    height, width = pixels.shape[:2]
    if not height or not width:
        raise InputError(
            f"an image of {width} x {height} pixels cannot be written; give it pixels"
        )
    with new_file(path, _WRITERS, "an image") as (partial, options):
        if options["format"] == "JPEG" and max(width, height) > 65500:
            raise InputError(
                f"an image of {width} x {height} pixels is beyond JPEG's 65500; "
                f"write {Path(path).stem}.png"
            )
        Image.fromarray(pixels).save(partial, **options)


def to_unit(pixels: UInt8[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """0 ... 255 to -1 ... 1, float32."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_pixels(values: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """-1 ... 1 to 0 ... 255, what lies beyond clipped. Rounds to the nearest level, so that
    `to_pixels(to_unit(pixels))` is `pixels`; the original cuts off the fraction."""
    scaled = (values.astype(np.float32) + np.float32(1)) * np.float32(127.5)
    return np.rint(scaled.clip(0, 255)).astype(np.uint8)
