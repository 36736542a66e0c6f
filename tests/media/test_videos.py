"""Read videos that PyAV encoded, whose frames show their numbers."""

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from small_media import SIDE, encoded, number_of, numbered, smooth_image, video

from lwm.core.errors import InputError
from lwm.media import streams, videos
from lwm.media.images import is_image
from lwm.media.videos import is_video, iterate_frames, read_video, write_video

FRAMES = [numbered(index) for index in range(100)]

# With a keyframe every ten frames where the codec has such an option.
KINDS = {
    "mp4": {"container": "mp4", "options": {"g": "10", "bf": "3", "b-adapt": "0"}},
    "mp4, open groups": {"container": "mp4", "options": {"g": "10", "x264-params": "open-gop=1"}},
    "fragmented mp4": {
        "container": "mp4",
        "options": {"g": "10"},
        "container_options": {"movflags": "frag_keyframe+empty_moov"},
    },
    "mov": {"container": "mov", "codec": "mpeg4", "options": {"g": "10"}},
    "webm": {"container": "webm", "codec": "libvpx", "options": {"g": "10", "b": "2M"}},
    "mkv": {"container": "matroska", "options": {"g": "10", "bf": "3", "b-adapt": "0"}},
    "avi": {"container": "avi", "codec": "mpeg4", "options": {"g": "10"}},
    # AVI cannot store the times of frames whose display order differs from the coding order.
    "avi, out of order": {"container": "avi", "options": {"g": "10", "bf": "3"}},
    "mpeg-ts": {"container": "mpegts", "codec": "mpeg2video", "options": {"g": "10"}},
    "flv": {"container": "flv", "codec": "flv", "options": {"g": "10"}},
}


@pytest.fixture(scope="module", params=list(KINDS))
def file(request: pytest.FixtureRequest) -> bytes:
    return video(FRAMES, **KINDS[request.param])


def numbers(frames: np.ndarray) -> list[int]:
    return [number_of(frame) for frame in frames]


def test_every_container_gives_the_sampled_frames(file: bytes) -> None:
    assert numbers(read_video(file, 32)) == list(range(100))
    even = np.linspace(0, 99, 7).astype(int).tolist()
    assert numbers(read_video(file, 32, max_frames=7)) == even
    assert numbers(read_video(file, 32, fps=1.0)) == [0, 25, 50, 75]
    assert numbers(read_video(file, 32, fps=50.0, max_frames=5)) == [0, 24, 49, 74, 99]
    assert is_video(file)
    assert not is_image(file)


