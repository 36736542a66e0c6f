"""What is done where a whole bitmap would take too much: the bound is lowered, so that small
pictures are read as large ones are."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from small_media import colours, encoded

from lwm.core.errors import InputError
from lwm.media import still_images
from lwm.media.images import read_image


@pytest.fixture
def low_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(still_images, "MOST_BYTES", 20_000)
    monkeypatch.setattr(still_images, "_STRIP_PIXELS", 700)


def refuse_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test where a picture of more than a few strips is decoded at once."""
    load = Image.Image.load

    def watched(self: Image.Image):
        assert self.width * self.height < 6000, self.size
        return load(self)

    monkeypatch.setattr(Image.Image, "load", watched)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "I;16", "RGB, one clear"])
@pytest.mark.parametrize("number", [1, 6])
def test_a_png_in_strips_is_the_same(
    mode: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Noise over colours, so that the writer takes every kind of filter.
    pixels = np.array(colours(151, 97).convert("RGBA"))
    noise = np.random.default_rng(0).integers(0, 40, pixels.shape, dtype=np.uint8)
    pixels[30:60] //= 2
    pixels[30:60] += noise[30:60]
    image = Image.fromarray(pixels)
    options = {}
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256 + pixels[..., 1])
    elif mode == "RGB, one clear":
        image = image.convert("RGB")
        options["transparency"] = image.getpixel((3, 3))
    else:
        image = image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = number
    data = encoded(image, "PNG", exif=exif, **options)
    whole = read_image(data, 16)
    monkeypatch.setattr(still_images, "MOST_BYTES", 20_000)
    monkeypatch.setattr(still_images, "_STRIP_PIXELS", 700)
    refuse_whole(monkeypatch)
    strips = read_image(data, 16)
    if number == 1:
        np.testing.assert_array_equal(strips, whole)
    else:
        # Turned afterwards: the passes of resizing change places, and so does their rounding.
        assert np.abs(strips.astype(int) - whole).max() <= 1


@pytest.mark.parametrize("pieces", [1, 7])
def test_a_png_may_spread_its_data_over_chunks(pieces: int, low_bound: None) -> None:
    image = colours(120, 90)
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


def test_a_png_in_strips_that_is_broken(low_bound: None) -> None:
    data = encoded(colours(151, 97), "PNG")
    with pytest.raises(InputError, match="ends early"):
        read_image(data[: len(data) // 2], 16)
    middle = len(data) // 2
    with pytest.raises(InputError, match="broken or cut short"):
        read_image(data[:middle] + b"\xff" * 50 + data[middle + 50 :], 16)


def test_a_jpeg_is_reduced_by_its_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(colours(400, 301), "JPEG", quality=95)
    whole = read_image(data, 16)
    monkeypatch.setattr(still_images, "MOST_BYTES", 20_000)
    refuse_whole(monkeypatch)
    assert np.abs(read_image(data, 16).astype(int) - whole).max() <= 6


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("JPEG", {"progressive": True}, "JPEG of 151 x 97 pixels"),
        ("BMP", {}, "BMP of 151 x 97 pixels"),
        ("WEBP", {}, "WEBP of 151 x 97 pixels"),
    ],
)
def test_what_has_no_strips_is_refused(
    kind: str, options: dict, said: str, low_bound: None
) -> None:
    data = encoded(colours(151, 97), kind, **options)
    with pytest.raises(InputError, match=f"{said}.*scale it down or save it as an 8-bit PNG"):
        read_image(data, 16)


def test_a_large_one_without_a_size_is_refused(low_bound: None) -> None:
    with pytest.raises(InputError, match="scale it down or read it at a size"):
        read_image(encoded(colours(151, 97), "PNG"), None)


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds one compressed run."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def test_a_bomb_is_refused_by_its_header() -> None:
    with pytest.raises(InputError, match="says it is 60000 x 60000 pixels"):
        read_image(bomb(60_000, 60_000), 16)
    with pytest.raises(InputError, match="too thin to be resized"):
        read_image(bomb(400_000_000, 1), 16)
    # Within the bound on pixels, and honest about nothing else: no more than a strip is held.
    with pytest.raises(InputError, match="ends early"):
        read_image(bomb(20_000, 20_000), 16)
