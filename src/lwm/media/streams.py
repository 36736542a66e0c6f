"""Videos by PyAV: when each frame appears, and single frames as upright RGB pictures, decoding
only from the nearest keyframe on. Knows nothing of which frames are wanted or how they are framed.

The packets are walked once without decoding; that gives the exact times, whatever the frame rate
does, and the keyframes. Files from outside are read through our own file handle by demuxers named
here, so none can name another file or an address to be opened.
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
from lwm.media.sources import File, decoder_errors
from lwm.media.still_images import opaque

MOST_FRAME_PIXELS = 1 << 25  # 8K is within; decoders hold up to some twenty frames

# No playlists, no text, no raw streams: what names other files, and what anything could pass for.
_DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng,mpegts,mpeg,flv,ogg,asf"

_KINDS = "MP4, MOV, WebM, MKV, AVI, MPEG, FLV, Ogg, animated GIF and WebP"

# Seeking empties the decoder's pipeline; below this many frames it is quicker to go on.
_WORTH_A_SEEK = 12

# By the signs of the display matrix (a, b, c, d): a pixel at (x, y) is shown at
# (ax + cy, bx + dy), y downwards. Other angles than quarters are left alone.
_TURNS = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


@dataclass(frozen=True, kw_only=True)
class Keyframe:
    """Where decoding can start, in ticks of the stream."""

    shown: int
    decoded: int


@dataclass(frozen=True, kw_only=True)
class Frames:
    """What walking the packets found. Without `ticks` the file does not say when frames appear,
    and they are counted as they are decoded."""

    count: int
    ticks: Sequence[int] | None  # of each frame, ascending
    keyframes: Sequence[Keyframe]  # ascending
    timeline: Timeline


@contextmanager
def open_stream(
    file: File, name: str
) -> Iterator[tuple[av.container.InputContainer, av.video.VideoStream]]:
    """The container and its video stream; cover pictures of songs do not count as one.

    Raises:
        InputError: no container we read, or none with a video stream.
    """
    file.seek(0)
    try:
        container = av.open(
            file,
            "r",
            container_options={"format_whitelist": _DEMUXERS, "protocol_whitelist": ""},
            options={"max_pixels": str(MOST_FRAME_PIXELS)},
            metadata_errors="replace",
        )
    except Exception as error:
        # Only its name tells a broken video from something that never was one.
        raise InputError(
            f"{name} is not a video that can be read, or is broken or cut short; "
            f"{_KINDS} can be read"
        ) from error
    with container:
        for stream in container.streams.video:
            if not stream.disposition & Disposition.attached_pic:
                break
        else:
            kinds = sorted({other.type for other in container.streams})
            held = f"only {' and '.join(kinds)}" if kinds else "no stream at all"
            raise InputError(f"{name} has no video stream, {held}; name a file with pictures")
        if stream.codec_context is None:
            raise InputError(f"{name} is coded in a way that is not known here; save it as H.264")
        if stream.width * stream.height > MOST_FRAME_PIXELS:
            raise InputError(
                f"{name} has frames of {stream.width} x {stream.height} pixels; up to "
                f"{MOST_FRAME_PIXELS} pixels are read, so scale it down"
            )
        stream.codec_context.options = {"max_pixels": str(MOST_FRAME_PIXELS)}
        stream.thread_type = "AUTO"
        # A thread costs a frame in memory and a delay after each seek.
        stream.codec_context.thread_count = 2
        yield container, stream


def walk(
    container: av.container.InputContainer, stream: av.video.VideoStream, name: str
) -> Frames:
    """Reads every packet of the stream and decodes none.

    Raises:
        InputError: there is no frame, or the file ends before its index says.
    """
    ticks: list[int | None] = []
    keyframes: list[Keyframe] = []
    duration = 0
    packets = 0
    with decoder_errors(name, "a video"):
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            packets += 1
            if packet.is_corrupt:
                raise InputError(f"{name} is cut short or broken inside; get a whole copy of it")
            if packet.is_keyframe and packet.pts is not None:
                decoded = packet.pts if packet.dts is None else packet.dts
                keyframes.append(Keyframe(shown=packet.pts, decoded=decoded))
            if not packet.is_discard:
                ticks.append(packet.pts)
                duration = packet.duration or duration
        indexed = len(stream.index_entries)
        base = stream.time_base
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    if "mp4" in container.format.name and packets < indexed:
        raise InputError(
            f"{name} is cut short: {packets} of its {indexed} frames are there; "
            "get a whole copy of it"
        )
    if not ticks:
        raise InputError(f"{name} has a video stream without frames; get a whole copy of it")
    known = sorted(tick for tick in ticks if tick is not None)
    # AVI has no place for times, so where frames are coded out of order its demuxer guesses.
    guessed = "avi" in container.format.name and stream.codec_context.has_b_frames
    if len(known) < len(ticks) or base is None or guessed:
        times = [float(index / rate) for index in range(len(ticks))]
        timeline = Timeline(times=times, end=times[-1] + float(1 / rate))
        return Frames(count=len(ticks), ticks=None, keyframes=[], timeline=timeline)
    step = duration or max(1, round(1 / (rate * base)))
    return Frames(
        count=len(known),
        ticks=known,
        keyframes=sorted(keyframes, key=lambda keyframe: keyframe.shown),
        timeline=Timeline(
            times=[float(tick * base) for tick in known], end=float((known[-1] + step) * base)
        ),
    )


def frames_at(
    container: av.container.InputContainer,
    stream: av.video.VideoStream,
    frames: Frames,
    indices: Sequence[int],
    name: str,
) -> Iterator[Image.Image]:
    """The frames of these ascending indices, one picture each; none is kept here.

    Raises:
        InputError: the stream is broken.
    """
    reader = _Reader(container, stream, name)
    if frames.ticks is None:
        reader.rewind()
        for index in indices:
            while reader.passed <= index and reader.advance():
                pass
            yield reader.picture()
        return
    starts = [keyframe.shown for keyframe in frames.keyframes]
    for index in indices:
        tick = frames.ticks[index]
        place = bisect.bisect_right(starts, tick) - 1
        keyframe = frames.keyframes[place] if place >= 0 else None
        reader.go_to(tick, keyframe, frames.ticks)
        yield reader.picture()


class _Reader:
    """Where in the stream decoding stands: `frame` is the last one that came out."""

    def __init__(
        self,
        container: av.container.InputContainer,
        stream: av.video.VideoStream,
        name: str,
    ) -> None:
        self._container = container
        self._stream = stream
        self._name = name
        # One for all frames: its tables cost more than a small frame does.
        self._colours = VideoReformatter()
        self._decoded: Iterator[av.VideoFrame] = iter(())
        self._fresh = True  # nothing decoded since the packets were walked
        self.frame: av.VideoFrame | None = None
        self.passed = 0  # frames that came out since the start, if there was no seek

    def rewind(self) -> None:
        self._seek(min(0, self._stream.start_time or 0))

    def go_to(self, tick: int, keyframe: Keyframe | None, ticks: Sequence[int]) -> None:
        """Makes the frame of this tick the current one, or the next after it where a broken stream
        lacks it."""
        if self._fresh or self._far(tick, keyframe, ticks):
            # A container's seek may land late, where its index goes by the order of decoding:
            # then from before the keyframe, and at last from the start.
            for place in (keyframe and keyframe.shown, keyframe and keyframe.decoded, None):
                if place is None:
                    self.rewind()
                else:
                    self._seek(place)
                if self.advance() and self._now() <= tick:
                    break
        while self._now() < tick and self.advance():
            pass

    def advance(self) -> bool:
        """One frame on; False at the end, where the last one stays."""
        with decoder_errors(self._name, "a video"):
            frame = next(self._decoded, None)
        if frame is None:
            return False
        self.frame = frame
        self.passed += 1
        return True

    def picture(self) -> Image.Image:
        """The current frame, upright.

        Raises:
            InputError: nothing could be decoded.
        """
        if self.frame is None:
            raise InputError(f"no frame of {self._name} can be decoded; get a whole copy of it")
        with decoder_errors(self._name, "a video"):
            clear = any(component.is_alpha for component in self.frame.format.components)
            clear |= self.frame.format.name.startswith("pal")
            picture = self._colours.reformat(self.frame, format="rgba" if clear else "rgb24")
            image = opaque(Image.fromarray(picture.to_ndarray()))
            turn = _turn(self.frame)
        return image if turn is None else image.transpose(turn)

    def _far(self, tick: int, keyframe: Keyframe | None, ticks: Sequence[int]) -> bool:
        if keyframe is None or self.frame is None or keyframe.shown <= self._now():
            return False
        skipped = bisect.bisect_left(ticks, keyframe.shown) - bisect.bisect_left(
            ticks, self._now()
        )
        return skipped >= _WORTH_A_SEEK

    def _now(self) -> int:
        """The tick of the current frame; before everything where there is none."""
        if self.frame is None:
            return -(1 << 62)
        moment = self.frame.pts if self.frame.pts is not None else self.frame.dts
        return -(1 << 62) if moment is None else moment

    def _seek(self, tick: int) -> None:
        self.frame, self.passed, self._fresh = None, 0, False
        with decoder_errors(self._name, "a video"):
            self._container.seek(tick, stream=self._stream, backward=True, any_frame=False)
            self._decoded = self._container.decode(self._stream)


def _turn(frame: av.VideoFrame) -> Image.Transpose | None:
    """What makes a frame upright, by the matrix that the container gives it."""
    held: Any = frame.side_data  # PyAV's own types say it is something else
    matrices = [data for data in held if data.type == SideDataType.DISPLAYMATRIX]
    if not matrices or matrices[0].buffer_size < 36:
        return None
    a, b, _, c, d = np.sign(np.frombuffer(bytes(matrices[0]), np.int32)[:5]).tolist()
    return _TURNS.get((a, b, c, d))
