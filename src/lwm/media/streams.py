"""Decode frames of video files with PyAV, starting from the nearest keyframe.

The packets are read once without decoding, which gives the exact times of all frames and the
keyframes. PyAV reads files through our file handle and only with the demuxers listed here, so no
file can make it open another file or an address.
"""

import bisect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import av.container
import av.error
import av.video
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from PIL import Image

from lwm.core.errors import InputError
from lwm.media.choice import Timeline
from lwm.media.files import BinaryFile, decoder_errors
from lwm.media.images import opaque

MAX_FRAME_PIXELS = 1 << 25  # admits 8K; a decoder stores up to about twenty frames

# Without playlists, which name other files, and without text and raw streams, which any file
# could pass for.
_DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng,mpegts,mpeg,flv,ogg,asf"

# Seeking empties the decoder's pipeline; to skip fewer frames than this, decoding them is faster.
_MIN_SKIPPED = 12

# By the signs of the display matrix (a, b, c, d), which maps a pixel at (x, y) to
# (ax + cy, bx + dy), y downwards. Angles other than multiples of 90 degrees are ignored.
_TRANSPOSES = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}

_BEFORE_ALL = -(1 << 62)  # a tick before every frame


@dataclass(frozen=True)
class VideoFile:
    """Hold an open container, its video stream, and the name of the file for error messages."""

    container: av.container.InputContainer
    stream: av.video.VideoStream
    name: str


@dataclass(frozen=True)
class FrameIndex:
    """Hold the times of all frames of a stream.

    `ticks` are in ascending order, or None if the file stores no reliable times; frames are then
    counted while decoding. `keyframes` hold the ticks of display and of decoding.
    """

    timeline: Timeline
    ticks: Sequence[int] | None = None
    keyframes: Sequence[tuple[int, int]] = ()


@contextmanager
def open_video(file: BinaryFile, name: str) -> Iterator[VideoFile]:
    """Open a container and its video stream, or raise InputError; a cover image is not one."""
    file.seek(0)
    try:
        container = av.open(
            file,
            "r",
            container_options={"format_whitelist": _DEMUXERS, "protocol_whitelist": ""},
            options={"max_pixels": str(MAX_FRAME_PIXELS)},
            metadata_errors="replace",
        )
    except Exception as error:
        # A broken video cannot be distinguished from a file that never was a video.
        raise InputError(
            f"{name} is not a video that can be read, or is broken or cut short; "
            "MP4, MOV, WebM, MKV, AVI, MPEG, FLV, Ogg, animated GIF, WebP and AVIF can be read"
        ) from error
    with container:
        streams = [
            stream
            for stream in container.streams.video
            if not stream.disposition & Disposition.attached_pic
        ]
        if not streams:
            kinds = sorted({other.type for other in container.streams})
            content = f"only {' and '.join(kinds)}" if kinds else "no stream at all"
            raise InputError(f"{name} has no video stream, {content}; name a file with one")
        # An animated AVIF lists its still images, which have no duration, before its frames.
        stream = min(streams, key=lambda stream: stream.frames == 1 and stream.duration is None)
        if stream.codec_context is None:
            raise InputError(f"{name} uses an unknown codec; save it as H.264")
        if stream.width * stream.height > MAX_FRAME_PIXELS:
            raise InputError(
                f"{name} has frames of {stream.width} x {stream.height} pixels; up to "
                f"{MAX_FRAME_PIXELS} pixels are read, so scale it down"
            )
        stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
        stream.thread_type = "AUTO"
        # Each thread stores a frame and delays decoding after a seek.
        stream.codec_context.thread_count = 2
        yield VideoFile(container, stream, name)


def index_frames(video: VideoFile) -> FrameIndex:
    """Read every packet of a stream without decoding."""
    name, stream, kind = video.name, video.stream, video.container.format.name
    ticks: list[int | None] = []
    keyframes: list[tuple[int, int]] = []
    duration = packets = 0
    with decoder_errors(name, "a video"):
        for packet in video.container.demux(stream):
            if packet.size == 0:
                continue
            packets += 1
            if packet.is_corrupt:
                raise InputError(f"{name} is cut short or broken; get a complete copy of it")
            if packet.is_keyframe and packet.pts is not None:
                keyframes.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
            if not packet.is_discard:
                ticks.append(packet.pts)
                duration = packet.duration or duration
        indexed = len(stream.index_entries)
        base = stream.time_base
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    if "mp4" in kind and packets < indexed:
        raise InputError(
            f"{name} is cut short: it has {packets} of {indexed} frames; get a complete copy of it"
        )
    if not ticks:
        raise InputError(f"{name} has a video stream without frames; get a complete copy of it")
    known = sorted(tick for tick in ticks if tick is not None)
    # AVI stores no times, so its demuxer guesses them when frames are coded out of order.
    guessed = "avi" in kind and stream.codec_context.has_b_frames
    if len(known) < len(ticks) or base is None or guessed:
        times = [float(index / rate) for index in range(len(ticks))]
        return FrameIndex(Timeline(times=times, end=times[-1] + float(1 / rate)))
    step = duration or max(1, round(1 / (rate * base)))
    times = [float(tick * base) for tick in known]
    timeline = Timeline(times=times, end=float((known[-1] + step) * base))
    return FrameIndex(timeline, known, sorted(keyframes))


