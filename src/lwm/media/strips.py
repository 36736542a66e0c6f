"""Decode PNG and TIFF with libvips one strip of rows at a time, in bounded memory."""

import io
import logging
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from lwm.core.errors import InputError
from lwm.core.progress import say
from lwm.media.files import BinaryFile, without_warnings

# Tags of a TIFF (TIFF 6.0; the last one is of Adobe's DNG).
_SUBFILE, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 258, 259, 262
_TILE_LENGTH, _EXTRA, _DNG = 323, 338, 50706
_REDUCED, _MASK = 1, 4  # bits of _SUBFILE
_UNSPECIFIED = 0  # in _EXTRA, a channel that is not alpha

# None, CCITT, LZW, JPEG, deflate and PackBits.
_COMPRESSIONS = frozenset((1, 2, 3, 4, 5, 7, 8, 32773, 32946))
# White is zero, black is zero, RGB, palette, CMYK and YCbCr.
_PHOTOMETRICS = frozenset((0, 1, 2, 3, 5, 6))
_JPEG, _YCBCR = 7, 6
_SENSOR = frozenset((32803, 34892))  # photometrics of a camera's raw data

MAX_BYTES = 1 << 29  # of decoded pixels in memory

_MODES = {"b-w": "L", "grey16": "L", "srgb": "RGB", "rgb16": "RGB", "cmyk": "CMYK"}


class StripReader(NamedTuple):
    """Hold an image of libvips whose rows are decoded from top to bottom, and its Pillow mode."""

    image: Any
    mode: str

    def strips(self, pixels: int) -> Iterator[Image.Image]:
        """Yield the rows of the image with 8 bits per channel, about `pixels` at a time."""
        import pyvips

        image, channels = self.image, len(self.mode)
        region = pyvips.Region.new(image)
        dtype = np.uint16 if image.format == "ushort" else np.uint8
        rows = max(1, pixels // image.width)
        for top in range(0, image.height, rows):
            count = min(rows, image.height - top)
            levels = np.frombuffer(region.fetch(0, top, image.width, count), dtype)
            levels = levels.reshape(count, image.width, image.bands)[..., :channels]
            if dtype == np.uint16:
                levels = (levels >> 8).astype(np.uint8)
            yield Image.frombytes(self.mode, (image.width, count), levels.tobytes())


def open_png(file: BinaryFile) -> StripReader:
    """Read the header of a PNG."""
    image = open_with_libvips(file, "png")
    return StripReader(image, ("L", "LA", "RGB", "RGBA")[image.bands - 1])


def open_tiff(file: BinaryFile, name: str) -> StripReader:
    """Read the header of the first page of a TIFF, and log a remark if there are more.

    libvips ignores most of what it does not support, so this refuses everything but 1 to 16 bits
    of gray, palette, RGB and CMYK, in the compressions that cameras, scanners and editors write.
    """
    tags, following = _directories(file)
    file.seek(8)
    raw = file.read(2) == b"CR" or _DNG in tags  # Canon's CR2
    photometric, compression = tags.get(_PHOTOMETRIC), tags.get(_COMPRESSION, 1)
    if raw or tags.get(_SUBFILE, 0) & _REDUCED or photometric in _SENSOR:
        raise InputError(
            f"{name} holds a camera's raw data, or begins with a thumbnail; export it as JPEG or "
            "PNG"
        )
    bits = set(tags.get(_BITS, (1,)))
    if not bits <= {1, 2, 4, 8, 16}:
        raise _unsupported(name, f"samples of {max(bits)} bits")
    if compression not in _COMPRESSIONS:
        raise _unsupported(name, f"compression {compression}")
    if photometric not in _PHOTOMETRICS or (photometric == _YCBCR and compression != _JPEG):
        raise _unsupported(name, f"photometric interpretation {photometric}")
    image = open_with_libvips(file, "tiff")
    mode = _MODES.get(image.interpretation)
    extra = image.bands - len(mode or "")
    if mode is None or image.format not in ("uchar", "ushort") or (mode == "L" and extra > 1):
        raise _unsupported(name, f"{image.bands} channels of {image.format}")
    if extra and mode != "CMYK" and tags.get(_EXTRA, (None,))[0] != _UNSPECIFIED:
        mode += "A"
    # libvips buffers up to a thousand rows, or two rows of tiles.
    rows = min(image.height, max(1000, 2 * tags.get(_TILE_LENGTH, 0)))
    if image.width * image.bands * (1 + (image.format == "ushort")) * rows > MAX_BYTES:
        raise InputError(
            f"{name} is a TIFF of {image.width} x {image.height} pixels, which takes more than "
            f"{MAX_BYTES >> 20} MiB to decode; scale it down"
        )
    if following is not None and not following.get(_SUBFILE, 0) & (_REDUCED | _MASK):
        say(f"{name} has {image.get('n-pages')} pages; the first is used")
    return StripReader(image, mode)


def _unsupported(name: str, what: str) -> InputError:
    return InputError(
        f"{name} is a TIFF with {what}, which is not supported; save it as 8-bit RGB"
    )


def _directories(file: BinaryFile) -> tuple[Any, Any]:
    """Read the tags of the first page of a TIFF, and those of the second if there is one."""
    file.seek(0)
    header = file.read(8)
    if header[2] == 43:  # BigTIFF
        header += file.read(8)
    first = ImageFileDirectory_v2(header)
    following = None
    with without_warnings():
        file.seek(first.next)
        first.load(file)
        if first.next:
            following = ImageFileDirectory_v2(header)
            file.seek(first.next)
            following.load(file)
    return first, following


def open_with_libvips(file: BinaryFile, kind: str) -> Any:
    """Read the header of an image whose rows can then be decoded from top to bottom."""
    import pyvips

    # Refuse the loaders that libvips does not fuzz, and cache nothing, so that files are closed.
    # Errors are raised as well as logged.
    pyvips.block_untrusted_set(True)
    pyvips.cache_set_max(0)
    logging.getLogger("pyvips").setLevel(logging.CRITICAL)
    if isinstance(file, io.BytesIO):
        source = pyvips.Source.new_from_memory(file.getvalue())
    else:  # libvips accepts only UTF-8 names, and a shared descriptor would share its position
        descriptor = os.open(file.name, os.O_RDONLY)
        try:
            source = pyvips.Source.new_from_descriptor(descriptor)
        finally:
            os.close(descriptor)
    # A TIFF of which a part cannot be decoded is an error, and not a truncated file.
    fail_on = "error" if kind == "tiff" else "truncated"
    return pyvips.Operation.call(
        f"{kind}load_source", source, access="sequential", fail_on=fail_on
    )
