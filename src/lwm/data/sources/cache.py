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
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from lwm.core.errors import InputError
from lwm.core.progress import say
from lwm.data.sources.source import input_errors

_CHUNK = 256 << 10  # compressed bytes at a time; they may expand a thousandfold
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # after a byte from 0x50 to 0x5f
_LONGEST_WINDOW = 1 << 31  # of `zstd --long=31`
# File systems name the signs of a change differently.
_SIGNS = (
    "size", "ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created", "CRC",
)  # fmt: skip


def is_url(location: str) -> bool:
    """Return whether a location is an fsspec URL."""
    return "://" in location


def local_file(location: str) -> Path:
    """Return an uncompressed local file with the content of a path or an fsspec URL."""
    if is_url(location):
        return _remote(location)
    path = Path(location)
    with input_errors(f"{path} cannot be read", "check the path"), path.open("rb") as file:
        head = file.read(4)
    if _decompressor(head) is None:
        return path
    fill = partial(_decompress, lambda: path.open("rb"), location)
    return cached(f"unpacked {identity_of(path)}", location, fill)


def _remote(url: str) -> Path:
    system, path = _file_system(url)
    with input_errors(f"{url} cannot be reached", "check it"):
        info = system.info(path)
    if info.get("type") == "directory":
        raise InputError(f"{url} is a directory; name a file in it, or add /*")
    signs = [f"{sign} {info[sign]}" for sign in _SIGNS if info.get(sign) is not None]
    fill = partial(_decompress, lambda: system.open(path, "rb"), url)
    return cached(f"fetched {url} {' '.join(signs)}", url, fill)


def expand_url(pattern: str) -> list[str]:
    """Return the URLs that match a URL with or without wildcards, sorted."""
    system, path = _file_system(pattern)
    if not any(c in path for c in "*?["):
        return [pattern]
    with input_errors(f"{pattern} cannot be listed", "check it"):
        names = sorted(map(str, system.glob(path)))
    if not names:
        raise InputError(f"no data file matches {pattern}; check the address")
    # In a chain such as zip://*.jsonl::s3://bucket/a.zip, the path belongs to the first address.
    links = pattern.split("::")
    first = next(i for i, link in enumerate(links) if is_url(link))
    protocol = links[first].partition("://")[0]
    addresses = [name if is_url(name) else f"{protocol}://{name}" for name in names]
    return ["::".join([*links[:first], one, *links[first + 1 :]]) for one in addresses]


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    with input_errors(f"{url} cannot be opened", "check it"):
        try:
            return fsspec.core.url_to_fs(url)
        except ImportError as error:  # names the package to install
            raise InputError(f"{url} needs a package that is not installed: {error}") from error


def identity_of(path: Path) -> str:
    """Return a text that changes when a local file changes."""
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"


def cache_file(identity: str) -> Path:
    """Return the path in the cache directory for an identity."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "lwm" / "data" / hashlib.sha256(identity.encode()).hexdigest()[:40]


def cached(identity: str, name: str, fill: Callable[[BinaryIO], None]) -> Path:
    """Return the copy of `name` in the cache with this identity; `fill` writes a missing one."""
    copy = cache_file(identity)
    if copy.is_file():
        return copy
    say(f"preparing {name} in {copy.parent}")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        # Machines that share the cache may fill it at the same time.
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=copy.parent) as directory:
            partial_copy = Path(directory) / copy.name
            with partial_copy.open("wb") as file:
                fill(file)
            partial_copy.replace(copy)
    except OSError as error:
        raise InputError(
            f"a copy of {name} cannot be written to {copy.parent} ({error.strerror or error}); "
            "free space there, or set another directory in the environment variable "
            "XDG_CACHE_HOME"
        ) from error
    return copy


def _decompressor(head: bytes) -> Callable[[], Any] | None:
    """Return a factory of decompressors for a file that begins so; None if it is uncompressed."""
    if head.startswith(_GZIP):
        return lambda: zlib.decompressobj(wbits=31)
    if head.startswith(_ZSTD) or head[1:4] == _ZSTD_SKIPPABLE:
        import zstandard

        return zstandard.ZstdDecompressor(max_window_size=_LONGEST_WINDOW).decompressobj
    return None


def _decompress(open_source: Callable[[], Any], name: str, target: BinaryIO) -> None:
    """Copy a stream, decompressed; several compressed streams may follow each other."""
    chunks = _chunks(open_source, name)
    first = next(chunks, b"")
    start, decoder = _decompressor(first), None
    if start is None:
        target.writelines(chain([first], chunks))
        return
    for data in chain([first], chunks):
        # Zeros after a stream pad files on tapes and in some archives.
        while data and (decoder is not None or data.strip(b"\0")):
            decoder = decoder or start()
            with input_errors(f"{name} cannot be unpacked", "get the file again"):
                output = decoder.decompress(data)
            target.write(output)
            data, decoder = (decoder.unused_data, None) if decoder.eof else (b"", decoder)
    if decoder is not None:
        raise InputError(f"{name} is cut short; get the file again")


def _chunks(open_source: Callable[[], Any], name: str) -> Iterator[bytes]:
    with input_errors(f"{name} cannot be read", "check it"), open_source() as source:
        yield from iter(partial(source.read, _CHUNK), b"")
