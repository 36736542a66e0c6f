"""Training data from a user's settings to batches: the front of this room.

Checks everything that can be checked before the first batch, and keeps count of what is broken
after it. Knows sources, encoders and packing by name; knows nothing of models beyond their
vocabulary, and nothing of devices.
"""

import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import grain

from lwm.core.errors import ConfigError, InputError
from lwm.core.progress import say
from lwm.data.config import DataConfig
from lwm.data.examples.examples import Report
from lwm.data.rows.draws import Order, Shares, Stream
from lwm.data.rows.packing import Row, pack_rows
from lwm.data.rows.pipeline import BatchIterator, opener
from lwm.data.splits import Part, encoder_of, making, open_split, require_sound
from lwm.data.text.tokenizer import Tokenizer
from lwm.models.vision_tokens import VisionVocabulary

_TOLD = 10  # broken examples that are told one by one


class Loader:
    """BatchIterator of one process, without end.

    A batch is a dict of arrays [rows, sequence_length]: `tokens`, `targets`, `positions` and
    `segments` int32 (segment -1 is padding), `weights` float32, the loss weight of each target.
    The global batch of `batch_size` rows depends on data and settings alone; processes and workers
    only share its rows out.

    `iterator` is a Grain `DatasetIterator`: hand it to `grain.checkpoint.CheckpointSave` and
    `CheckpointRestore` to keep the position with Orbax, or use `get_state` and `set_state` here.
    The state is JSON, a few integers a row; after `set_state` the batches that follow are
    bit-identical.

    Args:
        sequence_length: (input, target) pairs of a row.
        batch_size: rows of the global batch, over all processes.
        rows: which of them this process feeds; all unless given.
        split: `evaluation` for the held-out examples.
        vocab_size: ids of text of the model; unchecked if None.
        vision: what the model sees besides; needs `vocab_size`.

    Raises:
        ConfigError: settings contradict each other, the tokenizer or the model.
        InputError: the data is missing, empty, of another kind, or lacks a field.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        batch_size: int,
        rows: Sequence[int] | None = None,
        split: Part = "train",
        vocab_size: int | None = None,
        vision: VisionVocabulary | None = None,
    ) -> None:
        assert vision is None or vocab_size is not None, "ids of vision begin behind those of text"
        self._rows = tuple(range(batch_size)) if rows is None else tuple(rows)
        if sequence_length < 1 or not self._rows or not set(self._rows) <= set(range(batch_size)):
            raise ConfigError(
                f"rows {self._rows} of {sequence_length} tokens cannot be drawn from a batch of "
                f"{batch_size}; give positive sizes and rows within the batch"
            )
        if vocab_size is not None and tokenizer.vocab_size > vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model {vocab_size}; "
                "give the model's own tokenizer, or a model with a larger vocabulary"
            )
        sets, lengths = [], [0]
        for _, own in config.sets().values():
            encode = encoder_of(own, tokenizer, vision)
            part, length = open_split(own, split, encode, sum(lengths), vocab_size, vision)
            order = Order(
                first=part.first,
                count=part.count,
                shuffle=config.shuffle,
                seed=config.seed,
                streams=batch_size,
            )
            sets.append((part, order))
            lengths.append(length)
        shares = Shares([weight for weight, _ in config.sets().values()], seed=config.seed)
        counts = [part.count for part, _ in sets]
        firsts = [
            require_sound(part, own)
            for (part, _), (_, own) in zip(sets, config.sets().values(), strict=True)
        ]
        checksums = [zlib.crc32(first.tokens.tobytes()) for first in firsts]
        made_from = [making(own) for _, own in config.sets().values()]
        self.examples = sum(counts)
        identity = {
            "examples": counts if config.mixture else self.examples,
            "loss_weights": config.loss_weights,
            "fields": made_from if config.mixture else made_from[0],
            "first_example": checksums if config.mixture else checksums[0],
            "first_weights": [zlib.crc32(first.weights.tobytes()) for first in firsts],
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "packing": config.packing,
            "shuffle": config.shuffle,
            "seed": config.seed,
            # None as where a position was saved before there was such a setting.
            "mixture": list(shares.slots) if config.mixture else None,
            "drop_prompt": config.drop_prompt or None,
            "max_frames": config.max_frames or None,
        }
        stream = partial(
            Stream,
            sets,
            shares,
            seed=config.seed,
            drop_prompt=config.drop_prompt,
            batch_size=batch_size,
            most_broken=config.max_broken * self.examples,
        )
        pack = partial(
            pack_rows,
            length=sequence_length,
            packing=config.packing,
            loss_weights=config.loss_weights,
            text_vocab=vocab_size or 0,
        )
        self._names = list(config.sets())
        self._counts, self._weights = counts, [slots / sum(shares.slots) for slots in shares.slots]
        self._starts = list(accumulate(lengths))[:-1]
        # A held-out split is too small to be judged by itself; all of its set is of one make.
        self._judged_by = lengths[1:] if split == "evaluation" else None
        self._share = len(self._rows) / batch_size
        self._max_broken = config.max_broken
        self._broken: set[int] = set()
        self._broken_of: Counter[int] = Counter()
        self._first_of: dict[int, Report] = {}
        self.reports: list[Report] = []
        """The first broken examples."""
        self.iterator: grain.DatasetIterator[Row] = BatchIterator(
            opener(stream, pack),
            self._rows,
            workers=_divisor(len(self._rows), config.workers),
            prefetch=config.prefetch,
            identity=identity,
            heed=self._heed,
        )

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        return next(self.iterator)

    @property
    def broken(self) -> int:
        """Distinct broken examples met so far by this process."""
        return len(self._broken)

    def get_state(self) -> dict[str, Any]:
        return self.iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self.iterator.set_state(state)

    def close(self) -> None:
        """Ends worker processes and threads."""
        self.iterator.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _heed(self, reports: list[Report], drawn: int) -> None:
        """Tells of broken examples and stops when a data set has too many."""
        heeded = set()
        for report in reports:
            number = bisect_right(self._starts, report.example) - 1
            heeded.add(number)
            if report.example in self._broken:
                continue
            self._broken.add(report.example)
            self._broken_of[number] += 1
            self._first_of.setdefault(number, report)
            if len(self.reports) < _TOLD:
                self.reports.append(report)
                say(f"skipped a broken example: {report}")
            elif len(self.reports) == _TOLD == self.broken - 1:
                say("further broken examples are counted without being told")
        for number in sorted(heeded):
            # What this process can have met: its share in the first pass; the order changes with
            # each pass, so as passes go by it meets examples of the others' shares too.
            count, broken = self._counts[number], self._broken_of[number]
            met = min(count, max(count * self._share, drawn * self._weights[number]))
            met = self._judged_by[number] if self._judged_by else met
            if broken > self._max_broken * met:
                name = self._names[number] and f" of the data set {self._names[number]!r}"
                raise InputError(
                    f"{broken} of {met:.0f} examples{name} are broken, more than max_broken "
                    f"({self._max_broken:g}) allows, the first of them {self._first_of[number]}; "
                    "repair the data or raise --data.max-broken"
                )


def _divisor(rows: int, workers: int) -> int:
    """The most workers, not above the setting, that can share the rows out evenly."""
    return next((n for n in range(min(rows, workers), 0, -1) if rows % n == 0), 0)
