"""Read and write ArrayRecord files of examples that are tokenized already.

One record is one example, little-endian: the four bytes `LWM1`, the number of tokens n as uint32,
n tokens as int32, n flags of one byte (bit 0: the token carries loss; bit 1: it is a vision code).
"""

import struct
from collections.abc import Iterable
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lwm.core.errors import InputError
from lwm.core.files import new_file, require_utf8
from lwm.data.examples.examples import MAX_TOKENS, Broken, Example
from lwm.data.sources.source import NamedSource, Record, input_errors

MAGIC = bytes.fromhex("83af70d10d884a3f")  # of the container, Riegeli
SUFFIX = ".array_record"
_RECORD = b"LWM1"
_HEADER = struct.Struct("<4sI")
_LOSS, _VISION = 1, 2
_READ_RANDOM = "readahead_buffer_size:0,max_parallelism:0"
_WRITE_RANDOM = "group_size:1"


class ArrayRecord(NamedSource):
    """Read the examples of a local ArrayRecord file."""

    def __init__(self, path: Path, name: str) -> None:
        super().__init__(name)
        require_utf8(path, "ArrayRecord files must be")
        self._path = path
        self._count = self._reader.num_records()
        if not self._count:
            raise InputError(f"{name} has no records; give a file that does")

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> Record | None:
        """Return one example; raise `Broken` if it cannot be read."""
        try:
            record = self._reader.read([index])[0]
        except RuntimeError as error:  # the library raises no other
            raise Broken(f"the record cannot be read ({' '.join(str(error).split())})") from error
        return decode_example(record)

    @cached_property
    def _reader(self) -> Any:
        reader = _module().ArrayRecordReader(str(self._path), _READ_RANDOM)
        if not reader.ok():
            raise InputError(
                f"{self._name} is not a complete ArrayRecord file; write it again, or set "
                "--data.format"
            )
        return reader


def write_array_record(path: Path, examples: Iterable[Example]) -> int:
    """Write examples to a new file, and return their number."""
    count = 0
    with input_errors(f"{path} cannot be written", "choose another", (OSError, RuntimeError)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            new_file(path) as partial,
            closing(_module().ArrayRecordWriter(str(partial), _WRITE_RANDOM)) as writer,
        ):
            for example in examples:
                writer.write(encode_example(example))
                count += 1
    return count


def encode_example(example: Example) -> bytes:
    """Return the record of an example."""
    flags = (example.weights > 0) * _LOSS | example.vision * _VISION
    tokens = example.tokens.astype("<i4")
    header = _HEADER.pack(_RECORD, len(example))
    return header + tokens.tobytes() + flags.astype(np.uint8).tobytes()


def decode_example(record: bytes) -> Example:
    """Return the example of a record; raise `Broken` if it has another form."""
    if len(record) < _HEADER.size or not record.startswith(_RECORD):
        raise Broken("the record is not an example of lwm")
    _, count = _HEADER.unpack_from(record)
    if count > MAX_TOKENS or len(record) != _HEADER.size + 5 * count:
        raise Broken(f"the record declares {count} tokens and has {len(record)} bytes")
    tokens = np.frombuffer(record, "<i4", count, _HEADER.size).astype(np.int32)
    flags = np.frombuffer(record, np.uint8, count, _HEADER.size + 4 * count)
    if count and int(flags.max()) > _LOSS | _VISION:
        raise Broken(f"the record has the unknown flags {int(flags.max())}")
    weighted, vision = (flags & _LOSS) > 0, (flags & _VISION) > 0
    return Example(
        tokens=tokens,
        weights=weighted.astype(np.float32),
        vision=vision,
        plain=bool(weighted[1:].all() and not vision.any()),  # the first may begin the text
    )


def _module() -> Any:
    try:
        from array_record.python import array_record_module  # type: ignore[attr-defined]
    except ImportError as error:
        raise InputError(
            "ArrayRecord files need the package array_record, which does not support this system; "
            "use JSON lines or Parquet"
        ) from error
    return array_record_module
