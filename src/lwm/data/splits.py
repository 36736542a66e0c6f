"""Open the data sets that the settings name, and read their texts to train a tokenizer on.

Data whose beginning cannot be used is refused.
"""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, Literal

from lwm.core.errors import InputError
from lwm.data.config import DataConfig
from lwm.data.examples.conversations import ConversationEncoder
from lwm.data.examples.examples import Broken, Example, MissingKey, Report, TooLong
from lwm.data.examples.fields import FieldsEncoder, is_vision, parse_fields
from lwm.data.rows.draws import Order, Split
from lwm.data.sources.opening import open_records
from lwm.data.sources.source import Record
from lwm.data.text.templates import text_content
from lwm.data.text.tokenizer import LEAST_VOCABULARY, Tokenizer, train_tokenizer
from lwm.models.vision_tokens import VisionVocabulary

SplitName = Literal["train", "evaluation"]

_PROBED_LONG = 10_000  # the same for examples that are too long
_PROBED = 100  # broken examples at the beginning after which the data as a whole is refused


def open_mixture(
    config: DataConfig,
    tokenizer: Tokenizer,
    part: SplitName,
    *,
    streams: int = 1,
    text_vocab: int | None = None,
    vision: VisionVocabulary | None = None,
    longest: int | None = None,
) -> list[tuple[Split, Example]]:
    """Open a part of every data set, and read the first usable example of each.

    Args:
        streams: rows of the global batch.
        text_vocab: text ids of the model; not checked if None.
        longest: most tokens of an example that is not a plain text; None for any number.
    """
    tokenizer = replace(tokenizer, limit=text_vocab)
    opened: list[tuple[Split, Example]] = []
    before = 0
    for name, (_, settings) in config.sets().items():
        encode = _encoder(settings, tokenizer, vision)
        source = open_records(settings.path, settings.format)
        numbers = _numbers(settings, len(source), part)
        order = Order(
            first=numbers.start,
            count=len(numbers),
            shuffle=config.shuffle,
            seed=config.seed,
            streams=streams,
        )
        split = Split(
            source=source,
            order=order,
            encode=encode,
            name=name,
            before=before,
            text_vocab=text_vocab,
            vision=vision,
            longest=longest,
            too_long=config.too_long,
        )
        opened.append((split, _first_usable(split, settings)))
        before += len(source)
    return opened


def _numbers(config: DataConfig, total: int, part: SplitName) -> range:
    held_out = round(total * config.held_out)
    share = f"held_out is {config.held_out:g} of {total} examples, which"
    if part == "evaluation" and not held_out:
        raise InputError(
            f"{share} reserves none for evaluation; raise --data.held-out, give more examples, or "
            "turn evaluation off with --data.held-out 0 --evaluate-every 0"
        )
    if part == "train" and held_out == total:
        raise InputError(
            f"{share} leaves none to train on; lower --data.held-out, or give more examples"
        )
    return range(total)[total - held_out :] if part == "evaluation" else range(total - held_out)


def _encoder(
    config: DataConfig, tokenizer: Tokenizer, vision: VisionVocabulary | None
) -> FieldsEncoder | ConversationEncoder:
    if config.messages:
        return ConversationEncoder(
            tokenizer=tokenizer, key=config.messages, template=config.template
        )
    names = {field.name for field in fields(FieldsEncoder)} & {
        field.name for field in fields(config)
    }
    settings = {name: getattr(config, name) for name in names}
    return FieldsEncoder(tokenizer=tokenizer, vision=vision, **settings)


def _first_usable(split: Split, config: DataConfig) -> Example:
    _refuse_fields_of_tokens(split, config)
    faults: list[Report] = []
    too_long = 0
    remedy = "--data.messages" if config.messages else "--data.fields"
    first = split.order.first
    for index in range(first, first + split.order.count):
        try:
            if (example := split.example(index)) is not None:
                return example
        except Broken as broken:
            faults.append(split.report(index, broken))
            if isinstance(broken, MissingKey):
                raise InputError(f"{faults[-1]}; name other keys with {remedy}") from broken
            if len(faults) == _PROBED:
                break
        except TooLong:
            too_long += 1
            if too_long == _PROBED_LONG:
                break
    if too_long and split.longest:
        raise InputError(
            f"the first {too_long:,} examples of {config.path} that can be read are all longer "
            f"than a row of {split.longest - 1:,} tokens and are skipped; raise --sequence-length"
        )
    if faults:
        raise InputError(
            f"none of the first {len(faults)} examples can be used, the first of them "
            f"{faults[0]}; repair the data, or name other keys with {remedy}"
        )
    raise InputError(f"{config.path} holds only empty examples; give data with text")


def _refuse_fields_of_tokens(split: Split, config: DataConfig) -> None:
    """Refuse fields for data that consists of tokens; the default fields may stay."""
    if config.fields == type(config).fields or config.messages or config.fields_from_example:
        return
    for index in (0, len(split.source) - 1):  # one path may name files of several formats
        try:
            if not isinstance(split.source.read(index), Example):
                return
        except Broken:
            return
    raise InputError(
        f"the fields are {config.fields!r} and {config.path} holds tokens, which have none; omit "
        "--data.fields, or give the texts"
    )


def training_texts(config: DataConfig, vision: VisionVocabulary | None = None) -> Iterator[str]:
    """Return the texts of the training split in the order of its first pass.

    Several data sets take turns. Broken examples are skipped. The data is opened and its beginning
    checked before this returns.

    Args:
        vision: the model's vision vocabulary; None for a text model.
    """
    # Any tokenizer reveals the faults that the one to be trained would reveal later.
    probe = train_tokenizer(["a"], LEAST_VOCABULARY)
    iterators = []
    for split, _ in open_mixture(config, probe, "train", vision=vision):
        settings = config.sets()[split.name][1]
        if isinstance(_read(split, split.order.first), Example):
            raise InputError(f"{settings.path} holds tokens, not texts; give their --tokenizer")
        iterators.append(_texts_of(split, settings))
    return _in_turn(iterators)


def _in_turn(iterators: list[Iterator[str]]) -> Iterator[str]:
    while iterators:
        iterator = iterators.pop(0)
        if (text := next(iterator, None)) is not None:
            yield text
            iterators.append(iterator)


def _read(split: Split, index: int) -> Record | None:
    try:
        return split.source.read(index)
    except Broken:
        return None


def _texts_of(split: Split, config: DataConfig) -> Iterator[str]:
    for place in range(split.order.count):
        record = _read(split, split.order[place])
        if record is not None and not isinstance(record, Example):
            yield from (text for text in _values(record, config) if isinstance(text, str) and text)


def _values(record: Any, config: DataConfig) -> list[Any]:
    if config.messages:
        messages = record.get(config.messages)
        parts = messages if isinstance(messages, list) else []
        return [text_content(part.get("content")) for part in parts if isinstance(part, dict)]
    if config.fields_from_example:  # any text except the grammar
        return [value for key, value in record.items() if key != config.fields_from_example]
    keys = [key for item in parse_fields(config.fields) for key in item.keys]
    return [record.get(key) for key in keys if not is_vision(key)]
