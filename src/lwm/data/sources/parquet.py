"""Read Parquet files.

A random read would decompress a whole row group for each row. So a file is converted once to an
Arrow file in the cache, which is memory-mapped and shared by processes.
"""

from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lwm.core.errors import InputError
from lwm.data.examples.examples import Broken
from lwm.data.sources.cache import cached, identity_of
from lwm.data.sources.source import NamedSource, Record, input_errors

MAGIC = b"PAR1"
_BATCH = 1024  # rows converted at a time


class Parquet(NamedSource):
    """Read the rows of a local Parquet file as mappings of its columns."""

    def __init__(self, path: Path, name: str) -> None:
        super().__init__(name)
        self._file = cached(f"arrow {identity_of(path)}", name, partial(_to_arrow, path, name))
        reader = self._reader
        lengths = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *lengths], dtype=np.int64)
        if not len(self):
            raise InputError(f"{name} has no rows; give a file that does")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, index: int) -> Record | None:
        """Return one row; raise `Broken` if its values cannot be read."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = self._reader.get_batch(number).slice(index - int(self._starts[number]), 1)
        try:
            return row.to_pylist()[0]
        except (ValueError, OverflowError) as error:  # invalid UTF-8, a date beyond all calendars
            raise Broken(f"it has a value that cannot be read ({error})") from error

    @cached_property
    def _reader(self) -> Any:
        import pyarrow as pa

        problem = f"the copy {self._file} of {self._name} cannot be read"
        with input_errors(problem, "remove it to convert the file again"):
            return pa.ipc.open_file(pa.memory_map(str(self._file)))


def _to_arrow(path: Path, name: str, copy: BinaryIO) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    remedy = "get the file again, or set --data.format"
    with input_errors(f"{name} is not a Parquet file", remedy):
        file = pq.ParquetFile(path)

    def batches() -> Iterator[Any]:
        with input_errors(f"{name} is broken", "get the file again", OSError):
            yield from file.iter_batches(batch_size=_BATCH)

    # Each row group may have a different dictionary; an Arrow file has one for all.
    schema = pa.schema(
        [
            field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
            for field in file.schema_arrow
        ]
    )
    problem = f"{name} is broken, or has a column that cannot be read"
    remedy = "get the file again, or change the column's type"
    with (
        input_errors(problem, remedy, pa.ArrowException),
        file,
        pa.ipc.new_file(copy, schema) as writer,
    ):
        for batch in batches():
            writer.write_batch(batch.cast(schema))
