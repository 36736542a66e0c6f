"""Make small images and videos for tests.

Images have smooth colors for comparison. Video frames show their number as eight blocks, black for
0 and white for 1.
"""

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import av.container
import numpy as np
from PIL import Image

SIDE = 64


def smooth_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return an RGB image without symmetry."""
    corners = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def numbered(number: int) -> np.ndarray:
    bits = [number >> place & 1 for place in range(8)]
    row = np.repeat(np.array(bits, np.uint8) * 255, SIDE // 8)
    return np.broadcast_to(row[None, :, None], (SIDE, SIDE, 3)).copy()


def number_of(frame: np.ndarray) -> int:
    """Read the number that `numbered` painted, also from a resized frame."""
    step = frame.shape[1] / 8
    middle = frame[frame.shape[0] // 2, :, 0]
    bits = [middle[int((place + 0.5) * step)] > 127 for place in range(8)]
    return sum(1 << place for place, bit in enumerate(bits) if bit)


def video(
    frames: Sequence[np.ndarray],
    *,
    container: str = "mp4",
    codec: str = "libx264",
    rate: int = 25,
    ticks: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    turn: tuple[int, bool] = (0, False),
    sound: bool = False,
) -> bytes:
    """Encode a video with PyAV; `ticks` are the times of the frames in milliseconds."""
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=container_options or {}) as output:
        stream = output.add_stream(codec, rate=rate, options=options or {})
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if turn != (0, False):
            stream.set_display_rotation(turn[0], hflip=turn[1])
        if ticks is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if sound:
            add_sound(output)
        for index, pixels in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if ticks is not None:
                picture.pts, picture.time_base = ticks[index], Fraction(1, 1000)
            output.mux(stream.encode(picture))
        output.mux(stream.encode(None))
    return file.getvalue()


def add_sound(output: av.container.OutputContainer) -> None:
    """Add half a second of silence."""
    sound = output.add_stream("aac", rate=8000)
    assert isinstance(sound, av.AudioStream)
    for start in range(0, 4096, 1024):
        silence = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        silence.sample_rate, silence.pts = 8000, start
        output.mux(sound.encode(silence))
    output.mux(sound.encode(None))
