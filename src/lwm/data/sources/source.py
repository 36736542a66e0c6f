"""Define sources of records, which processes read in any order.

A source is sent to workers by its paths, and opens its files where it is used.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Protocol, runtime_checkable

from lwm.core.errors import InputError
from lwm.data.examples.examples import Example

Record = Mapping[str, Any] | Example
"""A mapping whose keys the fields grammar names, or an example that is tokenized already."""


@runtime_checkable
class RecordSource(Protocol):
    """Define random access to records."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Record | None:
        """Return one record, or None for a blank line; raise `Broken` if it cannot be read."""
        ...

    def place(self, index: int) -> tuple[str, int]:
        """Return the file, and the line, row or record in it, from 1."""
        ...


class NamedSource:
    """Name the records of one file or dataset; `_reader` is opened again in each process."""

    def __init__(self, name: str) -> None:
        self._name = name

    def place(self, index: int) -> tuple[str, int]:
        """Return the name, and the number of a record from 1."""
        return self._name, index + 1

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_reader"}


class SequenceSource(NamedSource):
    """Read the rows of a sequence, such as the chapters of a book."""

    def __init__(self, name: str, rows: Sequence[Record]) -> None:
        super().__init__(name)
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Record | None:
        """Return one row."""
        return self._rows[index]


class Joined:
    """Join several sources, one after another."""

    def __init__(self, sources: Sequence[RecordSource]) -> None:
        self._sources = sources
        self._starts = list(accumulate(map(len, sources), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, index: int) -> Record | None:
        """Return one record."""
        source, offset = self._find(index)
        return source.read(offset)

    def place(self, index: int) -> tuple[str, int]:
        """Return the file and the place in it."""
        source, offset = self._find(index)
        return source.place(offset)

    def _find(self, index: int) -> tuple[RecordSource, int]:
        number = bisect_right(self._starts, index) - 1
        return self._sources[number], index - self._starts[number]


@contextmanager
def input_errors(
    problem: str, remedy: str, errors: type[Exception] | tuple[type[Exception], ...] = Exception
) -> Iterator[None]:
    """Raise InputError, "problem (reason); remedy", for the errors that a library raises."""
    try:
        yield
    except InputError:
        raise
    except errors as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise InputError(f"{problem} ({reason or type(error).__name__}); {remedy}") from error
