"""The original's files: arrays in Flax's msgpack encoding, found without reading them.

The msgpack package would copy each array two or three times on the way to memory, and an array
here can be a fifth of a 7B model. So this walks the structure of a memory map, remembers where the
raw numbers lie and hands out views. Every length is checked against the file's end before it is
used. Knows bytes; knows nothing of models.

Sources: the msgpack specification; flax.serialization (ExtType 1: `(shape, dtype, bytes)`, 3: a
scalar; arrays over 2^30 bytes as maps with the key `__msgpack_chunked_array__`).
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from lwm.core.errors import CheckpointError

_CHUNKED = "__msgpack_chunked_array__"
_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "float64": np.dtype(np.float64),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_MAX_DEPTH = 32


@dataclass(frozen=True)
class Region:
    """Where raw bytes lie."""

    start: int
    length: int
    code: int | None = None  # of an extension type


@dataclass(frozen=True)
class StoredArray:
    """An array on disk: its shape, type and the regions that hold its flattened numbers in
    order."""

    shape: tuple[int, ...]
    dtype: np.dtype
    regions: tuple[Region, ...]

    def layer(self, data: np.ndarray, axis: int, index: int) -> np.ndarray:
        """One index of an axis; a view unless the array is stored in chunks."""
        return np.take(self.view(data), index, axis=axis) if axis else self.view(data)[index]

    def view(self, data: np.ndarray) -> np.ndarray:
        parts = [
            np.frombuffer(data, np.uint8, part.length, part.start).view(self.dtype)
            for part in self.regions
        ]
        flat = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return flat.reshape(self.shape)


class Walker:
    """Reads msgpack values from a buffer; binary data comes back as a `Region`.

    Args:
        data: the whole file, one byte an element.
        source: the file's name, for messages.
    """

    def __init__(self, data: np.ndarray, source: str, start: int = 0, end: int | None = None):
        self.data, self.source = data, source
        self.offset, self.end = start, len(data) if end is None else end

    def fail(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.source} is broken or cut short ({why} at byte {self.offset:,} of "
            f"{len(self.data):,}); "
            "copy or download it again"
        )

    def _skip(self, count: int) -> int:
        at = self.offset
        if count < 0 or at + count > self.end:
            raise self.fail(f"{count:,} bytes are announced and {self.end - at:,} are left")
        self.offset = at + count
        return at

    def _integer(self, width: int, signed: bool = False) -> int:
        at = self._skip(width)
        return int.from_bytes(self.data[at : at + width].tobytes(), "big", signed=signed)

    def _text(self, length: int) -> str:
        at = self._skip(length)
        try:
            return self.data[at : at + length].tobytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail("a name is not UTF-8") from error

    def value(self, depth: int = 0) -> Any:
        """The next value: None, bool, int, float, str, list, dict, or a `Region` for binary and
        extension data."""
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
                length = self._integer(1 << (tag - 0xC4))
                return Region(self._skip(length), length)
            case 0xC7 | 0xC8 | 0xC9:
                length = self._integer(1 << (tag - 0xC7))
                code = self._integer(1, signed=True)
                return Region(self._skip(length), length, code)
            case 0xCA | 0xCB:
                width = 4 if tag == 0xCA else 8
                at = self._skip(width)
                return float(np.frombuffer(self.data, f">f{width}", 1, at)[0])
            case 0xCC | 0xCD | 0xCE | 0xCF:
                return self._integer(1 << (tag - 0xCC))
            case 0xD0 | 0xD1 | 0xD2 | 0xD3:
                return self._integer(1 << (tag - 0xD0), signed=True)
            case 0xD4 | 0xD5 | 0xD6 | 0xD7 | 0xD8:
                code = self._integer(1, signed=True)
                length = 1 << (tag - 0xD4)
                return Region(self._skip(length), length, code)
            case 0xD9 | 0xDA | 0xDB:
                return self._text(self._integer(1 << (tag - 0xD9)))
            case 0xDC | 0xDD:
                return self._list(self._integer(2 << (tag - 0xDC)), depth)
            case 0xDE | 0xDF:
                return self._map(self._integer(2 << (tag - 0xDE)), depth)
        raise self.fail(f"the byte 0x{tag:02x} starts no value")

    def _list(self, count: int, depth: int) -> list[Any]:
        if count > self.end - self.offset:  # each element takes a byte at least
            raise self.fail(f"a list of {count:,} elements is announced")
        return [self.value(depth + 1) for _ in range(count)]

    def _map(self, count: int, depth: int) -> dict[str, Any]:
        if 2 * count > self.end - self.offset:
            raise self.fail(f"a map of {count:,} entries is announced")
        result = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if not isinstance(key, str):
                raise self.fail("a map has a key that is no string")
            result[key] = self.value(depth + 1)
        return result

    def array(self, value: Any, name: str) -> StoredArray | None:
        """A stored array from a value read before; None for scalars and everything else."""
        if isinstance(value, dict) and value.get(_CHUNKED) is True:
            return self._chunked(value, name)
        if not isinstance(value, Region) or value.code != 1:
            return None
        inner = Walker(self.data, self.source, value.start, value.start + value.length).value()
        match inner:
            case [list(shape), str(kind), Region(code=None) as raw] if all(
                isinstance(n, int) and n >= 0 for n in shape
            ):
                dtype = self._dtype(kind, name)
                if int(np.prod(shape, dtype=object)) * dtype.itemsize != raw.length:
                    raise self.fail(f"{name!r} has shape {shape} but {raw.length:,} bytes")
                return StoredArray(tuple(shape), dtype, (raw,))
        raise self.fail(f"{name!r} is not an array")

    def _dtype(self, kind: str, name: str) -> np.dtype:
        if kind not in _DTYPES:
            raise CheckpointError(
                f"{self.source}: {name!r} is stored as {kind}; weights must be one of "
                f"{', '.join(_DTYPES)}"
            )
        return _DTYPES[kind]

    def _chunked(self, value: dict[str, Any], name: str) -> StoredArray:
        def ordered(items: Any) -> list[Any]:
            if isinstance(items, dict) and all(key.isdecimal() for key in items):
                return [items[key] for key in sorted(items, key=int)]
            if isinstance(items, list):
                return items
            raise self.fail(f"{name!r} is a chunked array without its parts")

        shape = ordered(value.get("shape"))
        chunks = [self.array(chunk, name) for chunk in ordered(value.get("chunks"))]
        if not chunks or any(chunk is None for chunk in chunks):
            raise self.fail(f"{name!r} is a chunked array without its parts")
        regions = tuple(region for chunk in chunks if chunk for region in chunk.regions)
        dtype = chunks[0].dtype  # type: ignore[union-attr]
        if any(chunk and chunk.dtype != dtype for chunk in chunks):
            raise self.fail(f"{name!r} has chunks of several types")
        if not all(isinstance(n, int) and n >= 0 for n in shape) or int(
            np.prod(shape, dtype=object)
        ) * dtype.itemsize != sum(region.length for region in regions):
            raise self.fail(f"{name!r} has shape {shape}, which its chunks do not fill")
        return StoredArray(tuple(shape), dtype, regions)
