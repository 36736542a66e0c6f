"""Compare images with direct use of Pillow, and with files built by hand."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_media import encoded, smooth_image

from lwm.core.errors import InputError
from lwm.media import images
from lwm.media.images import is_image, read_image, to_pixels, to_unit, write_image


def framed(image: Image.Image, size: int) -> np.ndarray:
    """Frame an image as the original does, with Pillow only."""
    width, height = image.size
    short = min(width, height)
    small = image.resize((size * width // short, size * height // short))
    left, top = (small.width - size) / 2, (small.height - size) / 2
    return np.array(small.crop((round(left), round(top), round(left) + size, round(top) + size)))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
@pytest.mark.parametrize(("width", "height"), [(61, 40), (40, 61), (48, 48), (9, 7)])
def test_every_format_equals_framing_with_pillow(kind: str, width: int, height: int) -> None:
    data = encoded(smooth_image(width, height), kind)
    direct = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(read_image(data, 24), framed(direct, 24))
    np.testing.assert_array_equal(read_image(data, None), np.array(direct))


def test_reading_in_strips_equals_reading_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    image = smooth_image(123, 77)
    data = encoded(image, "PNG")
    monkeypatch.setattr(images, "_STRIP_PIXELS", 500)
    np.testing.assert_array_equal(read_image(data, 20), framed(image, 20))
    np.testing.assert_array_equal(read_image(data, None), np.array(image))


def test_a_path_and_its_bytes_give_equal_images(tmp_path: Path) -> None:
    data = encoded(smooth_image(30, 20), "PNG")
    (tmp_path / "named.txt").write_bytes(data)
    np.testing.assert_array_equal(read_image(tmp_path / "named.txt", 8), read_image(data, 8))
    assert is_image(str(tmp_path / "named.txt"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB", "L"])
def test_transparent_pixels_become_white(mode: str) -> None:
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[:, :3] = [200, 0, 0, 255]
    pixels[:, 3:] = [10, 20, 30, 0]
    image = Image.fromarray(pixels)
    options = {}
    if mode in ("P", "PA"):
        image = Image.fromarray(np.repeat([[0, 0, 0, 1, 1, 1]], 4, axis=0).astype(np.uint8), "P")
        image.putpalette([200, 0, 0, 10, 20, 30])
        # One transparent index, or an alpha value for each index.
        options["transparency"] = 1 if mode == "P" else b"\xff\x00"
    elif mode in ("RGB", "L"):
        image = image.convert(mode)
        options["transparency"] = (10, 20, 30) if mode == "RGB" else image.getpixel((5, 0))
    else:
        image = image.convert(mode)
    result = read_image(encoded(image, "PNG", **options), None)
    assert (result[:, 3:] == 255).all()
    assert (result[:, :3] == ([60] * 3 if mode in ("LA", "L") else [200, 0, 0])).all()


def test_half_transparent_pixels_become_half_white() -> None:
    image = Image.new("RGBA", (5, 5), (100, 0, 200, 128))
    for kind in ("PNG", "WEBP"):
        data = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
        pixel = read_image(data, None)[2, 2].astype(int)
        expected = np.array([100, 0, 200]) * 128 / 255 + 255 * 127 / 255
        assert np.abs(pixel - expected).max() <= 1


@pytest.mark.parametrize("mode", ["L", "1", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = smooth_image(16, 16).convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    data = encoded(image, kind, **({"quality": 100} if kind == "JPEG" else {}))
    result = read_image(data, None).astype(int)
    assert np.abs(result - np.array(image.convert("RGB"))).max() <= (6 if mode == "CMYK" else 0)


def sixteen_bits(values: np.ndarray, color: int) -> bytes:
    """Build a PNG with 16 bits per channel by its specification."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(("color", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_scaled_not_clipped(color: int, channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, channels))
    if color in (4, 6):
        values[..., -1] = 65535
    result = read_image(sixteen_bits(values, color), None)
    shown = values[..., :1] if channels < 3 else values[..., :3]
    assert np.abs(result - shown / 257).max() <= 1


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(number: int, kind: str) -> None:
    upright = np.array(smooth_image(48, 32))
    # As a camera stores it; the comments quote the standard: where row 0 and column 0 are shown.
    stored = {
        1: upright,  # top, left
        2: upright[:, ::-1],  # top, right
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: upright.transpose(1, 0, 2),  # left, top
        6: upright.transpose(1, 0, 2)[::-1],  # right, top
        7: upright.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
        8: upright.transpose(1, 0, 2)[:, ::-1],  # left, bottom
    }[number]
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, number, 0, 0)
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    data = encoded(
        Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options.get(kind, {})
    )
    result = read_image(data, None)
    assert result.shape == upright.shape
    assert np.abs(result.astype(int) - upright).mean() <= (1 if kind == "JPEG" else 0)
    if kind == "PNG":
        np.testing.assert_array_equal(read_image(data, 16), framed(Image.fromarray(upright), 16))


def test_an_animation_gives_its_first_image() -> None:
    first, second = smooth_image(20, 20, 1), smooth_image(20, 20, 2)
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        data = encoded(first, kind, save_all=True, append_images=[second], duration=100, **options)
        distance = np.abs(read_image(data, None).astype(int) - np.array(first)).mean()
        assert distance < (3 if kind == "GIF" else 0.01), kind


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG"])
def test_written_images_can_be_read_and_replaced(tmp_path: Path, name: str) -> None:
    pixels = np.array(smooth_image(31, 17))
    write_image(tmp_path / name, pixels)
    with Image.open(tmp_path / name) as image:
        assert image.format == ("PNG" if name.endswith("png") else "JPEG")
        limit = 0 if name.endswith("png") else 2
        assert np.abs(np.array(image).astype(int) - pixels).mean() <= limit
    write_image(tmp_path / name, pixels[::-1])  # replaces the file
    assert np.abs(read_image(tmp_path / name, None).astype(int) - pixels[::-1]).mean() <= limit
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_refused_images_leave_no_file(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(InputError, match=r"'\.tiff'; an image is written as \.png, \.jpg, \.jpeg"):
        write_image(tmp_path / "a.tiff", pixels)
    with pytest.raises(InputError, match="there is no directory"):
        write_image(tmp_path / "missing" / "a.png", pixels)
    with pytest.raises(InputError, match="0 x 4 pixels"):
        write_image(tmp_path / "a.png", pixels[:, :0])
    with pytest.raises(InputError, match="beyond JPEG's 65500"):
        write_image(tmp_path / "a.jpg", np.zeros((1, 65501, 3), np.uint8))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match="is a directory"):
        write_image(tmp_path / "folder.png", pixels)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_levels_are_unchanged_by_conversion_to_floats_and_back() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    unit = to_unit(levels)
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit, levels.astype(np.float64) / 127.5 - 1, atol=1e-7)
    np.testing.assert_array_equal(to_pixels(unit), levels)


@given(st.lists(st.floats(-10, 10, width=32), min_size=1))
def test_floats_are_clipped_and_rounded(values: list[float]) -> None:
    """Check the conversion that all generated images and videos use."""
    expected = np.clip((np.array(values) + 1) * 127.5, 0, 255)
    result = to_pixels(np.array(values, np.float32))
    assert np.abs(result - expected).max() <= 0.5001
