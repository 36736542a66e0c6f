"""What a source is, and several in a row.

A source is a sequence of records, read in any order by any process: it travels to workers by its
paths and opens its files where it is used. Knows nothing of what records mean.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol, runtime_checkable

from lwm.data.examples.examples import Example

Record = Mapping[str, Any] | Example
"""A mapping whose keys the fields grammar names, or an example that is tokenised already."""


@runtime_checkable
class RecordSource(Protocol):
    """Records by number."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Record | None:
        """One record; None for a blank line.

        Raises:
            Broken: it cannot be read, for a reason that a report will give.
        """
        ...

    def place(self, index: int) -> tuple[str, int]:
        """The file, and the line, row or record in it, from 1."""
        ...


class Joined:
    """Several sources, one after another."""

    def __init__(self, sources: Sequence[RecordSource]) -> None:
        self._sources = sources
        self._ends = list(accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> Record | None:
        source, at = self._find(index)
        return source.read(at)

    def place(self, index: int) -> tuple[str, int]:
        source, at = self._find(index)
        return source.place(at)

    def _find(self, index: int) -> tuple[RecordSource, int]:
        number = bisect_right(self._ends, index)
        return self._sources[number], index - (self._ends[number - 1] if number else 0)


class InMemory:
    """Records that are small enough to hold, such as the chapters of a book."""

    def __init__(self, name: str, records: Sequence[Record]) -> None:
        self._name, self._records = name, records

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> Record | None:
        return self._records[index]

    def place(self, index: int) -> tuple[str, int]:
        return self._name, index + 1
