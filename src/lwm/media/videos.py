"""Videos in and out: sampled frames of a file as RGB arrays, and arrays to MP4, WebM and GIF.
Knows nothing of models or tokens.

A frame is resized and cut as the original does it as soon as it is decoded, so what is held is
the small frames alone, and decoding starts at the keyframe before each frame that is wanted, so
an hour of video costs what is sampled from it.
"""

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from jaxtyping import UInt8
from PIL import Image

from lwm.core.errors import InputError
from lwm.media.animated_webp import animation_frames, animation_times
from lwm.media.choice import check_choice, choose_frames
from lwm.media.framing import check_size, crop_square
from lwm.media.images import is_image
from lwm.media.outputs import extension_of, new_file
from lwm.media.sources import MediaSource, image_format, open_media, refuse_truncated
from lwm.media.streams import frames_at, open_stream, walk

__all__ = ["is_image", "is_video", "iterate_frames", "read_video", "write_video"]

_MOST_BYTES = 1 << 32  # of frames that are returned at once


def is_video(source: MediaSource) -> bool:
    """Whether the file holds moving pictures by its content; an animated GIF or WebP is one, and
    an image as well, a still one is not.

    Raises:
        InputError: the file is missing or empty.
    """
    with open_media(source) as (file, name):
        kind = image_format(file)
        if kind == "WEBP":
            timeline = animation_times(file)
            return timeline is not None and len(timeline.times) > 1
        try:
            with open_stream(file, name) as (container, stream):
                return kind != "GIF" or walk(container, stream, name).count > 1
        except InputError:
            return False


def read_video(
    source: MediaSource, size: int, *, max_frames: int | None = None, fps: float | None = None
) -> UInt8[np.ndarray, "frames size size 3"]:
    """Frames of a video file, or of its bytes, each framed to a square of `size`.

    Args:
        max_frames: at most so many, in even steps from the first to the last.
        fps: one frame for every 1 / fps seconds, the one that is on the screen then.

    Raises:
        InputError: the file is missing, broken, no video, or what is asked for takes too much
            memory at once (`iterate_frames` takes none).
    """
    with _sampled(source, size, max_frames, fps) as (count, frames, name):
        if count * size * size * 3 > _MOST_BYTES:
            raise InputError(
                f"{name} gives {count} frames of {size} x {size} pixels, more than "
                f"{_MOST_BYTES >> 30} GiB; set max_frames or a lower fps"
            )
        pixels = np.empty((count, size, size, 3), np.uint8)
        for index, one in enumerate(frames):
            pixels[index] = one
    return pixels


def iterate_frames(
    source: MediaSource, size: int, *, max_frames: int | None = None, fps: float | None = None
) -> Iterator[UInt8[np.ndarray, "size size 3"]]:
    """The frames of `read_video` one by one, for more of them than memory holds.

    Raises:
        InputError: as `read_video`, when the first is asked for or where the file breaks.
    """
    with _sampled(source, size, max_frames, fps) as (_, frames, _):
        yield from frames


def require_video_name(path: str | os.PathLike[str], fps: float) -> None:
    """Raises:
    InputError: `write_video` would refuse this name or this rate.
    """
    extension = extension_of(path, _WRITERS, "a video")
    _require_rate(fps, _WRITERS[extension][2], extension)


def write_video(
    path: str | os.PathLike[str],
    frames: Iterable[UInt8[np.ndarray, "height width 3"]],
    *,
    fps: float = 4.0,
) -> None:
    """Writes .mp4 (H.264, yuv420p, as browsers play it), .webm (VP9) or .gif. The frames may come
    from a generator; a file that is there is replaced once the new one is whole.

    A GIF keeps time in hundredths of a second, and frames equal to the one before lengthen that.

    Raises:
        InputError: another extension, no frames, frames of different sizes or of sizes that the
            format does not take, a rate out of range, or a place that cannot be written.
    """
    with new_file(path, _WRITERS, "a video") as (partial, (write, step, fastest)):
        _require_rate(fps, fastest, partial.suffix)
        rest = iter(frames)
        first = next(rest, None)
        if first is None:
            raise InputError(f"there are no frames to write to {path}; give it at least one")
        height, width = first.shape[:2]
        if not (min(height, width) > 0 and max(height, width) <= 16384) or (
            height % step or width % step
        ):
            raise InputError(
                f"frames of {width} x {height} pixels cannot be written as {partial.suffix}, "
                f"whose sides are multiples of {step} up to 16384; crop or pad them"
            )
        write(partial, _alike(itertools.chain([first], rest), first.shape), fps)


