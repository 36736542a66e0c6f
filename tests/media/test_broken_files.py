"""Check that broken files raise `InputError` with one sentence, and never another exception."""

import io
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import av.stream
import numpy as np
import pytest
from PIL import Image
from pillow_heif import register_heif_opener
from small_media import add_sound, encoded, numbered, smooth_image, video

from lwm.core.errors import InputError
from lwm.media import streams
from lwm.media.images import is_image, read_image
from lwm.media.videos import is_video, read_video, write_video

register_heif_opener()

FRAMES = [numbered(index) for index in range(12)]


def test_missing_and_empty_files_and_bad_sizes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").write_bytes(b"")
    for read in (read_image, read_video):
        with pytest.raises(InputError, match=r"missing\.png does not exist"):
            read(tmp_path / "missing.png", 16)
        with pytest.raises(InputError, match="is not a file"):
            read(tmp_path, 16)
        with pytest.raises(InputError, match=r"empty\.mp4 is empty"):
            read(tmp_path / "empty.mp4", 16)
        with pytest.raises(InputError, match="file of 0 bytes is empty"):
            read(b"", 16)
        for size in (0, -1, 10_000):
            with pytest.raises(InputError, match=f"size is {size}; it must lie between"):
                read(encoded(smooth_image(9, 9), "PNG"), size)


def test_text_named_as_an_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "poem.png"
    path.write_text("Rough winds do shake the darling buds of May\n" * 50)
    with pytest.raises(
        InputError, match=r"poem\.png is not an image that can be read; PNG, .*HEIC"
    ):
        read_image(path, 16)
    with pytest.raises(InputError, match=r"poem\.png is not a video that can be read"):
        read_video(path, 16)
    assert not is_image(path)
    assert not is_video(path)


def test_playlists_cannot_open_other_files(tmp_path: Path) -> None:
    (tmp_path / "real.mp4").write_bytes(video(FRAMES))
    for text in (
        f"ffconcat version 1.0\nfile {tmp_path / 'real.mp4'}\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path / 'real.mp4'}\n#EXT-X-ENDLIST\n",
    ):
        with pytest.raises(InputError, match="is not a video that can be read"):
            read_video(text.encode(), 16)


def test_images_and_videos_are_distinguished() -> None:
    for kind in ("PNG", "JPEG", "BMP"):
        with pytest.raises(InputError, match=r"still image|not a video"):
            read_video(encoded(smooth_image(20, 20), kind), 16)
    with pytest.raises(InputError, match="is not an image"):
        read_image(video(FRAMES), 16)


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_a_truncated_video_is_refused(container: str, part: float) -> None:
    file = video(FRAMES, container=container)
    with pytest.raises(InputError, match="cut short"):
        read_video(file[: int(len(file) * part)], 16)


def test_a_video_truncated_after_its_index_is_refused(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", FRAMES)
    file = (tmp_path / "a.mp4").read_bytes()
    assert file.index(b"moov") < file.index(b"mdat")
    with pytest.raises(InputError, match="cut short"):
        read_video(file[:-200], 16)
    # With an open length, the index still shows that frames are missing.
    place = file.index(b"mdat") - 4
    open_ended = file[:place] + bytes(4) + file[place + 4 : -200]
    with pytest.raises(InputError, match="cut short"):
        read_video(open_ended, 16)


def test_audio_without_video_is_refused() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        add_sound(container)
    with pytest.raises(InputError, match="has no video stream, only audio"):
        read_video(file.getvalue(), 16)
    assert not is_video(file.getvalue())


def test_audio_beside_video_is_ignored() -> None:
    assert len(read_video(video(FRAMES, sound=True), 16)) == len(FRAMES)


def test_a_cover_image_is_not_a_video() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        cover = container.add_stream("png", rate=1)
        assert isinstance(cover, av.VideoStream)
        cover.width = cover.height = 16
        cover.pix_fmt = "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        add_sound(container)
        packet = av.Packet(encoded(smooth_image(16, 16), "PNG"))
        packet.stream, packet.pts, packet.dts, packet.time_base = cover, 0, 0, Fraction(1)
        container.mux(packet)
    with pytest.raises(InputError, match="has no video stream, only audio and video"):
        read_video(file.getvalue(), 16)


def test_large_frames_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    file = video(FRAMES)
    monkeypatch.setattr(streams, "MAX_FRAME_PIXELS", 1000)
    with pytest.raises(InputError, match="frames of 64 x 64 pixels; up to 1000"):
        read_video(file, 16)


def corrupted(data: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.4:
        return data[: chance.randrange(1, len(data))]
    result = bytearray(data)
    # Change headers more often than their share of the bytes.
    end = min(200, len(data)) if chance.random() < 0.5 else len(data)
    for _ in range(chance.choice([1, 3, 20])):
        result[chance.randrange(end)] = chance.randrange(256)
    return bytes(result)


def works(read: Callable[[], np.ndarray]) -> bool:
    """Return whether reading works; otherwise the message must be one line."""
    try:
        result = read()
    except InputError as refusal:
        message = str(refusal)
    else:
        assert result.shape[-3:] == (16, 16, 3)
        return True
    assert message
    assert "\n" not in message
    return False


def image_files() -> dict[str, bytes]:
    image = smooth_image(70, 50)
    exif = Image.Exif()
    exif[0x0112], exif[0x0110] = 6, "camera"
    animated = {
        "save_all": True,
        "append_images": [image.rotate(20), image.rotate(40)],
        "duration": [100, 200, 50],
    }
    return {
        "PNG": encoded(image, "PNG", exif=exif),
        "PNG, palette": encoded(image.quantize(16), "PNG", transparency=b"\x00\x80\xff"),
        "JPEG": encoded(image, "JPEG", exif=exif),
        "JPEG, progressive": encoded(image, "JPEG", progressive=True),
        "BMP": encoded(image, "BMP"),
        "WebP": encoded(image, "WEBP", exif=exif),
        "GIF, animated": encoded(image, "GIF", **animated),
        "WebP, animated": encoded(image, "WEBP", **animated),
        "PNG, animated": encoded(image, "PNG", **animated),
        "TIFF": encoded(image, "TIFF", exif=exif, compression="tiff_lzw"),
        "AVIF, animated": encoded(image, "AVIF", **animated),
        "HEIF": encoded(image, "HEIF"),
    }


@pytest.mark.parametrize("kind", list(image_files()))
def test_corrupted_images_work_or_are_refused(kind: str) -> None:
    data, chance, refused = image_files()[kind], random.Random(kind), 0
    for _ in range(60):
        bad = corrupted(data, chance)
        for read in (read_image, read_video) if "animated" in kind else (read_image,):
            refused += not works(lambda read=read, bad=bad: read(bad, 16))
    assert refused > 5


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("mp4", "libx264"),
        ("webm", "libvpx"),
        ("matroska", "libx264"),
        ("avi", "mpeg4"),
        ("mpegts", "mpeg2video"),
    ],
)
def test_corrupted_videos_work_or_are_refused(container: str, codec: str) -> None:
    data = video(FRAMES, container=container, codec=codec, options={"g": "4"})
    chance, refused = random.Random(container), 0
    for turn in range(60):
        bad = corrupted(data, chance)
        options = [{}, {"max_frames": 3}, {"fps": 2.0}][turn % 3]
        refused += not works(lambda bad=bad, options=options: read_video(bad, 16, **options))
    assert refused > 5
