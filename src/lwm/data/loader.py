"""Load training data: from a user's settings to batches.

Everything that can be checked is checked before the first batch; broken examples are counted
after it.
"""

import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import grain

from lwm.core.errors import ConfigError
from lwm.data.config import DataConfig
from lwm.data.examples.examples import Report
from lwm.data.rows.broken import BrokenLog
from lwm.data.rows.draws import Shares, Stream
from lwm.data.rows.packing import Row, pack_rows
from lwm.data.rows.pipeline import BatchIterator
from lwm.data.splits import OpenDataSet, Part, open_mixture
from lwm.data.text.tokenizer import Tokenizer
from lwm.models.vision_tokens import VisionVocabulary


class Loader:
    """Yield the batches of one process, without end.

    A batch is a dict of arrays [rows, sequence_length]: `tokens`, `targets`, `positions` and
    `segments` int32 (segment -1 is padding), `weights` float32, the loss weight of each target.
    The global batch of `batch_size` rows depends only on data and settings; processes and workers
    share its rows.

    `iterator` is a Grain `DatasetIterator`: pass it to `grain.checkpoint.CheckpointSave` and
    `CheckpointRestore` to save the position with Orbax, or use `get_state` and `set_state` here.
    The state is JSON, a few integers for each row; after `set_state` the batches that follow are
    bit-identical.

    Args:
        sequence_length: (input, target) pairs of a row.
        batch_size: rows of the global batch, over all processes.
        rows: the rows that this process feeds; defaults to all.
        split: `evaluation` for the held-out examples.
        vocab_size: text ids of the model; not checked if None.
        vision: the model's vision vocabulary; needs `vocab_size`.

    Raises:
        ConfigError: settings contradict each other, the tokenizer or the model.
        InputError: the data is missing, empty, of another format, or lacks a field.
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
        assert vision is None or vocab_size is not None, "vision ids follow the text ids"
        rows = tuple(range(batch_size)) if rows is None else tuple(rows)
        if sequence_length < 1 or not rows or not set(rows) <= set(range(batch_size)):
            raise ConfigError(
                f"rows {rows} of {sequence_length} tokens are not part of a batch of "
                f"{batch_size} rows; give positive sizes and rows within the batch"
            )
        if vocab_size is not None and tokenizer.vocab_size > vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model {vocab_size}; "
                "give the model's own tokenizer, or a model with a larger vocabulary"
            )
        sets = open_mixture(
            config, tokenizer, split, streams=batch_size, text_vocab=vocab_size, vision=vision
        )
        shares = Shares([weight for weight, _ in config.sets().values()], seed=config.seed)
        self.examples = sum(opened.split.count for opened in sets)
        """Number of examples of the split."""
        self._broken = BrokenLog(
            [opened.split for opened in sets],
            shares,
            totals=[opened.total for opened in sets] if split == "evaluation" else None,
            share=len(rows) / batch_size,
            max_broken=config.max_broken,
        )
        self.iterator: grain.DatasetIterator[Row] = BatchIterator(
            partial(
                Stream,
                [(opened.split, opened.order) for opened in sets],
                shares,
                seed=config.seed,
                drop_prompt=config.drop_prompt,
                batch_size=batch_size,
                most_broken=config.max_broken * self.examples,
            ),
            partial(
                pack_rows,
                length=sequence_length,
                packing=config.packing,
                loss_weights=config.loss_weights,
                text_vocab=vocab_size or 0,
            ),
            rows,
            workers=_divisor(len(rows), config.workers),
            prefetch=config.prefetch,
            identity=_identity(config, sets, shares, batch_size, sequence_length),
            report=self._broken.add,
        )

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        return next(self.iterator)

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
        """Continue at a position.

        Raises:
            InputError: it belongs to other data, other settings or other rows.
        """
        self.iterator.set_state(state)

    def close(self) -> None:
        """Stop worker processes and threads."""
        self.iterator.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _identity(
    config: DataConfig,
    sets: Sequence[OpenDataSet],
    shares: Shares,
    batch_size: int,
    sequence_length: int,
) -> dict[str, Any]:
    """Return, as JSON data, everything that positions depend on."""
    firsts = [opened.first for opened in sets]
    return {
        "examples": [opened.split.count for opened in sets],
        "loss_weights": config.loss_weights,
        "fields": [_fields(settings) for _, settings in config.sets().values()],
        "first_example": [zlib.crc32(first.tokens.tobytes()) for first in firsts],
        "first_weights": [zlib.crc32(first.weights.tobytes()) for first in firsts],
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "packing": config.packing,
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
