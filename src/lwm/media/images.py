"""Read images as RGB arrays in bounded memory, and write arrays as PNG and JPEG.

Transparent pixels become white, EXIF rotation is applied, 16-bit levels become 8-bit, an animation
gives its first image and a TIFF its first page. With a size, an image is framed as in `framing`.

An image may have up to 2^29 pixels, which admits 20,000 x 20,000. Pillow decodes images whose
bitmap takes up to 512 MiB; rotating one upright takes a second bitmap. libvips reads any TIFF, and
larger PNGs, one strip at a time. libjpeg reduces larger JPEGs while decoding; others are refused.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)

from lwm.core.errors import InputError
from lwm.core.files import new_file
from lwm.media.files import (
    BinaryFile,
    MediaSource,
    decoder_errors,
    image_format,
    open_media,
    require_extension,
    without_warnings,
)
from lwm.media.framing import (
    check_size,
    crop_center,
    refuse_thin,
    resize_strips,
    resized_shape,
)
from lwm.media.strips import MAX_BYTES, StripReader, open_png, open_tiff, open_with_libvips

_MAX_PIXELS = 1 << 29
_STRIP_PIXELS = 1 << 20

# `Image.open` would apply Pillow's process-wide limit on pixels, which is too low for a scan and
# too high for WebP.
_OPENERS = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.jpeg_factory,
    "GIF": GifImagePlugin.GifImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}
FORMATS = "PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF and, with lwm[heic], HEIC"

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

_JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}
_WRITERS = {".png": {"format": "PNG"}, ".jpg": _JPEG, ".jpeg": _JPEG}


@dataclass(frozen=True, kw_only=True)
class _Strips:
    """An image as strips of rows, from top to bottom."""

    shape: tuple[int, int]  # width and height of the strips together
    full_shape: tuple[int, int]  # of the image; larger than `shape` if a JPEG was reduced
    strips: Iterator[Image.Image]
    transpose: Image.Transpose | None  # remaining step that makes the image upright


def is_image(source: MediaSource) -> bool:
    """Return whether a file is an image, broken or not, animations included, by its content."""
    with open_media(source) as (file, _):
        return image_format(file) is not None


def read_image(source: MediaSource, size: int | None) -> UInt8[np.ndarray, "height width 3"]:
    """Read an image from a file, or from its bytes, as RGB.

    Args:
        size: side of the square to frame it to; None keeps the image as it is.
    """
    if size is not None:
        check_size(size)
    with open_media(source) as (file, name), decoder_errors(name, "an image"):
        image = _decode(file, name, size)
        if size is None:
            return _full_image(image)
        to = resized_shape(*image.full_shape, size)
        resized = resize_strips(image.strips, image.shape, to)
        if image.transpose is not None:
            resized = resized.transpose(image.transpose)
        return crop_center(resized, size)


def _full_image(image: _Strips) -> UInt8[np.ndarray, "height width 3"]:
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
    """Raise InputError if `write_image` would refuse the name of a file."""
    require_extension(path, _WRITERS, "an image")


def write_image(path: str | os.PathLike[str], pixels: UInt8[np.ndarray, "height width 3"]) -> None:
    """Write .png, or .jpg and .jpeg at quality 95 without chroma subsampling.

    An existing file is replaced when the new one is complete.
    """
    height, width = pixels.shape[:2]
    if not height or not width:
        raise InputError(f"an image of {width} x {height} pixels cannot be written; give it some")
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


def open_image(file: BinaryFile, name: str) -> Image.Image:
    """Read the header of an image; raise InputError if it is of another format or too large."""
    kind = image_format(file)
    if kind is None:
        raise InputError(f"{name} is not an image that can be read; {FORMATS} can be read")
    opener = _heic_opener(name) if kind == "HEIC" else _OPENERS[kind]
    with without_warnings():
        image = opener(file)
    _check_pixels(image.size, name)
    return image


def _heic_opener(name: str) -> Callable[[BinaryFile], Image.Image]:
    try:
        from pillow_heif import HeifImageFile
    except ImportError as error:
        raise InputError(
            f"{name} is a HEIC image, which needs the package pillow-heif; install lwm[heic], or "
            "save it as JPEG"
        ) from error
    return HeifImageFile


def _check_pixels(shape: tuple[int, int], name: str) -> None:
    if min(shape) < 1 or math.prod(shape) > _MAX_PIXELS:
        raise InputError(
            f"{name} declares {shape[0]} x {shape[1]} pixels; the limit is {_MAX_PIXELS}"
        )


def bitmap_bytes(image: Image.Image) -> int:
    """Return an upper bound, by measurement, on the bytes that Pillow decodes an image into.

    Pillow takes four bytes for a pixel unless the image is gray or has a palette. WebP takes three
    canvases beside the image, AVIF and HEIC the planes of the codec and one or two canvases.
    """
    size = {"1": 1, "L": 1, "P": 1}.get(image.mode, 2 if image.mode.startswith("I;16") else 4)
    size = {"WEBP": 16, "AVIF": 16, "HEIF": 10}.get(image.format or "", size)
    return image.width * image.height * size


def _decode(file: BinaryFile, name: str, size: int | None) -> _Strips:
    """Decode the first image of a file, to resize its short side to `size` if it is not None."""
    if image_format(file) == "TIFF":
        tiff = open_tiff(file, name)
        shape = tiff.image.width, tiff.image.height
        _check_pixels(shape, name)
        _check_result(shape, size, name)
        return _vips_strips(tiff, _TRANSPOSES.get(tiff.image.get("orientation")))
    image = open_image(file, name)
    shape = width, height = image.size
    _check_result(shape, size, name)
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
        return _Strips(
            shape=image.size, full_shape=full_shape, strips=_pillow_strips(image), transpose=None
        )
    if image.format != "PNG" or image.info.get("interlace"):
        raise InputError(
            f"{name} is a {image.format} of {width} x {height} pixels ({image.mode}), which takes "
            f"more than {MAX_BYTES >> 20} MiB to decode; scale it down or save it as an 8-bit PNG "
            "without interlace"
        )
    return _vips_strips(open_png(file), _exif_transpose(image))


def _check_result(shape: tuple[int, int], size: int | None, name: str) -> None:
    """Refuse an image that cannot be resized to `size`, or that is too large as a whole."""
    width, height = shape
    if size is not None:
        refuse_thin(shape, size, name)
    elif width * height * 3 > MAX_BYTES:
        raise InputError(
            f"{name} is {width} x {height} pixels, more than {MAX_BYTES >> 20} MiB; scale it down "
            "or read it at a size"
        )


def _vips_strips(reader: StripReader, transpose: Image.Transpose | None) -> _Strips:
    shape = reader.image.width, reader.image.height
    strips = map(opaque, reader.strips(_STRIP_PIXELS))
    return _Strips(shape=shape, full_shape=shape, strips=strips, transpose=transpose)


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
    # A conversion copies the image, so it takes some rows at a time.
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield opaque(image.crop((0, top, image.width, min(top + rows, image.height))))


def _coefficient_bytes(image: Image.Image, file: BinaryFile) -> int:
    """Return the size of the coefficients that libjpeg stores while it decodes several scans."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return 0
    size = 2 * image.width * image.height * image.layers
    # Only a large image needs the number of scans, which Pillow does not report.
    large = bitmap_bytes(image) + size > MAX_BYTES
    return size if large and open_with_libvips(file, "jpeg").get_typeof("interlaced") else 0


def _exif_transpose(image: Image.Image) -> Image.Transpose | None:
    """Return what makes an image upright by its EXIF data; None if that is broken."""
    data = image.info.get("exif")
    if not isinstance(data, bytes):
        return None
    exif = Image.Exif()
    with without_warnings():
        try:
            exif.load(data)
            return _TRANSPOSES.get(exif.get(0x0112, 1))
        except Exception:
            # The pixels are intact; like viewers, show the image as it is stored.
            return None
