"""Decide which example comes next: the order in which each stream reads a mixture of splits.

A global batch of B rows is B streams. Stream r reads places r, r + B, r + 2B, ... of one endless
order, so the content of a row depends only on the seed and on B, not on the number of processes
and workers that share the work. `Shares` assigns each place to a split of the mixture; `Order`
shuffles a split for each pass over it.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from grain.experimental import index_shuffle

from lwm.core.errors import InputError
from lwm.data.examples.conversations import ConversationEncoder
from lwm.data.examples.examples import (
    Broken,
    Example,
    LongExamples,
    Report,
    TooLong,
    require_usable,
)
from lwm.data.examples.fields import FieldsEncoder
from lwm.data.rows.packing import Draw, PackedRows, Position
from lwm.data.sources.source import RecordSource
from lwm.models.vision_tokens import VisionVocabulary

SHARES = 1000
"""Number of places in which each split of a mixture has exactly its share."""
_FRUITLESS_PASSES = 20  # over small data; no stream misses all usable examples that often
_FRUITLESS_DRAWS = 10_000  # over large data
_ROUNDS = 4  # of the shuffle's cipher


@dataclass(frozen=True, kw_only=True)
class Order:
    """Define the endless order of a contiguous part of a data set, the same for all streams.

    Args:
        first, count: the part.
        streams: number of streams that read the order in turn.
    """

    first: int
    count: int
    shuffle: bool
    seed: int
    streams: int = 1

    def __getitem__(self, place: int) -> int:
        """Return the index in the source of the example at a place of the order."""
        turn, at = divmod(place, self.count)
        if self.shuffle and self.count > 1:
            # The seeds of neighboring passes must not differ by one.
            seed = random.Random(f"{self.seed} {turn}").getrandbits(32)
            at = index_shuffle(at, max_index=self.count - 1, seed=seed, rounds=_ROUNDS)
        elif not self.shuffle and math.gcd(self.count, self.streams) > 1:
            # Each stream would read the same few examples in every pass. Move the order on by one
            # once the stream has read them all, or it may read only broken examples forever.
            at = (at + place // math.lcm(self.count, self.streams)) % self.count
        return self.first + at


@dataclass(frozen=True, kw_only=True)
class Split:
    """Hold a contiguous part of one data set, and how its records become examples.

    Args:
        name: the data set's name in a mixture; empty without one.
        before: number of examples in the data sets before this one, so that each example of a
            mixture has its own number.
        text_vocab: size of the model's text vocabulary; not checked if None.
        vision: the model's vision vocabulary; None for a text model.
        longest: most tokens of an example that is not a plain text; None for any number.
        too_long: what becomes of longer ones. Those that hold tokens, images or videos are always
            skipped.
    """

    source: RecordSource
    order: Order
    encode: FieldsEncoder | ConversationEncoder
    name: str
    before: int
    text_vocab: int | None
    vision: VisionVocabulary | None
    longest: int | None
    too_long: LongExamples

    def example(self, index: int, *, drop_prompt: bool = False) -> Example | None:
        """Return the example at an index of the source, None for a blank line; raise `Broken`, or
        `TooLong` if it is skipped."""
        record = self.source.read(index)
        line = self.source.place(index)[1]
        example = (
            record
            if record is None or isinstance(record, Example)
            else self.encode(record, line, drop_prompt=drop_prompt)
        )
        if example is None:
            return None
        require_usable(example, text_vocab=self.text_vocab, vision=self.vision)
        if self.longest is None or len(example) <= self.longest or example.plain:
            return example
        if self.too_long == "skip" or record is None or isinstance(record, Example):
            raise TooLong
        return self.encode.truncated(record, line, self.longest, drop_prompt=drop_prompt)

    def report(self, index: int, broken: Broken) -> Report:
        """Return the report of a broken example."""
        return Report(self.before + index, *self.source.place(index), str(broken))


class Read(NamedTuple):
    """Count examples that were read."""

    examples: int = 0
    too_long: int = 0  # of them
    truncated: int = 0  # of those that are too long; the others were skipped


class Shares:
    """Assign each place of the endless order to a split, by weight.

    Each block of `SHARES` places is shuffled separately, and a split has exactly its share of each
    block. So a split's own place follows from the place, and nothing needs to be counted.

    Args:
        weights: of the splits, in any unit; each above 0.
    """

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        self._seed = seed
        self.slots = _apportioned(weights, SHARES)
        """Places of each split among `SHARES`."""

    def __getitem__(self, place: int) -> tuple[int, int]:
        """Return the split, and the place in that split's own order."""
        if len(self.slots) == 1:
            return 0, place
        block, at = divmod(place, SHARES)
        splits = _shuffled(self.slots, f"{self._seed} mixture {block}")
        split = splits[at]
        return split, block * self.slots[split] + splits.count(split, 0, at)


