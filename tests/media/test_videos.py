"""Videos that PyAV wrote, with the number of each frame painted into it."""

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from small_media import SIDE, colours, encoded, number_of, numbered, video

from lwm.core.errors import InputError
from lwm.media import streams, videos
from lwm.media.videos import is_image, is_video, iterate_frames, read_video, write_video

FRAMES = [numbered(index) for index in range(100)]

# What is written by whom, with keyframes every ten frames where the codec can be told.
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
    # AVI has no place for the times of frames that are not shown in the order of coding.
    "avi, out of order": {"container": "avi", "options": {"g": "10", "bf": "3"}},
    "mpeg-ts": {"container": "mpegts", "codec": "mpeg2video", "options": {"g": "10"}},
    "flv": {"container": "flv", "codec": "flv", "options": {"g": "10"}},
}


@pytest.fixture(scope="module", params=list(KINDS))
def file(request: pytest.FixtureRequest) -> bytes:
    return video(FRAMES, **KINDS[request.param])


def numbers(frames: np.ndarray) -> list[int]:
    return [number_of(frame) for frame in frames]


def test_every_container_gives_the_frames_asked_for(file: bytes) -> None:
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
    passed = []
    advance = streams._Reader.advance
    monkeypatch.setattr(streams._Reader, "advance", lambda self: passed.append(1) or advance(self))
    assert numbers(read_video(file, 32, max_frames=3)) == [0, 49, 99]
    # 1, and ten at most for each of the others, twice where the index goes by order of decoding.
    assert len(passed) <= 1 + 2 * 2 * 11


def test_iterating_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    file = video(FRAMES)
    monkeypatch.setattr(videos, "_MOST_BYTES", 32 * 32 * 3 * 50)
    with pytest.raises(InputError, match="gives 100 frames of 32 x 32 pixels, more than"):
        read_video(file, 32)
    assert [number_of(frame) for frame in iterate_frames(file, 32)] == list(range(100))


def test_a_frame_is_framed_as_an_image_is(tmp_path: Path) -> None:
    frames = [np.array(colours(90, 64, seed)) for seed in range(3)]
    file = video(frames, options={"crf": "0"})
    (tmp_path / "a.mp4").write_bytes(file)
    with av.open(str(tmp_path / "a.mp4")) as container:
        direct = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for ours, whole in zip(read_video(file, 16), direct, strict=True):
        small = Image.fromarray(whole).resize((16 * 90 // 64, 16)).crop((3, 0, 19, 16))
        np.testing.assert_array_equal(ours, np.array(small))


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_variable_rates_go_by_time(container: str) -> None:
    # A second at 20 a second, a still of two seconds, then a second at 10 a second.
    ticks = [*range(0, 1000, 50), *range(3000, 4000, 100)]
    file = video(FRAMES[: len(ticks)], container=container, ticks=ticks)
    taken = numbers(read_video(file, 32, fps=2.0))
    assert taken[:8] == [0, 10, 19, 19, 19, 19, 20, 25]
    # Without a rate frames count, not time.
    assert numbers(read_video(file, 32, max_frames=4)) == [0, 9, 19, 29]


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
@pytest.mark.parametrize("mirrored", [False, True])
def test_rotation_is_honoured(degrees: int, mirrored: bool) -> None:
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
    pictures = [Image.fromarray(numbered(index)) for index in range(12)]
    pause = [100] * 4 + [700] * 4 + [300] * 4
    file = encoded(pictures[0], kind, save_all=True, append_images=pictures[1:], duration=pause)
    assert numbers(read_video(file, 32)) == list(range(12))
    assert numbers(read_video(file, 32, max_frames=3)) == [0, 5, 11]
    assert numbers(read_video(file, 32, fps=1.0)) == [0, 4, 6, 7, 10]
    assert is_video(file)
    assert is_image(file)
    still = encoded(pictures[0], kind)
    assert is_image(still)
    assert not is_video(still)
    with pytest.raises(InputError, match=r"still image|not a video"):
        read_video(still, 32)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_what_is_clear_in_an_animation_is_white(kind: str) -> None:
    clear = np.zeros((32, 32, 4), np.uint8)
    clear[:] = [200, 0, 0, 255]
    clear[:, 17:30] = 0
    pictures = [Image.fromarray(clear), Image.fromarray(np.ascontiguousarray(clear[:, ::-1]))]
    options = {"disposal": 2} if kind == "GIF" else {"lossless": True}
    file = encoded(
        pictures[0], kind, save_all=True, append_images=pictures[1:], duration=100, **options
    )
    first, second = read_video(file, 32).astype(int)
    for frame, mirrored in ((first, False), (second, True)):
        frame = frame[:, ::-1] if mirrored else frame
        assert np.abs(frame[:, :15] - [200, 0, 0]).max() <= 8
        assert (frame[:, 17:30] == 255).all()


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
@pytest.mark.parametrize("fps", [4.0, 12.5])
def test_what_is_written_can_be_read(tmp_path: Path, suffix: str, fps: float) -> None:
    path = tmp_path / f"a{suffix}"
    frames = np.stack(FRAMES[:9])
    frames[:, : SIDE // 4] = [220, 30, 90]
    write_video(path, frames, fps=fps)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
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
        assert content.index(b"moov") < content.index(b"mdat")  # plays while it loads


def test_a_generator_is_written(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", (numbered(index) for index in range(5)))
    assert numbers(read_video(tmp_path / "a.mp4", 32)) == list(range(5))


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
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
