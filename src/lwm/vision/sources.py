"""Files of pictures from outside, before anyone trusts them: opening, telling kinds apart by their
first bytes, and turning what a decoder says about a broken one into a sentence. Knows no pixels.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lwm.core.errors import InputError, LwmError

Source = str | os.PathLike[str] | bytes

_HEAD = 16  # bytes that tell every kind of picture apart


@contextmanager
def open_source(source: Source) -> Iterator[tuple[BinaryIO, str]]:
    """The file and the name by which sentences call it.

    Raises:
        InputError: there is no such file, it is no regular file, it cannot be read, or it is
            empty.
    """
    if isinstance(source, bytes):
        name = f"the picture of {len(source)} bytes"
        file: BinaryIO = io.BytesIO(source)
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


def picture_format(file: BinaryIO) -> str | None:
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


@contextmanager
def complaints(name: str, kind: str) -> Iterator[None]:
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
