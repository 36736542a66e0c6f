"""What a model is shown, turned into codes: files, bytes and arrays of pictures and videos.

Frames are read and encoded some at a time, so an hour of video costs its sampled frames. What was
shown once is remembered: a session about a video encodes it once. Knows messages' parts and a
codec; knows no prompt.
"""

import base64
import binascii
import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from lwm.core.errors import InputError
from lwm.core.progress import progress
from lwm.generation.vision_generation import ImageCodec
from lwm.generation.vision_prompts import Part, codes_from_part
from lwm.media.framing import crop_square
from lwm.media.images import read_image, to_unit
from lwm.media.videos import iterate_frames

MAX_FRAMES = 8
"""Frames taken of a video unless a part says otherwise, as the original's."""
_BATCH = 32  # frames encoded at once
_REMEMBERED = 64  # parts whose codes are kept


class MediaEncoder:
    """Turns parts of messages into codes.

    A part is `{"type": "image", "image": SOURCE}` or `{"type": "video", "video": SOURCE}`, a video
    with `max_frames` or `fps` if wanted; or OpenAI's `image_url`; or codes as they are. SOURCE is
    a path, bytes of a file, a `file:` or `data:` URL, or a uint8 array [height, width, 3], for a
    video [frames, height, width, 3].

    Args:
        open_codec: gives the model's VQGAN, or refuses.
    """

    def __init__(self, open_codec: Callable[[], ImageCodec]) -> None:
        self._open_codec = open_codec
        self._remembered: dict[Any, np.ndarray] = {}

    def __call__(self, part: Part) -> Int[np.ndarray, "frames codes_per_frame"]:
        """Raises:
        InputError: the part is malformed, or its file cannot be read.
        ConfigError: the model has no VQGAN.
        """
        kind = part.get("type")
        if kind not in ("image", "video", "image_url", "video_url"):
            return codes_from_part(part)
        codec = self._open_codec()
        shown = _source(part.get(str(kind)), str(kind))
        moving = str(kind).startswith("video")
        max_frames, fps = part.get("max_frames"), part.get("fps")
        if moving and max_frames is None and fps is None:
            max_frames = MAX_FRAMES
        key = (_identity(shown), moving, max_frames, fps)
        if key not in self._remembered:
            frames = (
                _video_frames(shown, codec.config.image_size, max_frames, fps)
                if moving
                else iter([_picture(shown, codec.config.image_size)])
            )
            while len(self._remembered) >= _REMEMBERED:
                del self._remembered[next(iter(self._remembered))]
            self._remembered[key] = encode_frames(codec, frames)
        return self._remembered[key]


def encode_frames(
    codec: ImageCodec, frames: Iterable[UInt8[np.ndarray, "height width 3"]]
) -> Int[np.ndarray, "frames codes_per_frame"]:
    """Codes of frames, a batch at a time."""
    rest, found = iter(frames), []
    with progress("looking", None) as advance:
        while batch := list(islice(rest, _BATCH)):
            codes = codec.encode(to_unit(np.stack(batch)))
            found.append(np.asarray(codes).reshape(len(batch), -1))
            advance(len(batch))
    return np.concatenate(found)


def _source(value: Any, kind: str) -> Path | bytes | np.ndarray:
    """Raises:
    InputError: it is nothing that can be looked at here.
    """
    if isinstance(value, dict):  # OpenAI's {"url": ...}
        value = value.get("url")
    if isinstance(value, Path | bytes | np.ndarray):
        return value
    if not isinstance(value, str) or not value:
        raise InputError(
            f"the message has a part of type {kind!r} that holds {type(value).__name__}; give a "
            "path, a file's bytes, a data: URL or an array of pixels"
        )
    url = urlsplit(value)
    if url.scheme in ("http", "https"):
        raise InputError(f"{value[:100]} lies on the network; fetch it and give the file")
    if url.scheme == "file":
        return Path(unquote(url.path))
    if url.scheme == "data":
        head, _, data = value.partition(",")
        try:
            return (
                base64.b64decode(data, validate=True)
                if head.endswith(";base64")
                else unquote_to_bytes(data)
            )
        except (binascii.Error, ValueError) as error:
            raise InputError(f"the data: URL of a message is broken ({error})") from error
    return Path(value)


def _identity(source: Path | bytes | np.ndarray) -> Any:
    """The same for what would look the same; a file is known by its name, time and size."""
    if isinstance(source, Path):
        try:
            found = source.stat()
        except OSError:  # reading it will say what is wrong
            return str(source)
        return str(source.resolve()), found.st_mtime_ns, found.st_size
    if isinstance(source, bytes):
        return hashlib.sha256(source).digest()
    return hashlib.sha256(np.ascontiguousarray(source).tobytes()).digest(), source.shape


def _picture(source: Path | bytes | np.ndarray, size: int) -> UInt8[np.ndarray, "size size 3"]:
    if isinstance(source, np.ndarray):
        return _framed(source, size)
    return read_image(source, size)


def _video_frames(
    source: Path | bytes | np.ndarray, size: int, max_frames: int | None, fps: float | None
) -> Iterator[UInt8[np.ndarray, "size size 3"]]:
    if not isinstance(source, np.ndarray):
        return iterate_frames(source, size, max_frames=max_frames, fps=fps)
    if source.ndim != 4 or len(source) == 0:
        raise InputError(
            f"a video has the shape {list(source.shape)}; [frames, height, width, 3] is needed"
        )
    if fps is not None:
        raise InputError("a video that is an array has no times; give max_frames instead of fps")
    count = len(source) if max_frames is None else min(len(source), max_frames)
    chosen = np.linspace(0, len(source) - 1, count).astype(int)
    return (_framed(source[index], size) for index in chosen)


def _framed(pixels: np.ndarray, size: int) -> UInt8[np.ndarray, "size size 3"]:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise InputError(
            f"an image has the shape {list(pixels.shape)} and type {pixels.dtype}; uint8 "
            "[height, width, 3] is needed"
        )
    if 0 in pixels.shape:
        raise InputError(f"an image has the shape {list(pixels.shape)}; it has no pixels")
    return crop_square(Image.fromarray(pixels), size, "an image")
