"""Define sources of records, which processes read in any order.

A source is sent to workers by its paths, and opens its files where it is used.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol, runtime_checkable

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


class Joined:
    """Join several sources, one after another."""

    def __init__(self, sources: Sequence[RecordSource]) -> None:
        self._sources = sources
        self._ends = list(accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> Record | None:
        """Return one record."""
        source, at = self._find(index)
        return source.read(at)

    def place(self, index: int) -> tuple[str, int]:
        """Return the file and the place in it."""
        source, at = self._find(index)
        return source.place(at)

    def _find(self, index: int) -> tuple[RecordSource, int]:
        number = bisect_right(self._ends, index)
        return self._sources[number], index - (self._ends[number - 1] if number else 0)


class InMemory:
    """Hold records that are small, such as the chapters of a book."""

    def __init__(self, name: str, records: Sequence[Record]) -> None:
        self._name, self._records = name, records

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> Record | None:
        """Return one record."""
        return self._records[index]

    def place(self, index: int) -> tuple[str, int]:
        """Return the name and the place."""
        return self._name, index + 1
