"""Read images whose bitmaps exceed the limit, which is lowered so that small images suffice."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from small_media import encoded, smooth_image

from lwm.core.errors import InputError
from lwm.media import images
from lwm.media.images import read_image


@pytest.fixture
def low_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 20_000)
    monkeypatch.setattr(images, "_STRIP_PIXELS", 700)


def refuse_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if Pillow decodes more than a few strips in one step."""
    load = Image.Image.load

    def watched(self: Image.Image):
        assert self.width * self.height < 6000, self.size
        return load(self)

    monkeypatch.setattr(Image.Image, "load", watched)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "I;16", "RGB, transparent"])
@pytest.mark.parametrize("number", [1, 6])
def test_a_png_in_strips_equals_the_whole(
    mode: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Noise over smooth colors, so that the encoder uses every kind of filter.
    pixels = np.array(smooth_image(151, 97).convert("RGBA"))
    noise = np.random.default_rng(0).integers(0, 40, pixels.shape, dtype=np.uint8)
    pixels[30:60] //= 2
    pixels[30:60] += noise[30:60]
    image = Image.fromarray(pixels)
    options = {}
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256 + pixels[..., 1])
    elif mode == "RGB, transparent":
        image = image.convert("RGB")
        options["transparency"] = image.getpixel((3, 3))
    else:
        image = image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = number
    data = encoded(image, "PNG", exif=exif, **options)
    whole = read_image(data, 16)
    monkeypatch.setattr(images, "MAX_BYTES", 20_000)
    monkeypatch.setattr(images, "_STRIP_PIXELS", 700)
    refuse_whole(monkeypatch)
    strips = read_image(data, 16)
    if number == 1:
        np.testing.assert_array_equal(strips, whole)
    else:
        # Rotated after resizing, so the two passes of resizing and their rounding swap.
        assert np.abs(strips.astype(int) - whole).max() <= 1


@pytest.mark.parametrize("pieces", [1, 7])
def test_a_png_may_divide_its_data_into_chunks(pieces: int, low_limit: None) -> None:
    image = smooth_image(120, 90)
    data = encoded(image, "PNG")
    start = data.index(b"IDAT") - 4
    length = struct.unpack(">I", data[start : start + 4])[0]
    body = data[start + 8 : start + 8 + length]
    end = data[data.index(b"IEND") - 4 :]
    split = b""
    for index in range(0, len(body), len(body) // pieces):
        part = b"IDAT" + body[index : index + len(body) // pieces]
        split += struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
    direct = image.resize((21, 16)).crop((2, 0, 18, 16))
    np.testing.assert_array_equal(read_image(data[:start] + split + end, 16), np.array(direct))


def test_a_broken_png_in_strips_is_refused(low_limit: None) -> None:
    data = encoded(smooth_image(151, 97), "PNG")
    with pytest.raises(InputError, match="cut short"):
        read_image(data[: len(data) // 2], 16)
    middle = len(data) // 2
    with pytest.raises(InputError, match="broken or cut short"):
        read_image(data[:middle] + b"\xff" * 50 + data[middle + 50 :], 16)


def test_a_jpeg_is_reduced_by_its_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(smooth_image(400, 301), "JPEG", quality=95)
    whole = read_image(data, 16)
    monkeypatch.setattr(images, "MAX_BYTES", 20_000)
    refuse_whole(monkeypatch)
    assert np.abs(read_image(data, 16).astype(int) - whole).max() <= 6


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("JPEG", {"progressive": True}, "JPEG of 151 x 97 pixels"),
        ("BMP", {}, "BMP of 151 x 97 pixels"),
        ("WEBP", {}, "WEBP of 151 x 97 pixels"),
    ],
)
def test_large_images_without_strips_are_refused(
    kind: str, options: dict, message: str, low_limit: None
) -> None:
    data = encoded(smooth_image(151, 97), kind, **options)
    with pytest.raises(InputError, match=f"{message}.*scale it down or save it as an 8-bit PNG"):
        read_image(data, 16)


def test_a_large_image_without_a_size_is_refused(low_limit: None) -> None:
    with pytest.raises(InputError, match="scale it down or read it at a size"):
        read_image(encoded(smooth_image(151, 97), "PNG"), None)


def bomb(width: int, height: int) -> bytes:
    """Build a PNG that declares a size and contains one compressed run."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def test_a_bomb_is_refused_by_its_header() -> None:
    with pytest.raises(InputError, match="declares 60000 x 60000 pixels"):
        read_image(bomb(60_000, 60_000), 16)
    with pytest.raises(InputError, match="too thin to be resized"):
        read_image(bomb(400_000_000, 1), 16)
    # Within the limit on pixels, so it is decoded, but only one strip is ever in memory.
    with pytest.raises(InputError, match="cut short"):
        read_image(bomb(20_000, 20_000), 16)
