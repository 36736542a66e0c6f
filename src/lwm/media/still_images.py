"""Decode still images in bounded memory, as strips of opaque RGB rows.

An image may have up to 2^29 pixels, which admits 20,000 x 20,000. Pillow decodes images whose
bitmap takes up to 512 MiB; rotating one upright takes a second bitmap. Of larger images, libvips
reads PNGs one strip at a time, libjpeg reduces JPEGs while decoding, and others are refused.
"""

import io
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)

from lwm.core.errors import InputError
from lwm.media.files import BinaryFile, image_format
from lwm.media.framing import refuse_thin

MAX_PIXELS = 1 << 29
MAX_BYTES = 1 << 29

_STRIP_PIXELS = 1 << 20

# `Image.open` would apply Pillow's process-wide limit on pixels, which is too low for a scan and
# too high for WebP.
_OPENERS = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.jpeg_factory,
    "GIF": GifImagePlugin.GifImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
}

# By the value of the EXIF orientation tag.
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAP_SIDES = {_TRANSPOSES[orientation] for orientation in (5, 6, 7, 8)}

_filter_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class ImageStrips:
    """Hold an image as strips of rows, from top to bottom."""

    shape: tuple[int, int]  # width and height of the strips together
    full_shape: tuple[int, int]  # of the image; larger than `shape` if a JPEG was reduced
    strips: Iterator[Image.Image]
    transpose: Image.Transpose | None  # remaining step that makes the image upright


def open_image(file: BinaryFile, name: str) -> Image.Image:
    """Read the header of an image and decode no pixels.

    Raises:
        InputError: the file is not an image of a supported format, or has too many pixels.
    """
    kind = image_format(file)
    if kind is None:
        raise InputError(f"{name} is not an image; PNG, JPEG, WebP, GIF and BMP can be read")
    with _without_warnings():
        image = _OPENERS[kind](file)
    width, height = image.size
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise InputError(
            f"{name} says it is {width} x {height} pixels; between 1 and {MAX_PIXELS} are read"
        )
    return image


def bitmap_bytes(image: Image.Image) -> int:
    """Return an upper bound, by measurement, on the bytes that Pillow decodes an image into.

    Pillow takes four bytes for a pixel unless the image is gray or has a palette; WebP takes three
    canvases beside the image.
    """
    size = {"1": 1, "L": 1, "P": 1}.get(image.mode, 2 if image.mode.startswith("I;16") else 4)
    if image.format == "WEBP":
        size = 16
    return image.width * image.height * size


def decode_image(file: BinaryFile, name: str, size: int | None) -> ImageStrips:
    """Decode the first image of a file.

    Args:
        size: short side that the caller will resize the image to; None for the full image.

    Raises:
        InputError: the file is not an image, or is too large to decode in bounded memory.
    """
    image = open_image(file, name)
    shape = width, height = image.size
    if size is not None:
        refuse_thin(shape, size, name)
    elif width * height * 3 > MAX_BYTES:
        raise InputError(
            f"{name} is {width} x {height} pixels, more than {MAX_BYTES >> 20} MiB; scale it down "
            "or read it at a size"
        )
    coefficients = _coefficient_bytes(image, file)
    large = bitmap_bytes(image) + coefficients > MAX_BYTES
    if large and size is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
        # libjpeg reduces the image while decoding it, to at least twice the size, so that the
        # final resizing determines the quality.
        short = min(shape)
        image.draft(None, (width * 2 * size // short, height * 2 * size // short))
    if bitmap_bytes(image) + coefficients <= MAX_BYTES:
        image.load()
        transpose = _exif_transpose(image)
        if transpose is not None:
            image = image.transpose(transpose)
        full_shape = (height, width) if transpose in _SWAP_SIDES else shape
        return ImageStrips(
            shape=image.size, full_shape=full_shape, strips=_pillow_strips(image), transpose=None
        )
    if image.format != "PNG" or image.info.get("interlace"):
        raise InputError(
            f"{name} is a {image.format} of {width} x {height} pixels ({image.mode}), which takes "
            f"more than {MAX_BYTES >> 20} MiB to decode; scale it down or save it as an 8-bit PNG "
            "without interlace"
        )
    return ImageStrips(
        shape=shape,
        full_shape=shape,
        strips=_libvips_strips(file),
        transpose=_exif_transpose(image),
    )


def opaque(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB, over white where it is transparent."""
    if image.mode.startswith("I"):
        # 16-bit gray, which Pillow would clip at 255 instead of scaling it.
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        gray = (levels >> 8).astype(np.uint8)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            gray[levels == transparent] = 255
        return Image.fromarray(gray).convert("RGB")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(layered, mask=layered.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _pillow_strips(image: Image.Image) -> Iterator[Image.Image]:
    """Convert some rows at a time, since a conversion copies the image."""
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield opaque(image.crop((0, top, image.width, min(top + rows, image.height))))


def _libvips_strips(file: BinaryFile) -> Iterator[Image.Image]:
    """Decode some rows of a PNG at a time."""
    import pyvips

    image = _open_with_libvips(file, "png")
    region = pyvips.Region.new(image)
    mode = ("L", "LA", "RGB", "RGBA")[image.bands - 1]
    dtype = np.uint16 if image.format == "ushort" else np.uint8
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        count = min(rows, image.height - top)
        levels = np.frombuffer(region.fetch(0, top, image.width, count), dtype)
        if dtype == np.uint16:
            levels = (levels >> 8).astype(np.uint8)
        yield opaque(Image.frombytes(mode, (image.width, count), levels.tobytes()))


def _coefficient_bytes(image: Image.Image, file: BinaryFile) -> int:
    """Return the size of the coefficients that libjpeg stores while it decodes several scans."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return 0
    size = 2 * image.width * image.height * image.layers
    # Only a large image needs the number of scans, which Pillow does not report.
    large = bitmap_bytes(image) + size > MAX_BYTES
    return size if large and _open_with_libvips(file, "jpeg").get_typeof("interlaced") else 0


def _open_with_libvips(file: BinaryFile, kind: str) -> Any:
    """Read the header of an image whose rows can then be decoded from top to bottom."""
    import pyvips

    # Refuse the loaders that libvips does not fuzz, and cache nothing, so that files are closed.
    # Errors are raised as well as logged.
    pyvips.block_untrusted_set(True)
    pyvips.cache_set_max(0)
    logging.getLogger("pyvips").setLevel(logging.CRITICAL)
    options = {"access": "sequential", "fail_on": "truncated"}
    if isinstance(file, io.BytesIO):
        return pyvips.Operation.call(f"{kind}load_buffer", file.getvalue(), **options)
    return pyvips.Operation.call(f"{kind}load", file.name, **options)


def _exif_transpose(image: Image.Image) -> Image.Transpose | None:
    """Return what makes an image upright by its EXIF data; None if that is broken."""
    data = image.info.get("exif")
    if not isinstance(data, bytes):
        return None
    exif = Image.Exif()
    with _without_warnings():
        try:
            exif.load(data)
            return _TRANSPOSES.get(exif.get(0x0112, 1))
        except Exception:
            # The pixels are intact; like viewers, show the image as it is stored.
            return None


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence Pillow's warnings about malformed metadata, which we do not use.

    The lock is needed because warning filters belong to the process and loaders read in threads.
    """
    with _filter_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
