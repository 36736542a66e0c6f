"""Read sampled frames of videos as RGB arrays, and write arrays as MP4, WebM and GIF.

Each frame is framed as soon as it is decoded, so only small frames are in memory. Decoding starts
at the keyframe before each sampled frame, so an hour of video costs what is sampled from it.
FFmpeg does not read animated WebP, so its frame times come from its chunks and its frames from
Pillow.
"""

import itertools
import math
import os
import struct
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
from lwm.core.files import new_file
from lwm.media.choice import Timeline, check_choice, choose_frames
from lwm.media.files import (
    BinaryFile,
    MediaSource,
    decoder_errors,
    image_format,
    open_media,
    refuse_truncated,
    require_extension,
)
from lwm.media.framing import check_size, crop_square
from lwm.media.images import MAX_BYTES, bitmap_bytes, opaque, open_image
from lwm.media.streams import decode_frames_at, index_frames, open_video

_MAX_BYTES = 1 << 32  # of frames that one call returns


def is_video(source: MediaSource) -> bool:
    """Return whether a file holds a video, by its content.

    An animated GIF, PNG, WebP or AVIF is a video as well as an image; a still one is no video.
    """
    with open_media(source) as (file, name):
        kind = image_format(file)
        if kind == "WEBP":
            timeline = _webp_times(file)
            return timeline is not None and len(timeline.times) > 1
        try:
            with open_video(file, name) as video:
                return kind is None or len(index_frames(video).timeline.times) > 1
        except InputError:
            return False


def read_video(
    source: MediaSource, size: int, *, max_frames: int | None = None, fps: float | None = None
) -> UInt8[np.ndarray, "frames size size 3"]:
    """Read frames from a video file, or from its bytes, each framed to a square of `size`.

    Args:
        max_frames: maximum number of frames, spaced evenly from the first to the last.
        fps: frames per second of video to take, each as visible at that time.
    """
    with _sampled(source, size, max_frames, fps) as (count, frames, name):
        if count * size * size * 3 > _MAX_BYTES:
            raise InputError(
                f"{name} gives {count} frames of {size} x {size} pixels, more than "
                f"{_MAX_BYTES >> 30} GiB; set max_frames or a lower fps"
            )
        pixels = np.empty((count, size, size, 3), np.uint8)
        for index, frame in enumerate(frames):
            pixels[index] = frame
    return pixels


def iterate_frames(
    source: MediaSource, size: int, *, max_frames: int | None = None, fps: float | None = None
) -> Iterator[UInt8[np.ndarray, "size size 3"]]:
    """Yield the frames of `read_video` one by one, for more frames than fit in memory."""
    with _sampled(source, size, max_frames, fps) as (_, frames, _):
        yield from frames


def count_frames(
    source: MediaSource, *, max_frames: int | None = None, fps: float | None = None
) -> int:
    """Return how many frames `read_video` gives, without decoding any."""
    with _sampled(source, 1, max_frames, fps) as (count, _, _):
        return count


@contextmanager
def _sampled(
    source: MediaSource, size: int, max_frames: int | None, fps: float | None
) -> Iterator[tuple[int, Iterator[np.ndarray], str]]:
    """Yield the number of sampled frames, the frames, and the name of the open file."""
    check_size(size)
    check_choice(max_frames, fps)
    with open_media(source) as (file, name):
        refuse_truncated(file, name)
        still = InputError(f"{name} is a still image; read it as an image")
        kind = image_format(file)
        if kind == "WEBP":
            timeline = _webp_times(file)
            if timeline is None:
                raise still
            indices = choose_frames(timeline, max_frames=max_frames, fps=fps)
            images = _webp_frames(file, sorted(set(indices)), name)
            yield len(indices), _framed(indices, images, size, name), name
            return
        if kind in ("JPEG", "BMP", "TIFF"):
            raise still
        with open_video(file, name) as video:
            index = index_frames(video)
            if kind is not None and len(index.timeline.times) == 1:
                raise still
            indices = choose_frames(index.timeline, max_frames=max_frames, fps=fps)
            images = decode_frames_at(video, index, sorted(set(indices)))
            yield len(indices), _framed(indices, images, size, name), name


def _framed(
    indices: Sequence[int], images: Iterator[Image.Image], size: int, name: str
) -> Iterator[np.ndarray]:
    """Frame each image once, and yield it as often as its index occurs."""
    for (_, group), image in zip(itertools.groupby(indices), images, strict=True):
        square = crop_square(image, size, name)
        for _ in group:
            yield square


