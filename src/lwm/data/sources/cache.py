"""Make local, uncompressed copies of remote or compressed files, once, in the cache directory.

Random access needs an uncompressed local file. The name of a copy is a hash of the original's
address, size and time of change, so a changed original gets a new copy. fsspec's `filecache` with
`compression="infer"` would not do: it detects compression by the file's name, reads only the first
frame of a zstd file, and accepts one that is cut short.
"""

import hashlib
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from lwm.core.errors import InputError
from lwm.core.progress import say

_CHUNK = 256 << 10  # compressed bytes at a time; they may expand a thousandfold
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # after a byte from 0x50 to 0x5f
_LONGEST_WINDOW = 1 << 31  # that of `zstd --long=31`
# File systems name the signs of a change differently.
_SIGNS = (
    "size", "ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created", "CRC",
)  # fmt: skip


def is_url(location: str) -> bool:
    """Return whether a location is an fsspec URL."""
    return "://" in location


def local_file(location: str) -> Path:
    """Return an uncompressed local file with the content of `location`, a path or an fsspec URL.

    Raises:
        InputError: the location cannot be read, or the copy cannot be written.
    """
    if is_url(location):
        return _remote(location)
    path = Path(location)
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from error
    if _decompressor(head) is None:
        return path

    def fill(copy: BinaryIO) -> None:
        with path.open("rb") as file:
            _decompress(file, copy, location)

    return cached(f"unpacked {identity_of(path)}", location, fill)


def expand_url(pattern: str) -> list[str]:
    """Return the URLs that match a URL with or without wildcards, sorted.

    Raises:
        InputError: none matches, or the file system cannot be reached.
    """
    system, path = _file_system(pattern)
    if not any(c in path for c in "*?["):
        return [pattern]
    try:
        names = sorted(map(str, system.glob(path)))
    except Exception as error:  # every file system fails in its own way
        raise InputError(f"{pattern} cannot be listed ({_sentence(error)}); check it") from error
    if not names:
        raise InputError(f"no data file matches {pattern}; check the address")
    # In a chain such as zip://*.jsonl::s3://bucket/a.zip, the path is that of the first address.
    links = pattern.split("::")
    first = next(i for i, link in enumerate(links) if is_url(link))
    protocol = links[first].partition("://")[0]
    addresses = [name if is_url(name) else f"{protocol}://{name}" for name in names]
    return ["::".join([*links[:first], one, *links[first + 1 :]]) for one in addresses]


def identity_of(path: Path) -> str:
    """Return a text that changes when a local file changes."""
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"


def cache_file(identity: str) -> Path:
    """Return the path in the cache directory for an identity."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "lwm" / "data" / hashlib.sha256(identity.encode()).hexdigest()[:40]


def cached(identity: str, name: str, fill: Callable[[BinaryIO], None]) -> Path:
    """Return the file in the cache with this identity; `fill` writes it if there is none.

    Args:
        name: the original, for messages.

    Raises:
        InputError: the file cannot be written.
    """
    copy = cache_file(identity)
    if copy.is_file():
        return copy
    say(f"preparing {name} in {copy.parent}")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(prefix=".partial-", dir=copy.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                fill(file)
            os.replace(partial, copy)
        finally:
            Path(partial).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"a copy of {name} cannot be written to {copy.parent} ({error.strerror or error}); "
            "free space there, or set another directory in the environment variable "
            "XDG_CACHE_HOME"
        ) from error
    return copy


def _remote(url: str) -> Path:
    system, path = _file_system(url)
    try:
        info = system.info(path)
    except Exception as error:
        raise InputError(f"{url} cannot be reached ({_sentence(error)}); check it") from error
    if info.get("type") == "directory":
        raise InputError(f"{url} is a directory; name a file in it, or add /*")
    signs = [f"{sign} {info[sign]}" for sign in _SIGNS if info.get(sign) is not None]

    def fill(copy: BinaryIO) -> None:
        try:
            file: Any = system.open(path, "rb")
        except Exception as error:
            raise InputError(f"{url} cannot be read ({_sentence(error)}); check it") from error
        with file:
            _decompress(file, copy, url)

    return cached(f"fetched {url} {' '.join(signs)}", url, fill)


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:  # names the package to install
        raise InputError(f"{url} needs a package that is not installed: {error}") from error
    except Exception as error:
        raise InputError(f"{url} cannot be opened ({_sentence(error)}); check it") from error


def _decompressor(head: bytes) -> Callable[[], Any] | None:
    """Return a factory of decompressors for a file that begins so; None if it is uncompressed."""
    if head.startswith(_GZIP):
        return lambda: zlib.decompressobj(wbits=31)
    if head.startswith(_ZSTD) or head[1:4] == _ZSTD_SKIPPABLE:
        import zstandard

        return zstandard.ZstdDecompressor(max_window_size=_LONGEST_WINDOW).decompressobj
    return None


def _decompress(source: Any, target: BinaryIO, name: str) -> None:
    """Copy a stream, decompressed; several compressed streams may follow each other."""
    data = _read(source, name)
    start = _decompressor(data)
    if start is None:
        while data:
            target.write(data)
            data = _read(source, name)
        return
    decoder, complete = start(), False
    while data:
        try:
            output = decoder.decompress(data)
        except Exception as error:  # of zlib or zstandard
            raise InputError(
                f"{name} cannot be unpacked ({_sentence(error)}); get the file again"
            ) from error
        target.write(output)
        complete, data = decoder.eof, b""
        if complete:
            data, decoder = decoder.unused_data, start()
        data = data or _read(source, name)
        while complete and data and not data.strip(b"\0"):
            data = _read(source, name)  # zeros pad files on tapes and in some archives
    if not complete:
        raise InputError(f"{name} is cut short; get the file again")


def _read(source: Any, name: str) -> bytes:
    try:
        return source.read(_CHUNK)
    except Exception as error:
        raise InputError(f"{name} cannot be read ({_sentence(error)}); try again") from error


def _sentence(error: Exception) -> str:
    return " ".join(f"{error}".split()) or type(error).__name__