@pytest.mark.parametrize("kind", ["mp4", "mkv", "webm", "mov"])
def test_decoding_starts_at_the_nearest_keyframe(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = video(FRAMES, **KINDS[kind])
    decoded = []
    advance = streams._Reader.advance
    monkeypatch.setattr(
        streams._Reader, "advance", lambda self: decoded.append(1) or advance(self)
    )
    assert numbers(read_video(file, 32, max_frames=3)) == [0, 49, 99]
    # One, and at most ten for each of the others, twice if the index is in decoding order.
    assert len(decoded) <= 1 + 2 * 2 * 11


def test_iterating_has_no_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    file = video(FRAMES)
    monkeypatch.setattr(videos, "_MAX_BYTES", 32 * 32 * 3 * 50)
    with pytest.raises(InputError, match="gives 100 frames of 32 x 32 pixels, more than"):
        read_video(file, 32)
    assert [number_of(frame) for frame in iterate_frames(file, 32)] == list(range(100))


def test_a_frame_is_framed_like_an_image(tmp_path: Path) -> None:
    frames = [np.array(smooth_image(90, 64, seed)) for seed in range(3)]
    file = video(frames, options={"crf": "0"})
    (tmp_path / "a.mp4").write_bytes(file)
    with av.open(str(tmp_path / "a.mp4")) as container:
        direct = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for ours, whole in zip(read_video(file, 16), direct, strict=True):
        small = Image.fromarray(whole).resize((16 * 90 // 64, 16)).crop((3, 0, 19, 16))
        np.testing.assert_array_equal(ours, np.array(small))


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_variable_rates_are_sampled_by_time(container: str) -> None:
    # A second at 20 frames per second, two seconds of one frame, a second at 10 per second.
    ticks = [*range(0, 1000, 50), *range(3000, 4000, 100)]
    file = video(FRAMES[: len(ticks)], container=container, ticks=ticks)
    taken = numbers(read_video(file, 32, fps=2.0))
    assert taken[:8] == [0, 10, 19, 19, 19, 19, 20, 25]
    # Without a rate, frames are spaced by number and not by time.
    assert numbers(read_video(file, 32, max_frames=4)) == [0, 9, 19, 29]


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
@pytest.mark.parametrize("mirrored", [False, True])
def test_rotation_is_applied(degrees: int, mirrored: bool) -> None:
    stored = np.zeros((32, 64, 3), np.uint8)
    stored[:16, :32], stored[:16, 32:], stored[16:, :32] = [255, 0, 0], [0, 255, 0], [0, 0, 255]
    upright = np.rot90(stored, degrees // 90)
    upright = upright[:, ::-1] if mirrored else upright
    height, width = upright.shape[:2]
    top, left = (height - 32) // 2, (width - 32) // 2
    square = upright[top : top + 32, left : left + 32].astype(int)
    file = video([stored] * 2, turn=(degrees, mirrored))
    assert np.abs(read_video(file, 32)[0] - square).mean() < 5


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_are_videos_and_images(kind: str) -> None:
    images = [Image.fromarray(numbered(index)) for index in range(12)]
    pause = [100] * 4 + [700] * 4 + [300] * 4
    file = encoded(images[0], kind, save_all=True, append_images=images[1:], duration=pause)
    assert numbers(read_video(file, 32)) == list(range(12))
    assert numbers(read_video(file, 32, max_frames=3)) == [0, 5, 11]
    assert numbers(read_video(file, 32, fps=1.0)) == [0, 4, 6, 7, 10]
    assert is_video(file)
    assert is_image(file)
    still = encoded(images[0], kind)
    assert is_image(still)
    assert not is_video(still)
    with pytest.raises(InputError, match=r"still image|not a video"):
        read_video(still, 32)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_transparent_pixels_of_an_animation_become_white(kind: str) -> None:
    transparent = np.zeros((32, 32, 4), np.uint8)
    transparent[:] = [200, 0, 0, 255]
    transparent[:, 17:30] = 0
    mirrored = np.ascontiguousarray(transparent[:, ::-1])
    images = [Image.fromarray(transparent), Image.fromarray(mirrored)]
    options = {"disposal": 2} if kind == "GIF" else {"lossless": True}
    file = encoded(
        images[0], kind, save_all=True, append_images=images[1:], duration=100, **options
    )
    first, second = read_video(file, 32).astype(int)
    for frame, is_mirrored in ((first, False), (second, True)):
        frame = frame[:, ::-1] if is_mirrored else frame
        assert np.abs(frame[:, :15] - [200, 0, 0]).max() <= 8
        assert (frame[:, 17:30] == 255).all()


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
@pytest.mark.parametrize("fps", [4.0, 12.5])
def test_written_videos_can_be_read(tmp_path: Path, suffix: str, fps: float) -> None:
    path = tmp_path / f"a{suffix}"
    frames = np.stack(FRAMES[:9])
    frames[:, : SIDE // 4] = [220, 30, 90]
    write_video(path, frames, fps=fps)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    result = read_video(path, SIDE)
    assert numbers(result) == list(range(9))
    assert np.abs(result[:, 2:14].astype(int) - [220, 30, 90]).max() <= 8
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        assert stream.time_base is not None
        times = [
            float(packet.pts * stream.time_base) for packet in packets if packet.pts is not None
        ]
        np.testing.assert_allclose(sorted(times), np.arange(9) / fps, atol=0.0051)
        codec, pixels = stream.codec_context.name, stream.codec_context.pix_fmt
        expected = {".mp4": ("h264", "yuv420p"), ".webm": ("vp9", "yuv420p")}
        assert (codec, pixels) == expected.get(suffix, (codec, pixels))
    if suffix == ".mp4":
        content = path.read_bytes()
        assert content.index(b"moov") < content.index(b"mdat")  # the index comes first


def test_frames_may_come_from_a_generator(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", (numbered(index) for index in range(5)))
    assert numbers(read_video(tmp_path / "a.mp4", 32)) == list(range(5))


def test_refused_videos_leave_no_file(tmp_path: Path) -> None:
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    with pytest.raises(InputError, match=r"'\.avi'; a video is written as \.mp4, \.webm, \.gif"):
        write_video(tmp_path / "a.avi", frames)
    with pytest.raises(InputError, match="there are no frames to write"):
        write_video(tmp_path / "a.mp4", frames[:0])
    with pytest.raises(InputError, match="frames of 15 x 16 pixels cannot be written as"):
        write_video(tmp_path / "a.mp4", frames[:, :, :15])
    with pytest.raises(InputError, match=r"fps is 60\.0; \.gif takes from 0\.01 to 50"):
        write_video(tmp_path / "a.gif", frames, fps=60.0)
    with pytest.raises(InputError, match="frame 1 is 8 x 16 pixels and the first 16 x 16"):
        write_video(tmp_path / "a.webm", iter([frames[0], frames[1, :, :8]]))
    assert not list(tmp_path.iterdir())