def _webp_times(file: BinaryFile) -> Timeline | None:
    """Return when each frame of a WebP file appears, or None for a still image."""
    times: list[float] = []
    clock = 0  # milliseconds
    file.seek(12)
    while len(head := file.read(8)) == 8:
        size = struct.unpack("<I", head[4:])[0]
        start = file.tell()
        if head[:4] == b"ANMF":
            header = file.read(16)
            if len(header) < 16:
                break
            times.append(clock / 1000)
            # Browsers show a frame of duration 0 for a tenth of a second.
            clock += int.from_bytes(header[12:15], "little") or 100
        file.seek(start + size + size % 2)
    file.seek(0)
    return Timeline(times=times, end=clock / 1000) if times else None


def _webp_frames(file: BinaryFile, indices: Sequence[int], name: str) -> Iterator[Image.Image]:
    """Yield the frames of these ascending indices.

    A frame builds upon the one before it, so every frame up to the last index is decoded.
    """
    with decoder_errors(name, "an animated WebP"):
        image = open_image(file, name)
        if bitmap_bytes(image) > MAX_BYTES:
            raise InputError(
                f"{name} has frames of {image.width} x {image.height} pixels, which take more "
                f"than {MAX_BYTES >> 20} MiB to decode; scale it down"
            )
    for index in indices:
        with decoder_errors(name, "an animated WebP"):
            image.seek(index)
            image.load()
            frame = opaque(image)
        yield frame


def require_video_name(path: str | os.PathLike[str], fps: float) -> None:
    """Raise InputError if `write_video` would refuse the name of a file or the rate."""
    extension = require_extension(path, _WRITERS, "a video")
    max_fps = _WRITERS[extension][2]
    if not (math.isfinite(fps) and 0.01 <= fps <= max_fps):
        raise InputError(f"fps is {fps}; {extension} takes from 0.01 to {max_fps} frames a second")


def write_video(
    path: str | os.PathLike[str],
    frames: Iterable[UInt8[np.ndarray, "height width 3"]],
    *,
    fps: float = 4.0,
) -> None:
    """Write .mp4 (H.264, yuv420p, which browsers play), .webm (VP9) or .gif.

    The frames may come from a generator. An existing file is replaced when the new one is
    complete. A GIF stores times in hundredths of a second, and merges equal frames.
    """
    require_video_name(path, fps)
    extension = Path(path).suffix.lower()
    write, step, _ = _WRITERS[extension]
    rest = iter(frames)
    first = next(rest, None)
    if first is None:
        raise InputError(f"there are no frames to write to {path}; give it at least one")
    height, width = first.shape[:2]
    if not all(0 < side <= 16384 and side % step == 0 for side in (height, width)):
        raise InputError(
            f"frames of {width} x {height} pixels cannot be written as {extension}, "
            f"whose sides are multiples of {step} up to 16384; crop or pad them"
        )
    with new_file(Path(path), replace=True) as partial:
        write(partial, _same_shape(itertools.chain([first], rest), first.shape), fps)


def _same_shape(frames: Iterable[np.ndarray], shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    for index, frame in enumerate(frames):
        if frame.shape != shape:
            raise InputError(
                f"frame {index} is {frame.shape[1]} x {frame.shape[0]} pixels and the first "
                f"{shape[1]} x {shape[0]}; give all frames of a video one size"
            )
        yield frame


def _encode(path: Path, frames: Iterable[np.ndarray], fps: float) -> None:
    if path.suffix.lower() == ".mp4":
        codec, options = "libx264", {"crf": "18", "preset": "medium"}
    else:
        codec = "libvpx-vp9"
        options = {"crf": "24", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1"}
    # The index of an MP4 comes first, so that a browser plays the video while it loads.
    faststart = {"movflags": "+faststart"} if codec == "libx264" else {}
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w", options=faststart) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.pix_fmt = "yuv420p"
        # Stored in the file, because players otherwise guess it from the size of the frames.
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_primaries = ColorPrimaries.BT709
        stream.codec_context.color_trc = ColorTrc.BT709
        stream.codec_context.color_range = ColorRange.MPEG
        for index, pixels in enumerate(frames):
            if index == 0:
                stream.height, stream.width = pixels.shape[:2]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _write_gif(path: Path, frames: Iterable[np.ndarray], fps: float) -> None:
    def images() -> Iterator[Image.Image]:
        for index, pixels in enumerate(frames):
            image = Image.fromarray(pixels)
            # Rounded from the start of the video, so that rounding errors do not add up.
            begin, end = (round((index + edge) * 100 / fps) for edge in (0, 1))
            image.info["duration"] = (end - begin) * 10
            yield image

    rest = images()
    next(rest).save(path, format="GIF", save_all=True, append_images=rest, loop=0)


# The writer, the number that sides must be multiples of, and the highest rate: players slow down
# a GIF above 50 frames a second.
_WRITERS = {".mp4": (_encode, 2, 1000), ".webm": (_encode, 1, 1000), ".gif": (_write_gif, 1, 50)}
