"""Open media files, recognize their formats, and report broken ones in one sentence.

Files may come from anywhere, so formats follow from the first bytes and never from the name.
"""

import io
import os
import re
import struct
import threading
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from lwm.core.errors import InputError, LwmError

MediaSource = str | os.PathLike[str] | bytes
BinaryFile = io.BufferedReader | io.BytesIO

_HEAD = 256  # bytes that identify every format

_IMAGE_STARTS = {
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "GIF": re.compile(rb"GIF8[79]a"),
    "WEBP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    # Two letters alone would also match a text; the size of the header follows the file header.
    "BMP": re.compile(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL),
    "TIFF": re.compile(rb"II[*+]\0|MM\0\*"),
}

# Brands in the first box of an image in the High Efficiency Image File Format (ISO/IEC 23008-12,
# annex B), single or in a sequence. `mif1` and `msf1` leave the codec open.
_AVIF_BRANDS = frozenset(b"avif avis".split())
_HEIC_BRANDS = frozenset(b"heic heix heim heis hevc hevx hevm hevs mif1 msf1".split())

# Kinds of top-level boxes in an MP4 or MOV file (ISO/IEC 14496-12).
_BOXES = frozenset(
    b"ftyp moov mdat free skip wide moof mfra uuid sidx styp meta udta pdin ssix emsg".split()
)

_filter_lock = threading.Lock()


@contextmanager
def open_media(source: MediaSource) -> Iterator[tuple[BinaryFile, str]]:
    """Open a file or its bytes; yield it and its name; raise InputError if it is unreadable."""
    if isinstance(source, bytes):
        name = f"the file of {len(source)} bytes"
        file: BinaryFile = io.BytesIO(source)
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
            raise InputError(f"{name} is empty; get a complete copy of it")
        file.seek(0)
        yield file, name


def image_format(file: BinaryFile) -> str | None:
    """Return the format of an image by the first bytes, else None; rewind the file.

    An image in a sequence, or one that is animated, has the format of a still one.
    """
    file.seek(0)
    head = file.read(_HEAD)
    file.seek(0)
    if head[4:8] == b"ftyp":
        box = head[: int.from_bytes(head[:4], "big")]
        brands = {box[start : start + 4] for start in (8, *range(16, len(box), 4))}
        if brands & _AVIF_BRANDS:
            return "AVIF"
        return "HEIC" if brands & _HEIC_BRANDS else None
    return next((kind for kind, start in _IMAGE_STARTS.items() if start.match(head)), None)


def refuse_truncated(file: BinaryFile, name: str) -> None:
    """Raise InputError if a file is shorter than its outermost structure declares.

    Decoders would return the frames that are present and not report the missing ones.
    """
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(_HEAD)
    declared = 0
    if head[:4] == b"RIFF":
        # Many writers omit the byte that pads an odd size.
        declared = 8 + int.from_bytes(head[4:8], "little") - 1
    elif head[:4] == b"\x1a\x45\xdf\xa3":
        declared = _matroska_size(file)
    elif head[4:8] == b"ftyp":
        declared = _mp4_size(file, length)
    file.seek(0)
    if declared > length:
        raise InputError(
            f"{name} is cut short: it has {length} of {declared} bytes; get a complete copy of it"
        )


def _matroska_size(file: BinaryFile) -> int:
    """Return the end of the segment after the header; 0 for an open end, as in a recording."""
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


def _mp4_size(file: BinaryFile, length: int) -> int:
    """Return the end of the last box; 0 where a box has no size, which the decoder then judges."""
    end = 0
    while end < length:
        file.seek(end)
        head = file.read(16)
        size = int.from_bytes(head[:4], "big")
        if size == 1 and len(head) == 16:
            size = struct.unpack(">Q", head[8:])[0]
        if size < 8:
            return 0
        if end and head[4:8] not in _BOXES:  # such as a tag after the end of the file
            return end
        end += size
    return end


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silence Pillow's warnings about malformed metadata, which we do not use.

    The lock is needed because warning filters belong to the process and loaders read in threads.
    """
    with _filter_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def decoder_errors(name: str, kind: str) -> Iterator[None]:
    """Convert any exception of a decoder into an InputError of one sentence.

    Decoders report invalid bytes by a dozen exception types, from `struct.error` to `SyntaxError`,
    so this catches every exception; enclose only calls of a decoder.
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
            "get a complete copy of it"
        ) from error


def require_extension(path: str | os.PathLike[str], extensions: Collection[str], kind: str) -> str:
    """Return the lower-case extension of a file to write; raise InputError if it cannot be."""
    path = Path(path)
    extension = path.suffix.lower()
    if extension not in extensions:
        raise InputError(
            f"{path} has the extension '{path.suffix}'; {kind} is written as "
            f"{', '.join(extensions)}"
        )
    if path.is_dir():
        raise InputError(f"{path} is a directory; name a file to write {kind} to")
    if not path.absolute().parent.is_dir():
        raise InputError(
            f"{path} cannot be written: there is no directory {path.parent}; create it"
        )
    return extension
