"""Local, plain copies of files that are elsewhere or compressed, made once and kept in the cache.

Random access needs a plain file on a local disk. A copy's name follows from what it is a copy of
(address, size, time of change), so a changed original gets a new copy; it takes its name when it
is whole. Knows bytes; knows nothing of what they mean.
"""

import hashlib
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from lwm.core.errors import InputError
from lwm.core.progress import say

_CHUNK = 256 << 10  # packed bytes at a time; unpacked they may be a thousandfold
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # after a byte from 0x50 to 0x5f
_LONGEST_WINDOW = 1 << 31  # what `zstd --long=31` needs to be read again


def is_url(location: str) -> bool:
    return "://" in location


def local_file(location: str) -> Path:
    """A plain file on a local disk with the content of `location`, a path or an fsspec URL; gzip
    and zstd are told by their first bytes.

    Raises:
        InputError: it cannot be read, is broken, or the copy cannot be written.
    """
    if is_url(location):
        return _remote(location)
    path = Path(location)
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from error
    if not _is_compressed(head):
        return path

    def fill(copy: BinaryIO) -> None:
        with path.open("rb") as file:
            _copy(file, copy, location)

    return cached(f"unpacked {identity_of(path)}", location, fill)


def urls(pattern: str) -> list[str]:
    """The addresses that a URL with or without wildcards stands for, by name.

    Raises:
        InputError: none does, or the file system cannot be reached.
    """
    system, path = _file_system(pattern)
    if not any(c in path for c in "*?["):
        return [pattern]
    try:
        found = sorted(system.glob(path))
    except Exception as error:  # every file system fails in its own way
        raise InputError(f"{pattern} cannot be listed ({_sentence(error)}); check it") from error
    if not found:
        raise InputError(f"no data file matches {pattern}; check the address")
    # In a chain, as zip://*.jsonl::s3://bucket/a.zip, the path is that of the first address.
    links = pattern.split("::")
    first = next(i for i, link in enumerate(links) if is_url(link))
    protocol = links[first].partition("://")[0]
    addresses = [name if is_url(name) else f"{protocol}://{name}" for name in map(str, found)]
    return ["::".join([*links[:first], one, *links[first + 1 :]]) for one in addresses]


def identity_of(path: Path) -> str:
    """Changes when a local file does."""
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"


def cached(identity: str, name: str, fill: Callable[[BinaryIO], None]) -> Path:
    """The file in the cache with this identity, which `fill` writes if it is not there.

    Args:
        name: what it is a copy of, for messages.

    Raises:
        InputError: it cannot be written.
    """
    directory = _directory()
    copy = directory / hashlib.sha256(identity.encode()).hexdigest()[:40]
    if copy.is_file():
        return copy
    say(f"preparing {name} in {directory}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(prefix=".partial-", dir=directory)
        try:
            with os.fdopen(descriptor, "wb") as file:
                fill(file)
            os.replace(partial, copy)
        finally:
            Path(partial).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"a copy of {name} cannot be written to {directory} ({error.strerror or error}); make "
            "room there, or name another place in the environment variable XDG_CACHE_HOME"
        ) from error
    return copy


def _directory() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "lwm" / "data"


def _remote(url: str) -> Path:
    system, path = _file_system(url)
    try:
        info = system.info(path)
    except Exception as error:
        raise InputError(f"{url} cannot be reached ({_sentence(error)}); check it") from error
    if info.get("type") == "directory":
        raise InputError(f"{url} is a directory; name a file in it, or add /*")
    # File systems tell of a change in words of their own.
    signs = (
        "size",
        "ETag",
        "etag",
        "mtime",
        "LastModified",
        "last_modified",
        "updated",
        "created",
        "CRC",
    )
    known = [f"{sign} {info[sign]}" for sign in signs if info.get(sign) is not None]

    def fill(copy: BinaryIO) -> None:
        try:
            file: Any = system.open(path, "rb")
        except Exception as error:
            raise InputError(f"{url} cannot be read ({_sentence(error)}); check it") from error
        with file:
            _copy(file, copy, url)

    return cached(f"fetched {url} {' '.join(known)}", url, fill)


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:  # names the package to install
        raise InputError(f"{url} needs a package that is not installed: {error}") from error
    except Exception as error:
        raise InputError(f"{url} cannot be opened ({_sentence(error)}); check it") from error


def _is_compressed(head: bytes) -> bool:
    return head.startswith((_GZIP, _ZSTD)) or head[1:4] == _ZSTD_SKIPPABLE


def _copy(source: Any, target: BinaryIO, name: str) -> None:
    """Copies a stream, unpacked."""
    chunks = _chunks(source, name)
    head = next(chunks, b"")
    unpack: Callable[[], Any]
    if head.startswith(_GZIP):
        unpack = partial(zlib.decompressobj, wbits=31)
    elif _is_compressed(head):
        import zstandard

        reader = zstandard.ZstdDecompressor(max_window_size=_LONGEST_WINDOW)
        unpack = reader.decompressobj
    else:
        target.write(head)
        for chunk in chunks:
            target.write(chunk)
        return
    decoder, fresh = unpack(), True
    for packed in _with_first(head, chunks):
        rest = packed
        while rest:
            try:
                data = decoder.decompress(rest)
            except Exception as error:  # zlib's and zstandard's own kinds
                raise InputError(
                    f"{name} cannot be unpacked ({_sentence(error)}); get the file again"
                ) from error
            target.write(data)
            fresh, rest = False, b""
            if decoder.eof:  # several packed streams may follow each other
                rest = decoder.unused_data
                decoder, fresh = unpack(), True
                if rest and not rest.strip(b"\0"):
                    rest = b""  # zeros pad files on tapes and in some archives
    if not fresh:
        raise InputError(f"{name} is cut short; get the file again")


def _chunks(source: Any, name: str) -> Iterator[bytes]:
    while True:
        try:
            chunk = source.read(_CHUNK)
        except Exception as error:
            raise InputError(f"{name} cannot be read ({_sentence(error)}); try again") from error
        if not chunk:
            return
        yield chunk


def _with_first(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _sentence(error: Exception) -> str:
    return " ".join(f"{error}".split()) or type(error).__name__