def decode_frames_at(
    video: VideoFile, frames: FrameIndex, indices: Sequence[int]
) -> Iterator[Image.Image]:
    """Yield the frames of these ascending indices as upright RGB images."""
    reader = _Reader(video)
    if frames.ticks is None:
        reader.rewind()
        for index in indices:
            while reader.decoded <= index and reader.advance():
                pass
            yield reader.image()
        return
    starts = [shown for shown, _ in frames.keyframes]
    for index in indices:
        tick = frames.ticks[index]
        nearest = bisect.bisect_right(starts, tick) - 1
        keyframe = frames.keyframes[nearest] if nearest >= 0 else None
        reader.go_to(tick, keyframe, frames.ticks)
        yield reader.image()


class _Reader:
    """A position in a stream: `frame` is the last decoded one."""

    def __init__(self, video: VideoFile) -> None:
        self._video = video
        # One for all frames, since creating its tables takes longer than converting a small frame.
        self._reformatter = VideoReformatter()
        self._frames: Iterator[av.VideoFrame] = iter(())
        self._started = False
        self.frame: av.VideoFrame | None = None
        self.decoded = 0  # frames since the last seek

    def rewind(self) -> None:
        self._seek(min(0, self._video.stream.start_time or 0))

    def go_to(self, tick: int, keyframe: tuple[int, int] | None, ticks: Sequence[int]) -> None:
        """Decode up to the frame of this tick, or the next one if a broken stream lacks it."""
        if not self._started or self._is_far(keyframe, ticks):
            # A seek may end after the keyframe if the container's index is in decoding order. Then
            # seek to its decoding time, and at last to the start.
            for start in keyframe or ():
                self._seek(start)
                if self.advance() and self._now() <= tick:
                    break
            else:
                self.rewind()
        while self._now() < tick and self.advance():
            pass

    def advance(self) -> bool:
        """Decode one frame; at the end, keep the last one and return False."""
        with decoder_errors(self._video.name, "a video"):
            frame = next(self._frames, None)
        if frame is None:
            return False
        self.frame = frame
        self.decoded += 1
        return True

    def image(self) -> Image.Image:
        if self.frame is None:
            raise InputError(
                f"no frame of {self._video.name} can be decoded; get a complete copy of it"
            )
        with decoder_errors(self._video.name, "a video"):
            transparent = any(component.is_alpha for component in self.frame.format.components)
            transparent |= self.frame.format.name.startswith("pal")
            kind = "rgba" if transparent else "rgb24"
            pixels = self._reformatter.reformat(self.frame, format=kind).to_ndarray()
            image = opaque(Image.fromarray(pixels))
            transpose = _transpose(self.frame)
        return image if transpose is None else image.transpose(transpose)

    def _is_far(self, keyframe: tuple[int, int] | None, ticks: Sequence[int]) -> bool:
        if keyframe is None or self.frame is None or keyframe[0] <= self._now():
            return False
        current = bisect.bisect_left(ticks, self._now())
        return bisect.bisect_left(ticks, keyframe[0]) - current >= _MIN_SKIPPED

    def _now(self) -> int:
        if self.frame is None:
            return _BEFORE_ALL
        tick = self.frame.pts if self.frame.pts is not None else self.frame.dts
        return _BEFORE_ALL if tick is None else tick

    def _seek(self, tick: int) -> None:
        self.frame, self.decoded, self._started = None, 0, True
        with decoder_errors(self._video.name, "a video"):
            container, stream = self._video.container, self._video.stream
            container.seek(tick, stream=stream, backward=True, any_frame=False)
            self._frames = container.decode(stream)


def _transpose(frame: av.VideoFrame) -> Image.Transpose | None:
    """Return what makes a frame upright, from the display matrix of its container."""
    side_data: Any = frame.side_data  # PyAV declares another type
    matrices = [data for data in side_data if data.type == SideDataType.DISPLAYMATRIX]
    if not matrices or matrices[0].buffer_size < 36:
        return None
    a, b, _, c, d = np.sign(np.frombuffer(bytes(matrices[0]), np.int32)[:5]).tolist()
    return _TRANSPOSES.get((a, b, c, d))
