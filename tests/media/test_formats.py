"""Compare TIFF, AVIF and HEIC with Pillow, pillow-heif, tifffile and values written by hand."""

import io
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from pillow_heif import HeifImageFile, register_heif_opener
from small_media import encoded, number_of, numbered, smooth_image

from lwm.core.errors import InputError
from lwm.media import images
from lwm.media.images import is_image, read_image
from lwm.media.videos import is_video, read_video

register_heif_opener()

LEVELS = np.random.default_rng(0).integers(0, 65536, (6, 9, 4), dtype=np.uint16)
RGB16, GRAY16 = LEVELS[..., :3].copy(), LEVELS[..., 0].copy()
RGB8, GRAY8 = (RGB16 >> 8).astype(np.uint8), (GRAY16 >> 8).astype(np.uint8)


def tiff(pixels: np.ndarray, photometric: str = "rgb", **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric=photometric, **options)
    return file.getvalue()


def triple(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[..., None], 3, axis=2)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("pixels", "options", "expected"),
    [
        (RGB8, {}, RGB8),
        (RGB8, {"compression": "zlib", "predictor": False, "rowsperstrip": 2}, RGB8),
        (RGB8, {"tile": (16, 16)}, RGB8),
        (RGB8.transpose(2, 0, 1), {"planarconfig": "separate"}, RGB8),
        (RGB16, {}, RGB8),
        (RGB16.transpose(2, 0, 1), {"planarconfig": "separate"}, RGB8),
        (GRAY8, {"photometric": "minisblack"}, triple(GRAY8)),
        (GRAY16, {"photometric": "minisblack"}, triple(GRAY8)),
        (GRAY8, {"photometric": "miniswhite"}, triple(255 - GRAY8)),
        (GRAY16, {"photometric": "miniswhite"}, triple(255 - GRAY8)),
        # An additional channel of unknown meaning is no transparency.
        ((LEVELS >> 8).astype(np.uint8), {"extrasamples": ["unspecified"]}, RGB8),
    ],
)
def test_tiff_layouts_give_their_levels(
    order: str, pixels: np.ndarray, options: dict, expected: np.ndarray
) -> None:
    data = tiff(np.ascontiguousarray(pixels), **{"byteorder": order} | options)
    np.testing.assert_array_equal(read_image(data, None), expected)


def test_a_bigtiff_is_read() -> None:
    np.testing.assert_array_equal(read_image(tiff(RGB8, bigtiff=True), None), RGB8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "packbits", "tiff_adobe_deflate"])
def test_tiffs_of_pillow_equal_its_own_reading(mode: str, compression: str | None) -> None:
    image = smooth_image(31, 17).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    data = encoded(image.convert(mode), "TIFF", compression=compression)
    direct = Image.open(io.BytesIO(data))
    if direct.mode in ("LA", "RGBA"):
        white = Image.new("RGBA", direct.size, "white")
        direct = Image.alpha_composite(white, direct.convert("RGBA"))
    difference = read_image(data, None).astype(int) - np.array(direct.convert("RGB"))
    assert np.abs(difference).max() <= (1 if "A" in mode else 0)


def test_jpeg_and_fax_tiffs_equal_pillow() -> None:
    image = smooth_image(64, 48)
    photograph = encoded(image, "TIFF", compression="jpeg")
    direct = np.array(Image.open(io.BytesIO(photograph)).convert("RGB")).astype(int)
    assert np.abs(read_image(photograph, None) - direct).mean() <= 2
    page = image.convert("1")
    for compression in ("group3", "group4"):
        data = encoded(page, "TIFF", compression=compression)
        np.testing.assert_array_equal(read_image(data, None), np.array(page.convert("RGB")))


def test_sixteen_bit_cmyk_is_scaled() -> None:
    expected = np.array(Image.fromarray((LEVELS >> 8).astype(np.uint8), "CMYK").convert("RGB"))
    np.testing.assert_array_equal(read_image(tiff(LEVELS, "separated"), None), expected)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiff(GRAY16 / np.float32(65535), "minisblack"), "samples of 32 bits"),
        (tiff(GRAY16.astype(np.uint32), "minisblack"), "samples of 32 bits"),
        (tiff(GRAY16.astype(np.int16), "minisblack"), "1 channels of short"),
        (tiff(RGB8, "cielab"), "photometric interpretation 8"),
        (encoded(smooth_image(8, 8).convert("YCbCr"), "TIFF"), "photometric interpretation 6"),
        (encoded(smooth_image(8, 8), "TIFF", compression="zstd"), "compression 50000"),
        (tiff(RGB8, extratags=[(50706, 1, 4, b"\1\4\0\0", True)]), "a camera's raw data"),
        (tiff(RGB8, subfiletype=1), "begins with a thumbnail"),
        (tiff(GRAY16, "cfa"), "a camera's raw data"),
    ],
)
def test_tiffs_without_plain_levels_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_image(data, 8)
    assert is_image(data)


