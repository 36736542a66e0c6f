"""What is shown, as codes: files, bytes, URLs and arrays alike, each looked at once."""

import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lwm.core.errors import InputError
from lwm.generation.media_inputs import MediaEncoder
from lwm.media.images import write_image
from lwm.media.videos import write_video

SIZE = 8


class Reds:
    """A code for each quarter of a picture: how red it is."""

    config = SimpleNamespace(image_size=SIZE)

    def __init__(self) -> None:
        self.batches: list[int] = []

    def encode(self, pixels: Any, /) -> Any:
        self.batches.append(len(pixels))
        half = SIZE // 2
        red = np.rint((pixels[..., 0] + 1) * 127.5).reshape(-1, 2, half, 2, half)
        return red.mean(axis=(2, 4)).astype(int)

    def decode(self, codes: Any, /) -> Any:
        raise NotImplementedError


@pytest.fixture
def reds() -> Reds:
    return Reds()


@pytest.fixture
def eyes(reds: Reds) -> MediaEncoder:
    return MediaEncoder(lambda: reds)


def flat(red: int, side: int = SIZE) -> np.ndarray:
    return np.broadcast_to(np.array([red, 9, 9], np.uint8), (side, side, 3)).copy()


def test_a_picture_is_the_same_however_it_is_given(
    eyes: MediaEncoder, reds: Reds, tmp_path: Path
) -> None:
    path = tmp_path / "a picture.png"
    pixels = flat(0, 20)
    pixels[:, 10:] = 200
    write_image(path, pixels)
    data = path.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    parts: list[dict[str, Any]] = [
        {"type": "image", "image": pixels},
        {"type": "image", "image": path},
        {"type": "image", "image": str(path)},
        {"type": "image", "image": data},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": path.as_uri()},
    ]
    for part in parts:
        assert np.abs(eyes(part) - [[0, 200, 0, 200]]).max() < 9  # resizing blurs the edge
    # The path, its text and its URL are one file; the bytes and the data: URL are one too.
    assert reds.batches == [1, 1, 1]
    write_image(path, flat(50, 20))  # and a file that changed is another
    np.testing.assert_array_equal(eyes(parts[1]), [[50] * 4])


def test_frames_of_a_video_are_sampled_and_encoded_together(
    eyes: MediaEncoder, reds: Reds, tmp_path: Path
) -> None:
    frames = np.stack([flat(red) for red in range(0, 250, 5)])
    found = eyes({"type": "video", "video": frames})
    np.testing.assert_array_equal(found[:, 0], np.linspace(0, 49, 8).astype(int) * 5)
    assert eyes({"type": "video", "video": frames, "max_frames": 40}).shape == (40, 4)
    assert reds.batches == [8, 32, 8]
    path = tmp_path / "clip.mp4"
    write_video(path, np.repeat(np.repeat(frames, 4, axis=1), 4, axis=2), fps=10.0)
    seen = eyes({"type": "video", "video": path, "fps": 2.0})
    assert len(seen) == 10
    assert np.abs(seen[:, 0] - np.arange(0, 250, 25)).max() < 12  # the format loses a little
    assert len(eyes({"type": "video", "video": path})) == 8


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image", "image": None}, "NoneType"),
        ({"type": "image", "image": "nowhere.png"}, "nowhere.png"),
        ({"type": "image", "image": "https://example.org/a.png"}, "lies on the network"),
        ({"type": "image", "image": "data:image/png;base64,%%%"}, "data: URL"),
        ({"type": "image", "image": np.zeros((4, 4), np.uint8)}, r"\[4, 4\]"),
        ({"type": "image", "image": np.zeros((4, 4, 3), np.float32)}, "float32"),
        ({"type": "video", "video": np.zeros((4, 4, 3), np.uint8)}, "frames, height, width"),
        ({"type": "video", "video": np.zeros((2, 4, 4, 3), np.uint8), "fps": 2.0}, "max_frames"),
        ({"type": "sound", "sound": b""}, "'sound'"),
    ],
)
def test_what_cannot_be_seen_is_refused(
    eyes: MediaEncoder, part: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        eyes(part)


def test_a_picture_as_a_video_and_text_as_a_picture(eyes: MediaEncoder, tmp_path: Path) -> None:
    write_image(tmp_path / "still.png", flat(3))
    with pytest.raises(InputError, match=r"still\.png"):
        eyes({"type": "video", "video": tmp_path / "still.png"})
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    with pytest.raises(InputError, match=r"text\.png"):
        eyes({"type": "image", "image": tmp_path / "text.png"})
