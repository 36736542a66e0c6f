"""Read and write ArrayRecord files of examples that are tokenized already.

One record is one example, little-endian: the four bytes `LWM1`, the number of tokens n as uint32,
n tokens as int32, n flags of one byte (bit 0: the token carries loss; bit 1: it is a vision code).
Every record is checked, and its declared size is compared with its bytes.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lwm.core.errors import InputError
from lwm.core.files import new_file
from lwm.data.examples.examples import MAX_TOKENS, Broken, Example
from lwm.data.sources.source import Record

MAGIC = bytes.fromhex("83af70d10d884a3f")  # of the container, Riegeli
SUFFIX = ".array_record"
_RECORD = b"LWM1"
_HEADER = len(_RECORD) + 4
_LOSS, _VISION = 1, 2
_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"


class ArrayRecord:
    """Read the examples of an ArrayRecord file.

    Args:
        path: a local file.
        name: the original's name for reports, where `path` is a copy.

    Raises:
        InputError: the file is broken, empty, or of another format.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self._path, self._name = path, name or str(path)
        self._reader: Any = None
        self._count = self._open().num_records()
        if not self._count:
            raise InputError(f"{self._name} has no records; give a file that does")

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> Record | None:
        """Return one example; raise `Broken` if it cannot be read."""
        try:
            record = self._open().read([index])[0]
        except RuntimeError as error:  # the library raises no other
            raise Broken(f"the record cannot be read ({' '.join(str(error).split())})") from error
        return decode_example(record)

    def place(self, index: int) -> tuple[str, int]:
        """Return the file and the record's number."""
        return self._name, index + 1

    def _open(self) -> Any:
        if self._reader is None:
            reader = _module().ArrayRecordReader(str(self._path), _RANDOM_ACCESS)
            if not reader.ok():
                raise InputError(
                    f"{self._name} is not a complete ArrayRecord file; write it again, or set "
                    "--data.format"
                )
            self._reader = reader
        return self._reader

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None}


def write_array_record(path: Path, examples: Iterable[Example]) -> int:
    """Write examples to a new file, and return their number.

    Raises:
        InputError: the file exists already, or cannot be written.
    """
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as partial:
            writer = _module().ArrayRecordWriter(str(partial), "group_size:1")  # random access
            try:
                for example in examples:
                    writer.write(encode_example(example))
                    count += 1
            finally:
                writer.close()
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be written ({reason}); choose another") from error
    return count


def encode_example(example: Example) -> bytes:
    """Return the record of an example."""
    flags = (example.weights > 0) * _LOSS | example.vision * _VISION
    return b"".join(
        (
            _RECORD,
            np.uint32(len(example)).astype("<u4").tobytes(),
            example.tokens.astype("<i4").tobytes(),
            flags.astype(np.uint8).tobytes(),
        )
    )


def decode_example(record: bytes) -> Example:
    """Return the example of a record; raise `Broken` if it has another form."""
    if record[: len(_RECORD)] != _RECORD or len(record) < _HEADER:
        raise Broken("the record is not an example of lwm")
    count = int(np.frombuffer(record, "<u4", count=1, offset=len(_RECORD))[0])
    if count > MAX_TOKENS or len(record) != _HEADER + 5 * count:
        raise Broken(f"the record declares {count} tokens and has {len(record)} bytes")
    tokens = np.frombuffer(record, "<i4", count=count, offset=_HEADER).astype(np.int32)
    flags = np.frombuffer(record, np.uint8, count=count, offset=_HEADER + 4 * count)
    if count and int(flags.max()) > _LOSS | _VISION:
        raise Broken(f"the record has the unknown flags {int(flags.max())}")
    return Example(
        tokens=tokens,
        weights=((flags & _LOSS) > 0).astype(np.float32),
        vision=(flags & _VISION) > 0,
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
