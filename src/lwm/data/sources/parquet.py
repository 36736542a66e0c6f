"""Read Parquet files.

A random read would decompress a whole row group for each row. So a file is converted once to an
Arrow file in the cache, which is memory-mapped and shared by processes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lwm.core.errors import InputError
from lwm.data.sources.cache import cached, identity_of
from lwm.data.sources.source import Record

MAGIC = b"PAR1"
_BATCH = 1024  # rows converted at a time


class Parquet:
    """Read the rows of a Parquet file as mappings of its columns.

    Args:
        path: a local file.
        name: the original's name for reports, where `path` is a copy.

    Raises:
        InputError: the file is broken or has no rows.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self._name = name or str(path)

        def fill(copy: BinaryIO) -> None:
            _to_arrow(path, copy, self._name)

        self._file = cached(f"arrow {identity_of(path)}", self._name, fill)
        self._reader: Any = None
        reader = self._open()
        lengths = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
        self._ends = np.cumsum(lengths, dtype=np.int64)
        if not len(self):
            raise InputError(f"{self._name} has no rows; give a file that does")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, index: int) -> Record | None:
        """Return one row."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[number - 1]) if number else 0
        batch = self._open().get_batch(number)
        return batch.slice(index - start, 1).to_pylist()[0]

    def place(self, index: int) -> tuple[str, int]:
        """Return the file and the row's number."""
        return self._name, index + 1

    def _open(self) -> Any:
        if self._reader is None:
            import pyarrow as pa

            try:
                self._reader = pa.ipc.open_file(pa.memory_map(str(self._file)))
            except (OSError, pa.ArrowException) as error:
                raise InputError(
                    f"the copy {self._file} of {self._name} cannot be read; remove it to "
                    "convert the file again"
                ) from error
        return self._reader

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None}


def _to_arrow(path: Path, copy: BinaryIO, name: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{name} is not a Parquet file ({' '.join(str(error).split())}); get the file again, "
            "or set --data.format"
        ) from error

    def batches() -> Iterator[Any]:
        try:
            yield from file.iter_batches(batch_size=_BATCH)
        except OSError as error:
            raise InputError(f"{name} is broken ({error}); get the file again") from error

    # Each row group may have a different dictionary; an Arrow file has one for all.
    schema = pa.schema(
        [
            field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
            for field in file.schema_arrow
        ]
    )
    try:
        with file, pa.ipc.new_file(copy, schema) as writer:
            for batch in batches():
                writer.write_batch(batch.cast(schema))
    except pa.ArrowException as error:
        raise InputError(
            f"{name} is broken, or has a column that cannot be read "
            f"({' '.join(str(error).split())}); get the file again, or change its type"
        ) from error
