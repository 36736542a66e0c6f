"""Locate the arrays of a file in Flax's msgpack encoding without reading them.

This walks the structure of a memory map and provides views, because the msgpack package would copy
each array two or three times, and one array can be a fifth of a 7B model. Every length is checked
against the end of the file before it is used.

Sources: the msgpack specification; flax.serialization (ExtType 1: `(shape, dtype, bytes)`, 3: a
scalar; arrays over 2^30 bytes as maps with the key `__msgpack_chunked_array__`).
"""

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from lwm.core.errors import CheckpointError

CHUNKED = "__msgpack_chunked_array__"
_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "float64": np.dtype(np.float64),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_MAX_DEPTH = 32


@dataclass(frozen=True)
class Region:
    """Locate raw bytes in a file."""

    offset: int
    length: int
    code: int | None = None  # of an extension type


@dataclass(frozen=True)
class StoredArray:
    """Describe an array in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    regions: tuple[Region, ...]  # its numbers, flattened and in order

    def view(self, data: np.ndarray) -> np.ndarray:
        """Return the array; a view of `data` unless it is stored in chunks."""
        parts = [
            np.frombuffer(data, np.uint8, region.length, region.offset).view(self.dtype)
            for region in self.regions
        ]
        flat = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return flat.reshape(self.shape)


class Walker:
    """Read msgpack values from the bytes of a file; binary data becomes a `Region`."""

    def __init__(self, data: np.ndarray, source: str, offset: int = 0, end: int | None = None):
        self.data, self.source = data, source
        self.offset, self.end = offset, len(data) if end is None else end

    def inside(self, region: Region) -> "Walker":
        """Return a walker over the bytes of a region."""
        return Walker(self.data, self.source, region.offset, region.offset + region.length)

    def fail(self, why: str) -> CheckpointError:
        """Return an error that names the file and the place."""
        return CheckpointError(
            f"{self.source} is broken or cut short ({why} at byte {self.offset:,} of "
            f"{len(self.data):,}); copy or download it again"
        )

    def value(self, depth: int = 0) -> Any:
        """Read the next value; raise CheckpointError if there is none."""
        if depth > _MAX_DEPTH:
            raise self.fail("values are nested too deeply")
        tag = self._integer(1)
        if tag < 0x80:
            return tag
        if tag >= 0xE0:
            return tag - 0x100
        if tag < 0x90:
            return self._map(tag & 0x0F, depth)
        if tag < 0xA0:
            return self._list(tag & 0x0F, depth)
        if tag < 0xC0:
            return self._text(tag & 0x1F)
        match tag:
            case 0xC0:
                return None
            case 0xC2 | 0xC3:
                return tag == 0xC3
            case 0xC4 | 0xC5 | 0xC6:
                return self._region(self._integer(1 << (tag - 0xC4)))
            case 0xC7 | 0xC8 | 0xC9:
                return self._extension(self._integer(1 << (tag - 0xC7)))
            case 0xCA | 0xCB:
                width = 4 if tag == 0xCA else 8
                return float(np.frombuffer(self._bytes(width), f">f{width}")[0])
            case 0xCC | 0xCD | 0xCE | 0xCF:
                return self._integer(1 << (tag - 0xCC))
            case 0xD0 | 0xD1 | 0xD2 | 0xD3:
                return self._integer(1 << (tag - 0xD0), signed=True)
            case 0xD4 | 0xD5 | 0xD6 | 0xD7 | 0xD8:
                return self._extension(1 << (tag - 0xD4))
            case 0xD9 | 0xDA | 0xDB:
                return self._text(self._integer(1 << (tag - 0xD9)))
            case 0xDC | 0xDD:
                return self._list(self._integer(2 << (tag - 0xDC)), depth)
            case 0xDE | 0xDF:
                return self._map(self._integer(2 << (tag - 0xDE)), depth)
        raise self.fail(f"the byte 0x{tag:02x} begins no value")

    def _region(self, length: int, code: int | None = None) -> Region:
        offset = self.offset
        if offset + length > self.end:
            raise self.fail(f"{length:,} bytes are announced and {self.end - offset:,} are left")
        self.offset = offset + length
        return Region(offset, length, code)

    def _extension(self, length: int) -> Region:
        code = self._integer(1, signed=True)
        return self._region(length, code)

    def _bytes(self, length: int) -> bytes:
        offset = self._region(length).offset
        return self.data[offset : offset + length].tobytes()

    def _integer(self, width: int, signed: bool = False) -> int:
        return int.from_bytes(self._bytes(width), "big", signed=signed)

    def _text(self, length: int) -> str:
        try:
            return self._bytes(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail("a name is not UTF-8") from error

    def _list(self, count: int, depth: int) -> list[Any]:
        if count > self.end - self.offset:  # each element takes at least one byte
            raise self.fail(f"a list of {count:,} elements is announced")
        return [self.value(depth + 1) for _ in range(count)]

    def _map(self, count: int, depth: int) -> dict[str, Any]:
        if 2 * count > self.end - self.offset:
            raise self.fail(f"a map of {count:,} entries is announced")
        result = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if not isinstance(key, str):
                raise self.fail("a map has a key that is not a string")
            result[key] = self.value(depth + 1)
        return result

    def array(self, value: Any, name: str) -> StoredArray | None:
        """Return the array that a value describes, None for any other value; raise
        CheckpointError if its shape, type and bytes contradict each other."""
        if isinstance(value, dict) and value.get(CHUNKED) is True:
            shape = self._ordered(value.get("shape"), name)
            parts = [self.array(item, name) for item in self._ordered(value.get("chunks"), name)]
            chunks = [part for part in parts if part is not None]
            if not chunks or len(chunks) < len(parts):
                raise self.fail(f"{name!r} is a chunked array without its parts")
            if any(chunk.dtype != chunks[0].dtype for chunk in chunks):
                raise self.fail(f"{name!r} has chunks of several types")
            regions = tuple(region for chunk in chunks for region in chunk.regions)
            return self._stored(name, shape, chunks[0].dtype, regions)
        if not isinstance(value, Region) or value.code != 1:
            return None
        match self.inside(value).value():
            case [list(shape), str(kind), Region(code=None) as raw]:
                if kind not in _DTYPES:
                    raise CheckpointError(
                        f"{self.source}: {name!r} is stored as {kind}; weights must be one of "
                        f"{', '.join(_DTYPES)}"
                    )
                return self._stored(name, shape, _DTYPES[kind], (raw,))
        raise self.fail(f"{name!r} is not an array")

    def _ordered(self, items: Any, name: str) -> list[Any]:
        if isinstance(items, dict) and all(key.isdecimal() for key in items):
            return [items[key] for key in sorted(items, key=int)]
        if isinstance(items, list):
            return items
        raise self.fail(f"{name!r} is a chunked array without its parts")

    def _stored(
        self, name: str, shape: list[Any], dtype: np.dtype, regions: tuple[Region, ...]
    ) -> StoredArray:
        if not all(type(n) is int and n >= 0 for n in shape):
            raise self.fail(f"{name!r} has the shape {shape}, which is not an array's")
        total = sum(region.length for region in regions)
        if math.prod(shape) * dtype.itemsize != total:
            raise self.fail(f"{name!r} has shape {shape} but {total:,} bytes")
        return StoredArray(tuple(shape), dtype, regions)
