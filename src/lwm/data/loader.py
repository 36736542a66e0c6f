"""Training data from a user's settings to batches: the front of this room.

Checks everything that can be checked before the first batch, and keeps count of what is broken
after it. Knows sources, encoders and packing by name; knows nothing of models beyond the size of
their vocabulary, and nothing of devices.
"""

import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lwm.core.errors import ConfigError, InputError
from lwm.core.progress import say
from lwm.data.config import DataConfig
from lwm.data.conversations import ConversationEncoder
from lwm.data.examples import Broken, Example, MissingKey, Report
from lwm.data.fields import FieldsEncoder, is_vision
from lwm.data.packing import Row, pack_rows
from lwm.data.sources.opening import open_source
from lwm.data.tokenizer import Tokenizer

if TYPE_CHECKING:  # Grain loads where a Loader is made: settings alone must load fast
    import grain

    from lwm.data.draws import Split

__all__ = ["DataConfig", "Loader", "Part", "texts"]

Part = Literal["train", "evaluation"]

_TOLD = 10  # broken examples that are told one by one
_PROBED = 100  # broken examples at the beginning before the data as a whole is refused


class Loader:
    """Batches of one process, without end.

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
        vocab_size: the model's; unchecked if None.

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
    ) -> None:
        from lwm.data.draws import Order, Split, Stream
        from lwm.data.pipeline import Batches, opener

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
        source = open_source(config.path, config.format)
        first, self.examples = _bounds(config, len(source), split)
        part = Split(
            source=source,
            first=first,
            count=self.examples,
            encode=_encoder(config, tokenizer),
            text_vocab=vocab_size,
        )
        identity = {
            "examples": self.examples,
            "first_example": _require_sound(part, config.path),
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "packing": config.packing,
            "shuffle": config.shuffle,
            "seed": config.seed,
        }
        stream = partial(
            Stream,
            part,
            Order(first=first, count=self.examples, shuffle=config.shuffle, seed=config.seed),
            batch_size=batch_size,
            most_broken=config.max_broken * self.examples,
        )
        pack = partial(
            pack_rows,
            length=sequence_length,
            packing=config.packing,
            loss_weights=config.loss_weights,
        )
        self._share = self.examples * len(self._rows) / batch_size
        self._max_broken = config.max_broken
        self._broken: set[int] = set()
        self.reports: list[Report] = []
        """The first broken examples."""
        self.iterator: grain.DatasetIterator[Row] = Batches(
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
        """Tells of broken examples and stops when there are too many."""
        for report in reports:
            if report.example in self._broken:
                continue
            self._broken.add(report.example)
            if len(self.reports) < _TOLD:
                self.reports.append(report)
                say(f"skipped a broken example: {report}")
            elif len(self.reports) == _TOLD == self.broken - 1:
                say("further broken examples are counted without being told")
        # What this process can have met: its share in the first pass; the order changes with each
        # pass, so as passes go by it meets examples of the others' shares too.
        met = min(self.examples, max(self._share, drawn))
        if reports and self.broken > self._max_broken * met:
            raise InputError(
                f"{self.broken} of {met:.0f} examples are broken, more than max_broken "
                f"({self._max_broken:g}) allows, the first of them {self.reports[0]}; repair the "
                "data or raise --data.max-broken"
            )


def texts(config: DataConfig) -> Iterator[str]:
    """The texts of the training split, in the order of its first pass: what a tokenizer is trained
    on. Broken examples are passed over.

    Raises:
        InputError: the data is missing or empty, or holds tokens instead of texts.
    """
    from lwm.data.draws import Order

    source = open_source(config.path, config.format)
    first, count = _bounds(config, len(source), "train")
    order = Order(first=first, count=count, shuffle=config.shuffle, seed=config.seed)
    for place in range(count):
        try:
            record = source.read(order[place])
        except Broken:
            continue
        if isinstance(record, Example):
            raise InputError(
                f"{config.path} holds tokens, not texts; give --tokenizer with theirs"
            )
        if record is not None:
            yield from _texts(record, config)


def _texts(record: Any, config: DataConfig) -> Iterator[str]:
    if config.messages:
        messages = record.get(config.messages)
        parts = messages if isinstance(messages, list) else []
        values = [part.get("content") for part in parts if isinstance(part, dict)]
    elif config.fields_from_example:  # whatever text it has beside its grammar
        values = [value for key, value in record.items() if key != config.fields_from_example]
    else:
        from lwm.data.fields import parse_fields

        fields = [item for item in parse_fields(config.fields) if not item.special]
        values = [record.get(key) for item in fields for key in item.keys if not is_vision(key)]
    yield from (value for value in values if isinstance(value, str) and value)


def _encoder(config: DataConfig, tokenizer: Tokenizer) -> FieldsEncoder | ConversationEncoder:
    if config.messages:
        return ConversationEncoder(
            tokenizer=tokenizer, key=config.messages, template=config.template
        )
    return FieldsEncoder(
        tokenizer=tokenizer,
        fields=config.fields,
        fields_from_example=config.fields_from_example,
        fields_index=config.fields_index,
        subfield_separator=config.subfield_separator,
        prepend_text=config.prepend_text,
        add_bos=config.add_bos,
        add_eos=config.add_eos,
    )


def _bounds(config: DataConfig, total: int, split: Part) -> tuple[int, int]:
    """First example and number of examples of a split."""
    held = round(total * config.held_out)
    if split == "evaluation" and not held:
        raise InputError(
            f"held_out is {config.held_out:g} of {total} examples, which keeps none for "
            "evaluation; raise --data.held-out, or give more examples"
        )
    if split == "train" and held == total:
        raise InputError(
            f"held_out is {config.held_out:g} of {total} examples, which leaves none to train on; "
            "lower --data.held-out, or give more examples"
        )
    return (total - held, held) if split == "evaluation" else (0, total - held)


def _require_sound(split: "Split", path: str) -> int:
    """Refuses data of which not even the beginning can be used.

    Returns:
        A checksum of the first sound example's tokens.
    """
    faults: list[Report] = []
    for index in range(split.first, split.first + split.count):
        try:
            example = split.example(index)
        except MissingKey as broken:
            raise InputError(
                f"{split.report(index, broken)}; name others in --data.fields"
            ) from broken
        except Broken as broken:
            faults.append(split.report(index, broken))
            if len(faults) == _PROBED:
                break
            continue
        if example is not None:
            return zlib.crc32(example.tokens.tobytes())
    if faults:
        raise InputError(
            f"none of the first {len(faults)} examples can be used, the first of them "
            f"{faults[0]}; repair the data, or name other keys in --data.fields"
        )
    raise InputError(f"{path} holds blank lines alone; give at least one example")


def _divisor(rows: int, workers: int) -> int:
    """The most workers, not above the setting, that can share the rows out evenly."""
    return next((n for n in range(min(rows, workers), 0, -1) if rows % n == 0), 0)