@lru_cache(maxsize=64)
def _shuffled(slots: tuple[int, ...], seed: str) -> bytes:
    splits = bytearray(b"".join(bytes([split]) * count for split, count in enumerate(slots)))
    random.Random(seed).shuffle(splits)
    return bytes(splits)


def _apportioned(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Return integers in the ratio of the weights that sum to `total`, by largest remainder."""
    exact = [weight / sum(weights) * total for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return tuple(counts)


class Stream:
    """Read one stream's examples, and collect reports of broken ones.

    Args:
        row: number of the stream, from 0.
        pack: packs the stream's examples into rows from a position.
        drop_prompt: probability that an image or video loses its prompt.
        batch_size: number of streams.
        max_broken: share of broken examples that the run accepts.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        shares: Shares,
        row: int,
        *,
        pack: Callable[[Draw, Position], PackedRows],
        seed: int,
        drop_prompt: float,
        batch_size: int,
        max_broken: float,
    ) -> None:
        self._splits, self._shares, self._pack = splits, shares, pack
        self._seed, self._drop_prompt = seed, drop_prompt
        self._row, self._batch_size = row, batch_size
        self._reports: list[Report] = []
        self._too_long: dict[int, bool] = {}  # whether truncated, by number
        self._fruitless = 0
        self._first_fault: Report | None = None
        self._long = False  # whether any of the last examples was too long
        count = sum(split.order.count for split in splits)
        most = max(_FRUITLESS_DRAWS, int(max_broken * count) + 1)
        self._patience = min(_FRUITLESS_PASSES * count, most)

    def rows(self, start: Position) -> PackedRows:
        """Yield the stream's rows from a position."""
        return self._pack(self.draw, start)

    def draw(self, number: int) -> Example | None:
        """Return the stream's example of this number; None if it is blank, broken or skipped.

        Raise InputError once too many examples in succession were unusable.
        """
        place = self._row + number * self._batch_size
        chosen, at = self._shares[place]
        split = self._splits[chosen]
        index = split.order[at]
        try:
            example = split.example(index, drop_prompt=self._drops_prompt(place))
        except Broken as broken:
            report = split.report(index, broken)
            self._reports.append(report)
            self._first_fault = self._first_fault or report
            example = None
        except TooLong:
            self._too_long[number], example = False, None
            self._long = True
        if example is not None:
            if example.truncated:
                self._too_long[number] = True
            self._fruitless, self._first_fault, self._long = 0, None, False
            return example
        self._fruitless += 1
        if self._fruitless >= self._patience:
            fault = self._first_fault
            kinds = f"blank or broken, the first of them {fault}" if fault else "blank"
            remedy = "repair the data"
            if self._long:
                kinds = f"longer than a row, {kinds}"
                remedy = f"raise --sequence-length, or {remedy}"
            raise InputError(
                f"the last {self._fruitless} examples read were all {kinds}; {remedy}"
            )
        return None

    def _drops_prompt(self, place: int) -> bool:
        share = self._drop_prompt
        return share > 0 and random.Random(f"{self._seed} prompt {place}").random() < share

    def take_too_long(self, position: Position) -> Read:
        """Return the counts of long examples before a position, each counted once, also by runs
        that resume; without the number of all examples."""
        before = [number for number in self._too_long if number < position.draw]
        truncated = sum([self._too_long.pop(number) for number in before])
        return Read(0, len(before), truncated)

    def take_reports(self) -> list[Report]:
        """Return the reports since the last call."""
        reports, self._reports = self._reports, []
        return reports
