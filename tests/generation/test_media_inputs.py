"""Check that files, bytes, URLs and arrays of images and videos become codes."""

import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from lwm.core.errors import InputError
from lwm.generation.media_inputs import encode_media
from lwm.media.images import write_image
from lwm.media.videos import write_video

SIZE = 8


class Reds:
    """Encode each quarter of an image as its mean red."""

    config = SimpleNamespace(image_size=SIZE)
    batches: ClassVar[list[int]] = []

    def encode(self, pixels: Any, /) -> Any:
        self.batches.append(len(pixels))
        half = SIZE // 2
        red = np.rint((pixels[..., 0] + 1) * 127.5).reshape(-1, 2, half, 2, half)
        return red.mean(axis=(2, 4)).astype(int)

    def decode(self, codes: Any, /) -> Any:
        raise NotImplementedError


def encode(part: dict[str, Any]) -> np.ndarray:
    return encode_media(part, Reds)


def flat(red: int, side: int = SIZE) -> np.ndarray:
    return np.broadcast_to(np.array([red, 9, 9], np.uint8), (side, side, 3)).copy()


def test_an_image_has_the_same_codes_from_every_source(tmp_path: Path) -> None:
    path = tmp_path / "an image.png"
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
        assert np.abs(encode(part) - [[0, 200, 0, 200]]).max() < 9  # resizing blurs the edge
    write_image(path, flat(50, 20))  # a file that changes is read again
    np.testing.assert_array_equal(encode(parts[1]), [[50] * 4])


def test_frames_of_a_video_are_sampled_and_encoded_in_batches(tmp_path: Path) -> None:
    Reds.batches.clear()
    frames = np.stack([flat(red) for red in range(0, 250, 5)])
    codes = encode({"type": "video", "video": frames})
    np.testing.assert_array_equal(codes[:, 0], np.linspace(0, 49, 8).astype(int) * 5)
    assert encode({"type": "video", "video": frames, "max_frames": 40}).shape == (40, 4)
    assert Reds.batches == [8, 32, 8]
    path = tmp_path / "clip.mp4"
    write_video(path, np.repeat(np.repeat(frames, 4, axis=1), 4, axis=2), fps=10.0)
    codes = encode({"type": "video", "video": path, "fps": 2.0})
    assert len(codes) == 10
    assert np.abs(codes[:, 0] - np.arange(0, 250, 25)).max() < 12  # the format loses a little
    assert len(encode({"type": "video", "video": path})) == 8


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image", "image": None}, "NoneType"),
        ({"type": "image", "image": "nowhere.png"}, "nowhere.png"),
        ({"type": "image", "image": "https://example.org/a.png"}, "is on the network"),
        ({"type": "image", "image": "data:image/png;base64,%%%"}, "data: URL"),
        ({"type": "image", "image": np.zeros((4, 4), np.uint8)}, r"\[4, 4\]"),
        ({"type": "image", "image": np.zeros((4, 4, 3), np.float32)}, "float32"),
        ({"type": "video", "video": np.zeros((4, 4, 3), np.uint8)}, "frames, height, width"),
        ({"type": "video", "video": np.zeros((2, 4, 4, 3), np.uint8), "fps": 2.0}, "max_frames"),
        ({"type": "sound", "sound": b""}, "'sound'"),
        *(
            ({"type": "video", "video": video, "max_frames": value}, f"max_frames.*{words}")
            for video in (np.zeros((2, 4, 4, 3), np.uint8), "nowhere.mp4")
            for value, words in (
                (0, "is 0"),
                (-3, "is -3"),
                ([1], r"\[1\]"),
                (2.5, "2.5"),
                ("2", "'2'"),
                (True, "True"),
            )
        ),
        *(
            ({"type": "video", "video": "nowhere.mp4", "fps": value}, f"fps.*{words}")
            for value, words in (
                (0, "is 0"),
                (float("nan"), "is nan"),
                ("2", "'2'"),
                (True, "True"),
                ([1], "1"),
            )
        ),
    ],
)
def test_bad_parts_are_refused(part: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        encode(part)


def test_an_image_is_no_video_and_a_text_no_image(tmp_path: Path) -> None:
    write_image(tmp_path / "still.png", flat(3))
    with pytest.raises(InputError, match=r"still\.png"):
        encode({"type": "video", "video": tmp_path / "still.png"})
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    with pytest.raises(InputError, match=r"text\.png"):
        encode({"type": "image", "image": tmp_path / "text.png"})
