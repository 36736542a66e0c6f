"""Which example comes next: the order in which a stream draws from a split, and encoding.

The global batch of B rows is B streams. Stream r draws examples r, r + B, r + 2B, ... of the
split, which is shuffled anew for each pass and repeated without end; so what a row holds depends
on the seed and on B alone, not on how many processes and workers share the work. Knows sources and
encoders; knows nothing of rows.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from grain.experimental import index_shuffle

from lwm.core.errors import InputError
from lwm.data.examples import Broken, Example, Report, require_usable
from lwm.data.sources.source import Source

Encode = Callable[[Mapping[str, Any], int], Example | None]
"""(record, its line) -> the example; None where it is empty."""

_FRUITLESS_PASSES = 20  # over a small split; by chance no stream misses all that is sound so long
_FRUITLESS_DRAWS = 10_000  # over a large one
_ROUNDS = 4  # of the shuffle's cipher


@dataclass(frozen=True, kw_only=True)
class Split:
    """A contiguous part of a source, and how its records become examples.

    Args:
        first, count: the part.
        text_vocab: size of the model's text vocabulary; unchecked if None.
        can_see: whether the model takes vision codes.
    """

    source: Source
    first: int
    count: int
    encode: Encode
    text_vocab: int | None = None
    can_see: bool = False

    def example(self, index: int) -> Example | None:
        """The example at a place of the source; None for a blank line.

        Raises:
            Broken: it cannot be used.
        """
        record = self.source.read(index)
        if record is None:
            return None
        if isinstance(record, Example):
            example: Example | None = record
        else:
            example = self.encode(record, self.source.place(index)[1])
        if example is not None:
            require_usable(example, text_vocab=self.text_vocab, can_see=self.can_see)
        return example

    def report(self, index: int, broken: Broken) -> Report:
        return Report(index, *self.source.place(index), str(broken))


@dataclass(frozen=True, kw_only=True)
class Order:
    """The endless order of a split, the same for all streams."""

    first: int
    count: int
    shuffle: bool
    seed: int

    def __getitem__(self, place: int) -> int:
        """Index in the source of the example at a place of the endless order."""
        turn, at = divmod(place, self.count)
        if self.shuffle and self.count > 1:
            # Each pass has a seed of its own, which must not be its neighbour's plus one.
            seed = random.Random(f"{self.seed} {turn}").getrandbits(32)
            at = index_shuffle(at, max_index=self.count - 1, seed=seed, rounds=_ROUNDS)
        return self.first + at


class Stream:
    """One stream's draws, and what was broken among them.

    Args:
        row: the stream, from 0.
        batch_size: how many streams there are.
        most_broken: how many broken examples the data may have before the run stops.
    """

    def __init__(
        self, split: Split, order: Order, *, row: int, batch_size: int, most_broken: float
    ) -> None:
        self._split, self._order = split, order
        self._row, self._batch_size = row, batch_size
        self._reports: list[Report] = []
        self._fruitless = 0
        self._first_fault: Report | None = None
        self._patience = min(
            _FRUITLESS_PASSES * split.count, max(_FRUITLESS_DRAWS, int(most_broken) + 1)
        )

    def draw(self, number: int) -> Example | None:
        """The stream's example of this number; None if it is blank or broken.

        Raises:
            InputError: so many in turn were, that none may ever come.
        """
        index = self._order[self._row + number * self._batch_size]
        try:
            example = self._split.example(index)
        except Broken as broken:
            report = self._split.report(index, broken)
            self._reports.append(report)
            self._first_fault = self._first_fault or report
            example = None
        if example is not None:
            self._fruitless, self._first_fault = 0, None
            return example
        self._fruitless += 1
        if self._fruitless >= self._patience:
            fault = self._first_fault
            raise InputError(
                f"the last {self._fruitless} examples read were all "
                + (f"blank or broken, the first of them {fault}" if fault else "blank")
                + "; repair the data"
            )
        return None

    def take_reports(self) -> list[Report]:
        """What was broken since the last call."""
        taken, self._reports = self._reports, []
        return taken
