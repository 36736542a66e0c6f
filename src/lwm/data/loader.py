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
from typing import TYPE_CHECKING, Any, Literal

from lwm.core.errors import ConfigError, InputError
from lwm.core.progress import say
from lwm.data.config import DataConfig, DataSet
from lwm.data.conversations import ConversationEncoder
from lwm.data.examples import Broken, Example, MissingKey, Report
from lwm.data.fields import FieldsEncoder, is_vision
from lwm.data.packing import Row, pack_rows
from lwm.data.sources.opening import open_source
from lwm.data.templates import text_content
from lwm.data.tokenizer import Tokenizer
from lwm.data.tokenizer_train import LEAST_VOCABULARY, train_tokenizer
from lwm.models.world import VisionVocabulary

if TYPE_CHECKING:  # Grain loads where a Loader is made: settings alone must load fast
    import grain

    from lwm.data.draws import Split

__all__ = ["DataConfig", "DataSet", "Loader", "Part", "texts"]

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
        from lwm.data.draws import Order, Shares, Stream
        from lwm.data.pipeline import Batches, opener

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
            encode = _encoder(own, tokenizer, vision)
            part, length = _open_split(own, split, encode, sum(lengths), vocab_size, vision)
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
            _require_sound(part, own)
            for (part, _), (_, own) in zip(sets, config.sets().values(), strict=True)
        ]
        checksums = [zlib.crc32(first.tokens.tobytes()) for first in firsts]
        made_from = [_making(own) for _, own in config.sets().values()]
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


def texts(config: DataConfig, vision: VisionVocabulary | None = None) -> Iterator[str]:
    """The texts of the training split, in the order of its first pass: what a tokenizer is trained
    on. Of several data sets in turn. Broken examples are passed over.

    The data is opened and its beginning looked at before this returns.

    Args:
        vision: what the model sees; None for one that does not.

    Raises:
        InputError: the data is missing or empty, lacks a field, or holds tokens instead of texts.
    """
    # Any tokenizer finds the faults that the one which is to be trained would find later.
    plain = train_tokenizer(["a"], LEAST_VOCABULARY)
    waiting = []
    for _, own in config.sets().values():
        split, _ = _open_split(own, "train", _encoder(own, plain, vision), 0, None, vision)
        _require_texts(split, own)
        waiting.append(_texts_of(split, own))
    return _in_turn(waiting)


def _in_turn(waiting: list[Iterator[str]]) -> Iterator[str]:
    while waiting:
        one = waiting.pop(0)
        if (text := next(one, None)) is not None:
            yield text
            waiting.append(one)


def _require_texts(split: "Split", config: DataConfig) -> None:
    try:
        first = split.source.read(split.first)
    except Broken:
        first = None
    if isinstance(first, Example):
        raise InputError(f"{config.path} holds tokens, not texts; give --tokenizer with theirs")
    _require_sound(split, config)


def _texts_of(split: "Split", config: DataConfig) -> Iterator[str]:
    from lwm.data.draws import Order

    order = Order(first=split.first, count=split.count, shuffle=config.shuffle, seed=config.seed)
    for place in range(split.count):
        try:
            record = split.source.read(order[place])
        except Broken:
            continue
        if record is not None and not isinstance(record, Example):
            yield from _texts(record, config)


def _texts(record: Any, config: DataConfig) -> Iterator[str]:
    if config.messages:
        messages = record.get(config.messages)
        parts = messages if isinstance(messages, list) else []
        values = [text_content(part.get("content")) for part in parts if isinstance(part, dict)]
    elif config.fields_from_example:  # whatever text it has beside its grammar
        values = [value for key, value in record.items() if key != config.fields_from_example]
    else:
        from lwm.data.fields import parse_fields

        fields = [item for item in parse_fields(config.fields) if not item.special]
        values = [record.get(key) for item in fields for key in item.keys if not is_vision(key)]
    yield from (value for value in values if isinstance(value, str) and value)


def _open_split(
    config: DataConfig,
    split: Part,
    encode: FieldsEncoder | ConversationEncoder,
    before: int,
    vocab_size: int | None,
    vision: VisionVocabulary | None,
) -> tuple["Split", int]:
    """A data set's split, and the examples of the whole set."""
    from lwm.data.draws import Split

    source = open_source(config.path, config.format)
    first, count = _bounds(config, len(source), split)
    opened = Split(
        source=source,
        first=first,
        count=count,
        encode=encode,
        before=before,
        text_vocab=vocab_size,
        vision=vision,
    )
    return opened, len(source)


def _encoder(
    config: DataConfig, tokenizer: Tokenizer, vision: VisionVocabulary | None
) -> FieldsEncoder | ConversationEncoder:
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
        vision=vision,
        max_frames=config.max_frames,
    )


def _bounds(config: DataConfig, total: int, split: Part) -> tuple[int, int]:
    """First example and number of examples of a split."""
    held = round(total * config.held_out)
    if split == "evaluation" and not held:
        raise InputError(
            f"held_out is {config.held_out:g} of {total} examples, which keeps none for "
            "evaluation; raise --data.held-out, give more examples, or do without with "
            "--data.held-out 0 --evaluate-every 0"
        )
    if split == "train" and held == total:
        raise InputError(
            f"held_out is {config.held_out:g} of {total} examples, which leaves none to train on; "
            "lower --data.held-out, or give more examples"
        )
    return (total - held, held) if split == "evaluation" else (0, total - held)


def _making(config: DataConfig) -> str:
    """What examples are made from, as the settings say it."""
    if config.messages:
        return f"messages {config.messages}"
    key = config.fields_from_example
    return f"those of the key {key}" if key else config.fields


def _require_sound(split: "Split", config: DataConfig) -> Example:
    """Refuses data of which not even the beginning can be used.

    Returns:
        The first sound example.
    """
    _require_no_fields(split, config)
    faults: list[Report] = []
    remedy = "--data.messages" if config.messages else "--data.fields"
    for index in range(split.first, split.first + split.count):
        try:
            example = split.example(index)
        except MissingKey as broken:
            raise InputError(f"{split.report(index, broken)}; name others in {remedy}") from broken
        except Broken as broken:
            faults.append(split.report(index, broken))
            if len(faults) == _PROBED:
                break
            continue
        if example is not None:
            return example
    if faults:
        raise InputError(
            f"none of the first {len(faults)} examples can be used, the first of them "
            f"{faults[0]}; repair the data, or name other keys in {remedy}"
        )
    raise InputError(f"{config.path} holds empty examples alone; give one that is not")


def _require_no_fields(split: "Split", config: DataConfig) -> None:
    """Refuses fields where there are none. Those that a recipe may name are passed over."""
    if config.fields == type(config).fields or config.messages or config.fields_from_example:
        return
    for index in (0, len(split.source) - 1):  # files of several kinds may stand together
        try:
            if not isinstance(split.source.read(index), Example):
                return
        except Broken:
            return
    raise InputError(
        f"the fields are {config.fields!r} and {config.path} holds tokens, which have none; leave "
        "out --data.fields, or give the texts"
    )


def _divisor(rows: int, workers: int) -> int:
    """The most workers, not above the setting, that can share the rows out evenly."""
    return next((n for n in range(min(rows, workers), 0, -1) if rows % n == 0), 0)
