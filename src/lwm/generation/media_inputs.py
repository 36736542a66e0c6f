"""Read images and videos in messages: files, bytes, URLs and arrays become codes."""

import base64
import binascii
from collections.abc import Callable, Iterator
from numbers import Integral, Real
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from lwm.core.errors import InputError
from lwm.generation.codec import ImageCodec, encode_frames
from lwm.generation.vision_prompts import Part, codes_from_part
from lwm.media.choice import check_choice
from lwm.media.framing import crop_square
from lwm.media.images import read_image
from lwm.media.videos import count_frames, iterate_frames

_MAX_FRAMES = 8
"""Frames of a video if a part has neither `max_frames` nor `fps`, as in the original."""


def encode_media(
    part: Part, open_codec: Callable[[], ImageCodec]
) -> Int[np.ndarray, "frames codes_per_frame"]:
    """Compute the codes of a part of a message.

    A part is `{"type": "image", "image": SOURCE}` or `{"type": "video", "video": SOURCE}`, a video
    optionally with `max_frames` or `fps`; or OpenAI's `image_url`; or codes as they are. SOURCE is
    a path, the bytes of a file, a `file:` or `data:` URL, or a uint8 array [height, width, 3], for
    a video [frames, height, width, 3].
    """
    kind = str(part.get("type"))
    if kind not in ("image", "video", "image_url", "video_url"):
        return codes_from_part(part)
    codec = open_codec()
    source, size = _source(part.get(kind), kind), codec.config.image_size
    if kind.startswith("video"):
        return encode_frames(codec, _video_frames(source, size, *_frame_limits(part)))
    if isinstance(source, np.ndarray):
        return encode_frames(codec, [_framed(source, size)])
    return encode_frames(codec, [read_image(source, size)])


def count_part_frames(part: Part) -> int:
    """Return how many frames `encode_media` encodes, without decoding any."""
    kind = str(part.get("type"))
    if kind in ("image", "image_url"):
        return 1
    if kind not in ("video", "video_url"):
        return len(codes_from_part(part))
    source, (max_frames, fps) = _source(part.get(kind), kind), _frame_limits(part)
    if isinstance(source, np.ndarray):
        return len(_chosen_frames(source, max_frames, fps))
    return count_frames(source, max_frames=max_frames, fps=fps)


def _frame_limits(part: Part) -> tuple[int | None, float | None]:
    max_frames, fps = part.get("max_frames"), part.get("fps")
    if isinstance(max_frames, bool) or not isinstance(max_frames, Integral | None):
        raise InputError(f"max_frames is {max_frames!r}; it must be a whole number")
    if isinstance(fps, bool) or not isinstance(fps, Real | None):
        raise InputError(f"fps is {fps!r}; it must be a number")
    max_frames = None if max_frames is None else int(max_frames)
    fps = None if fps is None else float(fps)
    check_choice(max_frames, fps)
    return (_MAX_FRAMES if max_frames is None and fps is None else max_frames), fps


def _source(value: Any, kind: str) -> Path | bytes | np.ndarray:
    if isinstance(value, dict):  # OpenAI's {"url": ...}
        value = value.get("url")
    if isinstance(value, Path | bytes | np.ndarray):
        return value
    if not isinstance(value, str) or not value:
        raise InputError(
            f"the message has a part of type {kind!r} that contains {type(value).__name__}; give "
            "a path, a file's bytes, a data: URL or an array of pixels"
        )
    try:
        url = urlsplit(value)
    except ValueError:  # no URL, such as a path with a bracket
        return Path(value)
    if url.scheme in ("http", "https"):
        raise InputError(f"{value[:100]} is on the network; download it and give the file")
    if url.scheme == "file":
        return Path(unquote(url.path))
    if url.scheme == "data":
        return data_url_bytes(value)
    return Path(value)


def data_url_bytes(url: str) -> bytes:
    """Return the contents of a `data:` URL; raise InputError if it is broken."""
    head, _, data = url.partition(",")
    if not head.endswith(";base64"):
        return unquote_to_bytes(data.encode(errors="replace"))
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"the data: URL of a message is broken: {error}") from error


def _video_frames(
    source: Path | bytes | np.ndarray, size: int, max_frames: int | None, fps: float | None
) -> Iterator[UInt8[np.ndarray, "size size 3"]]:
    if not isinstance(source, np.ndarray):
        return iterate_frames(source, size, max_frames=max_frames, fps=fps)
    chosen = _chosen_frames(source, max_frames, fps)
    return (_framed(source[index], size) for index in chosen)


def _chosen_frames(source: np.ndarray, max_frames: int | None, fps: float | None) -> list[int]:
    """Return the indices of the frames of an array to encode."""
    if source.ndim != 4 or len(source) == 0:
        raise InputError(
            f"a video has the shape {list(source.shape)}; [frames, height, width, 3] is needed"
        )
    if fps is not None:
        raise InputError("a video that is an array has no times; give max_frames instead of fps")
    count = len(source) if max_frames is None else min(len(source), max_frames)
    return np.linspace(0, len(source) - 1, count).astype(int).tolist()


def _framed(pixels: np.ndarray, size: int) -> UInt8[np.ndarray, "size size 3"]:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3 or not pixels.size:
        raise InputError(
            f"an image has the shape {list(pixels.shape)} and type {pixels.dtype}; uint8 "
            "[height, width, 3] is needed"
        )
    return crop_square(Image.fromarray(pixels), size, "an image")
