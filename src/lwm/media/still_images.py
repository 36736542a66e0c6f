"""Still pictures by Pillow: opened by their content, bounded before anything is decoded, and given
out as strips of opaque RGB rows. Knows nothing of resizing or arrays of videos.

The bounds: at most 2^29 pixels (a picture of 20,000 x 20,000 is within), and at most 512 MiB for
what a decoder holds of the picture at once; turning it upright takes a second bitmap. A larger one
is read in pieces where its format allows it (`large_images`) and refused where it does not.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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
from lwm.media import large_images
from lwm.media.sources import File, image_format

MOST_PIXELS = 1 << 29
MOST_BYTES = 1 << 29

_STRIP_PIXELS = 1 << 22

# The plugins themselves and not `Image.open`, whose bound on pixels is a setting of the whole
# process, too low for a scan and too high for WebP.
_OPENERS = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.jpeg_factory,
    "GIF": GifImagePlugin.GifImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
}

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_QUARTERS = {_TURNS[number] for number in (5, 6, 7, 8)}

_quiet = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture on its way: rows as strips, and the turn that makes it upright."""

    shape: tuple[int, int]  # width and height of the strips together
    # Of the stored picture; the strips of a reduced one are smaller.
    stored: tuple[int, int]
    strips: Iterator[Image.Image]
    turn: Image.Transpose | None  # still to be done


def open_picture(file: File, name: str) -> Image.Image:
    """The header read, no pixel decoded.

    Raises:
        InputError: it is no picture of a kind we read, or has too many pixels.
    """
    kind = image_format(file)
    if kind is None:
        raise InputError(f"{name} is not an image; PNG, JPEG, WebP, GIF and BMP can be read")
    with _quietly():
        image = _OPENERS[kind](file)
    width, height = image.size
    if width < 1 or height < 1 or width * height > MOST_PIXELS:
        raise InputError(
            f"{name} says it is {width} x {height} pixels; between 1 and {MOST_PIXELS} are read"
        )
    return image


def decode(file: File, name: str, size: int | None) -> Picture:
    """The first picture of a file; `size` is the short side that is wanted in the end, None for
    all there is.

    Raises:
        InputError: it is no picture, or too large to be decoded within bounds.
    """
    image = open_picture(file, name)
    stored = image.size
    if size is not None and decode_cost(image) > MOST_BYTES:
        if large_images.has_strips(image, file):
            turn = _turn(image)
            strips = map(opaque, large_images.strips(image, file, _STRIP_PIXELS))
            return Picture(shape=stored, stored=stored, strips=strips, turn=turn)
        if isinstance(image, JpegImagePlugin.JpegImageFile):
            large_images.reduce(image, 2 * size)
    if decode_cost(image) > MOST_BYTES:
        remedy = (
            "read it at a size" if size is None else "save it as an 8-bit PNG without interlace"
        )
        raise InputError(
            f"{name} is a {image.format} of {stored[0]} x {stored[1]} pixels ({image.mode}), "
            f"which takes more than {MOST_BYTES >> 20} MiB to decode; scale it down or {remedy}"
        )
    image.load()
    turn = _turn(image)
    upright = image if turn is None else image.transpose(turn)
    if turn in _QUARTERS:
        stored = (stored[1], stored[0])
    return Picture(shape=upright.size, stored=stored, strips=_strips(upright), turn=None)


def opaque(image: Image.Image) -> Image.Image:
    """Any mode to 8-bit RGB; what shines through is white."""
    if image.mode.startswith("I"):
        # 16-bit grey. Pillow clips at 255 where it should scale.
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        grey = (levels >> 8).astype(np.uint8)
        clear = image.info.get("transparency")
        if isinstance(clear, int):
            grey[levels == clear] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(layered, mask=layered.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _strips(image: Image.Image) -> Iterator[Image.Image]:
    """Conversions copy, so they are done on some rows at a time."""
    rows = max(1, _STRIP_PIXELS // image.width)
    if rows >= image.height:
        yield opaque(image)
        return
    for top in range(0, image.height, rows):
        yield opaque(image.crop((0, top, image.width, min(top + rows, image.height))))


def decode_cost(image: Image.Image) -> int:
    """Bytes a decoder holds at most, as measured: Pillow takes four a pixel for anything but
    grey and palettes; progressive JPEG keeps all coefficients, two bytes each; WebP three canvases
    beside the picture."""
    each = {"1": 1, "L": 1, "P": 1}.get(image.mode, 2 if image.mode.startswith("I;16") else 4)
    if image.format == "WEBP":
        each = 16
    cost = image.width * image.height * each
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        cost += large_images.coefficient_bytes(image)
    return cost


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes the picture upright, by its EXIF; a broken EXIF says nothing."""
    data = image.info.get("exif")
    if not isinstance(data, bytes):
        return None
    exif = Image.Exif()
    with _quietly():
        try:
            exif.load(data)
            return _TURNS.get(exif.get(0x0112, 1))
        except Exception:
            # The pixels are whole; viewers show such a picture as it is stored, and so do we.
            return None


@contextmanager
def _quietly() -> Iterator[None]:
    """Pillow warns of malformed side data, which we do not use. The filter belongs to the whole
    process, hence the lock: loaders read in threads."""
    with _quiet, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
