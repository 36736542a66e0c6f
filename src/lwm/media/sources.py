"""Files of pictures from outside, before anyone trusts them: opening, telling kinds apart by their
first bytes, and turning what a decoder says about a broken one into a sentence. Knows no pixels.
"""

import io
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lwm.core.errors import InputError, LwmError

MediaSource = str | os.PathLike[str] | bytes
File = io.BufferedReader | io.BytesIO

_HEAD = 16  # bytes that tell every kind of picture apart


@contextmanager
def open_media(source: MediaSource) -> Iterator[tuple[File, str]]:
    """The file and the name by which sentences call it.

    Raises:
        InputError: there is no such file, it is no regular file, it cannot be read, or it is
            empty.
    """
    if isinstance(source, bytes):
        name = f"the given file of {len(source)} bytes"
        file: File = io.BytesIO(source)
    else:
        path = Path(source)
        name = str(path)
        if not path.exists():
            raise InputError(f"{name} does not exist; check the path")
        if not path.is_file():
            raise InputError(f"{name} is not a file; name an image or a video")
        try:
            file = path.open("rb")
        except OSError as error:
            raise InputError(
                f"{name} cannot be opened: {error.strerror}; check its permissions"
            ) from error
    with file:
        if not file.read(1):
            raise InputError(f"{name} is empty; get a whole copy of it")
        file.seek(0)
        yield file, name


def image_format(file: File) -> str | None:
    """PNG, JPEG, GIF, WEBP or BMP by the first bytes, None for everything else; leaves the file
    at its start."""
    file.seek(0)
    head = file.read(_HEAD)
    file.seek(0)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith(b"BM"):
        return "BMP"
    return None


def refuse_truncated(file: File, name: str) -> None:
    """Refuses what is shorter than its outermost structure says. Decoders would give the frames
    that are there and be silent about the rest.

    Raises:
        InputError: the file was cut short.
    """
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(_HEAD)
    if head[:4] == b"RIFF":
        # The byte that pads an odd size is often forgotten.
        declared = 8 + int.from_bytes(head[4:8], "little") - 1
    elif head[:4] == b"\x1a\x45\xdf\xa3":
        declared = _matroska_size(file)
    elif head[4:8] == b"ftyp":
        declared = _boxes_size(file, length)
    else:
        declared = 0
    file.seek(0)
    if declared > length:
        raise InputError(
            f"{name} is cut short: {length} of its {declared} bytes are there; "
            "get a whole copy of it"
        )


def _matroska_size(file: File) -> int:
    """Up to the end of the segment behind the header; 0 where that is open, as in a recording."""
    end = 0
    for identity in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
        file.seek(end)
        head = file.read(12)
        if len(head) < 12 or head[:4] != identity or not head[4]:
            return 0
        # The leading zero bits of the first byte count the bytes that follow it.
        width = 9 - head[4].bit_length()
        size = int.from_bytes(head[4 : 4 + width], "big") & ((1 << 7 * width) - 1)
        if size == (1 << 7 * width) - 1:
            return 0
        end += 4 + width + size
    return end


_BOXES = frozenset(
    b"ftyp moov mdat free skip wide moof mfra uuid sidx styp meta udta pdin ssix emsg".split()
)
"""Kinds of boxes that stand at the top of an MP4 or MOV file (ISO/IEC 14496-12)."""


def _boxes_size(file: File, length: int) -> int:
    end = 0
    while end < length:
        file.seek(end)
        head = file.read(16)
        size = int.from_bytes(head[:4], "big")
        if size == 1 and len(head) == 16:
            size = struct.unpack(">Q", head[8:])[0]
        if size < 8:  # 0 means up to the end, what else there is is for the decoder to judge
            return 0
        if end and head[4:8] not in _BOXES:  # a tag or the like behind a whole file
            return end
        end += size
    return end


@contextmanager
def decoder_errors(name: str, kind: str) -> Iterator[None]:
    """Turns whatever a decoder raises over a broken file into one sentence.

    Decoders report bad bytes by a dozen exception types, from `struct.error` to `SyntaxError`, so
    every one is caught here; keep what is inside to calls of a decoder.

    Raises:
        InputError: the decoder raised anything at all.
    """
    try:
        yield
    except LwmError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = " ".join(reason.split()).rstrip(".")
        raise InputError(
            f"{name} cannot be read as {kind} ({reason}); it is broken or cut short, "
            "get a whole copy of it"
        ) from error
