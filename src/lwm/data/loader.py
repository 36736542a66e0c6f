"""Load training data: from a user's settings to batches.

Everything that can be checked is checked before the first batch; broken examples are counted
after it.
"""

import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from lwm.core.errors import ConfigError
from lwm.data.config import DataConfig
from lwm.data.examples.examples import Example, Report
from lwm.data.rows.broken import BrokenLog
from lwm.data.rows.draws import Shares, Split, Stream
from lwm.data.rows.long_examples import describe_long_examples
from lwm.data.rows.packing import Row, pack_rows
from lwm.data.rows.pipeline import BatchIterator
from lwm.data.splits import SplitName, open_mixture
from lwm.data.text.tokenizer import Tokenizer
from lwm.models.vision_tokens import VisionVocabulary


class Loader:
    """Yield the batches of one process, without end.

    A batch is a dict of arrays [rows, sequence_length]: `tokens`, `targets`, `positions` and
    `segments` int32 (segment -1 is padding), `weights` float32, the loss weight of each target.
    The global batch of `batch_size` rows depends only on data and settings; processes and workers
    share its rows.

    `iterator` is a `grain.DatasetIterator`, whose position `grain.checkpoint.CheckpointSave` and
    `CheckpointRestore` save with Orbax. `get_state` and `set_state` give the same as JSON data, a
    few integers for each row; the batches that follow are bit-identical.

    Args:
        sequence_length: (input, target) pairs of a row.
        batch_size: rows of the global batch, over all processes.
        rows: the rows that this process feeds; defaults to all.
        split: `evaluation` for the held-out examples.
        vocab_size: text ids of the model; not checked if None.
        vision: the model's vision vocabulary; needs `vocab_size`.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        batch_size: int,
        rows: Sequence[int] | None = None,
        split: SplitName = "train",
        vocab_size: int | None = None,
        vision: VisionVocabulary | None = None,
    ) -> None:
        assert vision is None or vocab_size is not None, "vision ids follow the text ids"
        rows = tuple(range(batch_size) if rows is None else rows)
        _require_rows(rows, batch_size, sequence_length)
        longest = None if config.packing == "concatenate" else sequence_length + 1
        opened = open_mixture(
            config, tokenizer, split, streams=batch_size, text_vocab=vocab_size, vision=vision,
            longest=longest,
        )  # fmt: skip
        self._opened, self._length = opened, sequence_length
        splits = [part for part, _ in opened]
        shares = Shares([weight for weight, _ in config.sets().values()], seed=config.seed)
        self.examples = sum(split.order.count for split in splits)
        """Number of examples of the split."""
        self._broken = BrokenLog(
            splits,
            shares,
            whole=split == "evaluation",
            share=len(rows) / batch_size,
            max_broken=config.max_broken,
        )
        self.iterator = BatchIterator(
            _open_stream(config, splits, shares, batch_size, sequence_length, vocab_size or 0),
            rows,
            workers=_divisor(len(rows), config.workers),
            prefetch=config.prefetch,
            identity=_identity(config, opened, shares, batch_size, sequence_length),
            report=self._broken.add,
        )

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        return next(self.iterator)

    @property
    def counts(self) -> dict[str, int]:
        """Return the numbers of examples that this process has read, of those that were longer
        than a row, of those that were truncated, and of broken ones."""
        return {**self.iterator.read._asdict(), "broken": self.broken}

    def describe_long_examples(self) -> str | None:
        """Return a sentence on the examples that are longer than a row, if there are any."""
        return describe_long_examples(self._opened, self._length)

    @property
    def broken(self) -> int:
        """Return the number of distinct broken examples that this process has read."""
        return self._broken.count

    @property
    def reports(self) -> list[Report]:
        """Return the reports of the first broken examples."""
        return self._broken.first

    def get_state(self) -> dict[str, Any]:
        """Return the position of the next batch as JSON data."""
        return self.iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue at a position; raise InputError if data, settings or rows differ."""
        self.iterator.set_state(state)

    def close(self) -> None:
        """Stop worker processes and threads."""
        self.iterator.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _require_rows(rows: tuple[int, ...], batch_size: int, sequence_length: int) -> None:
    if sequence_length < 1 or not rows or not set(rows) <= set(range(batch_size)):
        raise ConfigError(
            f"rows {rows} of {sequence_length} tokens are not part of a batch of {batch_size} "
            "rows; give positive sizes and rows within the batch"
        )


def _open_stream(
    config: DataConfig,
    splits: Sequence[Split],
    shares: Shares,
    batch_size: int,
    sequence_length: int,
    text_vocab: int,
) -> partial[Stream]:
    pack = partial(
        pack_rows,
        length=sequence_length,
        packing=config.packing,
        loss_weights=config.loss_weights,
        text_vocab=text_vocab,
    )
    return partial(
        Stream,
        splits,
        shares,
        pack=pack,
        seed=config.seed,
        drop_prompt=config.drop_prompt,
        batch_size=batch_size,
        max_broken=config.max_broken,
    )


def _identity(
    config: DataConfig,
    opened: Sequence[tuple[Split, Example]],
    shares: Shares,
    batch_size: int,
    sequence_length: int,
) -> dict[str, Any]:
    """Return, as JSON data, everything that positions depend on."""
    return {
        "examples": [split.order.count for split, _ in opened],
        "loss_weights": config.loss_weights,
        "fields": [_fields(settings) for _, settings in config.sets().values()],
        "first_example": [zlib.crc32(first.tokens.tobytes()) for _, first in opened],
        "first_weights": [zlib.crc32(first.weights.tobytes()) for _, first in opened],
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "packing": config.packing,
        **({} if config.packing == "concatenate" else {"too_long": config.too_long}),
        "shuffle": config.shuffle,
        "seed": config.seed,
        "mixture": list(shares.slots),
        "drop_prompt": config.drop_prompt,
        "max_frames": config.max_frames,
    }


def _fields(config: DataConfig) -> str:
    if config.messages:
        return f"messages {config.messages}"
    key = config.fields_from_example
    return f"those of the key {key}" if key else config.fields


def _divisor(rows: int, workers: int) -> int:
    """Return the largest number of workers, up to the setting, that divides the rows."""
    return next((n for n in range(min(rows, workers), 0, -1) if rows % n == 0), 0)