def test_a_tiff_gives_its_first_page_with_a_remark(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = smooth_image(20, 20, 1), smooth_image(20, 20, 2)
    pages = encoded(first, "TIFF", save_all=True, append_images=[second, second])
    np.testing.assert_array_equal(read_image(pages, None), np.array(first))
    assert "has 3 pages; the first is used" in capsys.readouterr().err
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(RGB8, photometric="rgb")
        writer.write(RGB8[::2, ::2], photometric="rgb", subfiletype=1)  # a thumbnail
    np.testing.assert_array_equal(read_image(file.getvalue(), None), RGB8)
    assert capsys.readouterr().err == ""


def test_a_tiff_too_wide_to_buffer_its_rows_is_refused() -> None:
    data = bytearray(tiff(np.zeros((1000, 1, 3), np.uint8)))
    place = data.index(struct.pack("<HHII", 256, 4, 1, 1))
    data[place + 8 : place + 12] = struct.pack("<I", 200_000)
    with pytest.raises(InputError, match="takes more than 512 MiB to decode"):
        read_image(bytes(data), 16)


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_avif_and_heic_equal_their_libraries(kind: str, tmp_path: Path) -> None:
    image = smooth_image(61, 40).convert("RGBA")
    image.paste((0, 0, 0, 0), (30, 0, 61, 40))
    data = encoded(image, kind)
    (tmp_path / "named.jpg").write_bytes(data)
    opened = HeifImageFile(io.BytesIO(data)) if kind == "HEIF" else Image.open(io.BytesIO(data))
    white = Image.new("RGBA", image.size, "white")
    direct = np.array(Image.alpha_composite(white, opened).convert("RGB")).astype(int)
    result = read_image(tmp_path / "named.jpg", None)
    assert np.abs(result - direct).max() <= 1
    assert (result[:, 40:] > 250).all()
    assert np.abs(result[:, :20].astype(int) - np.array(image.convert("RGB"))[:, :20]).mean() < 6
    assert not is_video(data)
    with pytest.raises(InputError, match="is a still image"):
        read_video(data, 16)


@pytest.mark.parametrize("kind", ["AVIF", "HEIF", "TIFF"])
@pytest.mark.parametrize("number", [3, 5, 6, 8])
def test_orientation_is_applied(kind: str, number: int) -> None:
    upright = np.array(smooth_image(48, 32))
    stored = {
        3: upright[::-1, ::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[number]
    exif = Image.Exif()
    exif[0x0112] = number
    image = Image.fromarray(np.ascontiguousarray(stored))
    image.info["exif"] = exif.tobytes()  # pillow-heif reads it here
    data = encoded(image, kind, **({} if kind == "HEIF" else {"exif": exif}))
    result = read_image(data, None)
    assert result.shape == upright.shape
    assert np.abs(result.astype(int) - upright).mean() < 6
    assert read_image(data, 16).shape == (16, 16, 3)


@pytest.mark.parametrize("kind", ["AVIF", "PNG", "WEBP", "GIF"])
def test_an_animation_is_a_video_and_one_frame_is_not(kind: str) -> None:
    frames = [Image.fromarray(numbered(index)) for index in range(5)]
    options = {"save_all": True, "duration": 100}
    moving = encoded(frames[0], kind, append_images=frames[1:], **options)
    assert is_video(moving)
    assert [number_of(frame) for frame in read_video(moving, 32)] == list(range(5))
    still = encoded(frames[3], kind, **options)
    assert not is_video(still)
    assert number_of(read_image(still, 32)) == 3


def test_a_missing_package_for_heic_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(smooth_image(20, 20), "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert is_image(data)
    with pytest.raises(InputError, match=r"needs the package pillow-heif; install lwm\[heic\]"):
        read_image(data, 16)


@pytest.mark.parametrize("kind", ["AVIF", "HEIF", "TIFF"])
def test_limits_on_pixels_and_memory_apply(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(smooth_image(151, 97), kind)
    monkeypatch.setattr(images, "_MAX_PIXELS", 10_000)
    with pytest.raises(InputError, match="declares 151 x 97 pixels"):
        read_image(data, 16)
    monkeypatch.undo()
    monkeypatch.setattr(images, "MAX_BYTES", 20_000)
    if kind == "TIFF":  # in strips
        monkeypatch.setattr(images, "_STRIP_PIXELS", 700)
        expected = np.array(smooth_image(151, 97).resize((24, 16)).crop((4, 0, 20, 16)))
        np.testing.assert_array_equal(read_image(data, 16), expected)
    else:
        with pytest.raises(InputError, match=f"{kind} of 151 x 97 pixels.* scale it down"):
            read_image(data, 16)


def test_a_tiff_that_declares_more_than_it_has_is_refused() -> None:
    data = bytearray(tiff(np.zeros((4, 4), np.uint8), "minisblack"))
    for tag in (256, 257, 278):  # width, height and rows of a strip
        place = data.index(struct.pack("<HHII", tag, 4, 1, 4))
        data[place + 8 : place + 12] = struct.pack("<I", 20_000)
    with pytest.raises(InputError, match="cut short"):
        read_image(bytes(data), 16)