def _require_rate(fps: float, fastest: int, extension: str) -> None:
    if not (math.isfinite(fps) and 0.01 <= fps <= fastest):
        raise InputError(f"fps is {fps}; {extension} takes from 0.01 to {fastest} frames a second")


def _alike(frames: Iterable[np.ndarray], shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    for index, one in enumerate(frames):
        if one.shape != shape:
            raise InputError(
                f"frame {index} is {one.shape[1]} x {one.shape[0]} pixels and the first "
                f"{shape[1]} x {shape[0]}; give all of a video one size"
            )
        yield one


def _write_mp4(path: Path, frames: Iterable[np.ndarray], fps: float) -> None:
    # The index in front, so that a browser begins before it has the whole.
    container = {"movflags": "+faststart"}
    _encode(path, "mp4", container, "libx264", {"crf": "18", "preset": "medium"}, frames, fps)


def _write_webm(path: Path, frames: Iterable[np.ndarray], fps: float) -> None:
    options = {"crf": "24", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1"}
    _encode(path, "webm", {}, "libvpx-vp9", options, frames, fps)


def _encode(
    path: Path,
    kind: str,
    container_options: dict[str, str],
    codec: str,
    options: dict[str, str],
    frames: Iterable[np.ndarray],
    fps: float,
) -> None:
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w", format=kind, options=container_options) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.pix_fmt = "yuv420p"
        # Said in the file, because players guess differently by the size of the picture.
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_primaries = ColorPrimaries.BT709
        stream.codec_context.color_trc = ColorTrc.BT709
        stream.codec_context.color_range = ColorRange.MPEG
        for index, pixels in enumerate(frames):
            if index == 0:
                stream.height, stream.width = pixels.shape[:2]
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            picture = picture.reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            picture.pts, picture.time_base = index, 1 / rate
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def _write_gif(path: Path, frames: Iterable[np.ndarray], fps: float) -> None:
    def pictures() -> Iterator[Image.Image]:
        for index, pixels in enumerate(frames):
            picture = Image.fromarray(pixels)
            # Rounded from the start of the video, so that rounding does not add up.
            begin, end = (round((index + edge) * 100 / fps) for edge in (0, 1))
            picture.info["duration"] = (end - begin) * 10
            yield picture

    rest = pictures()
    next(rest).save(path, format="GIF", save_all=True, append_images=rest, loop=0)


# How, of what the sides are multiples, and the highest rate: players slow a GIF above 50 down.
_WRITERS = {
    ".mp4": (_write_mp4, 2, 1000),
    ".webm": (_write_webm, 1, 1000),
    ".gif": (_write_gif, 1, 50),
}


@contextmanager
def _sampled(
    source: MediaSource, size: int, max_frames: int | None, fps: float | None
) -> Iterator[tuple[int, Iterator[np.ndarray], str]]:
    """How many frames there will be, the frames, and the name of the file, which stays open."""
    check_size(size)
    check_choice(max_frames, fps)
    with open_media(source) as (file, name):
        refuse_truncated(file, name)
        kind = image_format(file)
        if kind == "WEBP":
            timeline = animation_times(file)
            if timeline is None:
                raise _still(name)
            indices = choose_frames(timeline, max_frames=max_frames, fps=fps)
            pictures = animation_frames(file, _once(indices), name)
            yield len(indices), _framed(indices, pictures, size, name), name
            return
        if kind in ("JPEG", "BMP"):
            raise _still(name)
        with open_stream(file, name) as (container, stream):
            found = walk(container, stream, name)
            if kind == "GIF" and found.count == 1:
                raise _still(name)
            indices = choose_frames(found.timeline, max_frames=max_frames, fps=fps)
            pictures = frames_at(container, stream, found, _once(indices), name)
            yield len(indices), _framed(indices, pictures, size, name), name


def _once(indices: Sequence[int]) -> list[int]:
    return [index for index, _ in itertools.groupby(indices)]


def _framed(
    indices: Sequence[int], pictures: Iterator[Image.Image], size: int, name: str
) -> Iterator[np.ndarray]:
    """Each picture framed once, and given as often as its index stands in the list."""
    for (_, group), picture in zip(itertools.groupby(indices), pictures, strict=True):
        small = crop_square(picture, size, name)
        for _ in group:
            yield small


def _still(name: str) -> InputError:
    return InputError(f"{name} is a still image; read it as an image")
