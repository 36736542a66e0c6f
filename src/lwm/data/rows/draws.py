"""Which example comes next: the order in which a stream draws from a split, and encoding.

The global batch of B rows is B streams. Stream r draws examples r, r + B, r + 2B, ... of the
split, which is shuffled anew for each pass and repeated without end; so what a row holds depends
on the seed and on B alone, not on how many processes and workers share the work. Where several
splits are mixed, each place of that endless order belongs to one of them, and each split has an
endless order of its own. Knows sources and encoders; knows nothing of rows.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from grain.experimental import index_shuffle

from lwm.core.errors import InputError
from lwm.data.examples.examples import Broken, Example, Report, require_usable
from lwm.data.sources.source import Source
from lwm.models.vision_tokens import VisionVocabulary


class Encode(Protocol):
    """Makes an example of a record."""

    def __call__(
        self, record: Mapping[str, Any], line: int, *, drop_prompt: bool = False
    ) -> Example | None:
        """The example; None where the record is empty."""
        ...


SHARES = 1000
"""Draws in which each split of a mixture gets exactly its share."""
_FRUITLESS_PASSES = 20  # over a small split; by chance no stream misses all that is sound so long
_FRUITLESS_DRAWS = 10_000  # over a large one
_ROUNDS = 4  # of the shuffle's cipher


@dataclass(frozen=True, kw_only=True)
class Split:
    """A contiguous part of a source, and how its records become examples.

    Args:
        first, count: the part.
        before: examples of the data sets before this one, so that each has a number of its own.
        text_vocab: size of the model's text vocabulary; unchecked if None.
        vision: what the model sees; None for one that does not.
    """

    source: Source
    first: int
    count: int
    encode: Encode
    before: int = 0
    text_vocab: int | None = None
    vision: VisionVocabulary | None = None

    def example(self, index: int, *, drop_prompt: bool = False) -> Example | None:
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
            line = self.source.place(index)[1]
            example = self.encode(record, line, drop_prompt=drop_prompt)
        if example is not None:
            require_usable(example, text_vocab=self.text_vocab, vision=self.vision)
        return example

    def report(self, index: int, broken: Broken) -> Report:
        return Report(self.before + index, *self.source.place(index), str(broken))


@dataclass(frozen=True, kw_only=True)
class Order:
    """The endless order of a split, the same for all streams.

    Args:
        first, count: the split.
        streams: how many draw from the order in turn.
    """

    first: int
    count: int
    shuffle: bool
    seed: int
    streams: int = 1

    def __getitem__(self, place: int) -> int:
        """Index in the source of the example at a place of the endless order."""
        turn, at = divmod(place, self.count)
        if self.shuffle and self.count > 1:
            # Each pass has a seed of its own, which must not be its neighbour's plus one.
            seed = random.Random(f"{self.seed} {turn}").getrandbits(32)
            at = index_shuffle(at, max_index=self.count - 1, seed=seed, rounds=_ROUNDS)
        elif not self.shuffle and math.gcd(self.count, self.streams) > 1:
            # Each stream meets some of the examples alone, over and over. Once it has met them all
            # the order moves on by one, lest it meet the same broken ones for ever.
            at = (at + place // math.lcm(self.count, self.streams)) % self.count
        return self.first + at


class Shares:
    """Which split each place of the endless order draws from, by weight.

    Of each `SHARES` places, whose order is drawn anew, a split gets its share exactly: what a
    split has given by then follows from the place alone, and nothing needs to be counted.

    Args:
        weights: of the splits, in any unit; each above 0.
    """

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        self._seed = seed
        self.slots = _apportioned(weights, SHARES)
        """Places that each split has of `SHARES`."""

    def __getitem__(self, place: int) -> tuple[int, int]:
        """The split, and the place in that split's own endless order."""
        if len(self.slots) == 1:
            return 0, place
        block, at = divmod(place, SHARES)
        splits = self._block(block)
        split = splits[at]
        return split, block * self.slots[split] + splits.count(split, 0, at)

    def _block(self, block: int) -> bytes:
        return _shuffled(self.slots, f"{self._seed} mixture {block}")


@lru_cache(maxsize=64)
def _shuffled(slots: tuple[int, ...], seed: str) -> bytes:
    splits = bytearray(b"".join(bytes([split]) * count for split, count in enumerate(slots)))
    random.Random(seed).shuffle(splits)
    return bytes(splits)


def _apportioned(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Whole numbers in the ratio of the weights that sum to `total`, by largest remainder."""
    exact = [weight / sum(weights) * total for weight in weights]
    found = [int(share) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: found[i] - exact[i])
    for i in by_rest[: total - sum(found)]:
        found[i] += 1
    return tuple(found)


class Stream:
    """One stream's draws, and what was broken among them.

    Args:
        splits: what is mixed, each with its order.
        drop_prompt: probability that a draw leaves out the prompt of a picture.
        row: the stream, from 0.
        batch_size: how many streams there are.
        most_broken: how many broken examples the data may have before the run stops.
    """

    def __init__(
        self,
        splits: Sequence[tuple[Split, Order]],
        shares: Shares,
        *,
        seed: int,
        drop_prompt: float,
        row: int,
        batch_size: int,
        most_broken: float,
    ) -> None:
        self._splits, self._shares = splits, shares
        self._seed, self._drop_prompt = seed, drop_prompt
        self._row, self._batch_size = row, batch_size
        self._reports: list[Report] = []
        self._fruitless = 0
        self._first_fault: Report | None = None
        self._patience = min(
            _FRUITLESS_PASSES * sum(split.count for split, _ in splits),
            max(_FRUITLESS_DRAWS, int(most_broken) + 1),
        )

    def draw(self, number: int) -> Example | None:
        """The stream's example of this number; None if it is blank or broken.

        Raises:
            InputError: so many in turn were, that none may ever come.
        """
        place = self._row + number * self._batch_size
        chosen, at = self._shares[place]
        split, order = self._splits[chosen]
        index = order[at]
        try:
            example = split.example(index, drop_prompt=self._drops(place))
        except Broken as broken:
            report = split.report(index, broken)
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

    def _drops(self, place: int) -> bool:
        if not self._drop_prompt:
            return False
        return random.Random(f"{self._seed} prompt {place}").random() < self._drop_prompt

    def take_reports(self) -> list[Report]:
        """What was broken since the last call."""
        taken, self._reports = self._reports, []
        return taken
