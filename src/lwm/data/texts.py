"""Read the texts of a data set, for training a tokenizer."""

from collections.abc import Iterator
from typing import Any

from lwm.core.errors import InputError
from lwm.data.config import DataConfig
from lwm.data.examples.examples import Broken, Example
from lwm.data.examples.fields import is_vision, parse_fields
from lwm.data.rows.draws import Order, Split
from lwm.data.splits import first_usable, open_split
from lwm.data.text.templates import text_content
from lwm.data.text.tokenizer import LEAST_VOCABULARY, train_tokenizer
from lwm.models.vision_tokens import VisionVocabulary


def training_texts(config: DataConfig, vision: VisionVocabulary | None = None) -> Iterator[str]:
    """Return the texts of the training split in the order of its first pass.

    Several data sets take turns. Broken examples are skipped. The data is opened and its beginning
    checked before this returns.

    Args:
        vision: the model's vision vocabulary; None for a text model.

    Raises:
        InputError: the data is missing or empty, lacks a field, or holds tokens instead of texts.
    """
    # Any tokenizer reveals the faults that the one to be trained would reveal later.
    probe = train_tokenizer(["a"], LEAST_VOCABULARY)
    iterators = []
    for _, settings in config.sets().values():
        split, _ = open_split(settings, probe, "train", vision=vision)
        _require_texts(split, settings)
        iterators.append(_texts_of(split, settings))
    return _in_turn(iterators)


def _in_turn(iterators: list[Iterator[str]]) -> Iterator[str]:
    while iterators:
        iterator = iterators.pop(0)
        if (text := next(iterator, None)) is not None:
            yield text
            iterators.append(iterator)


def _require_texts(split: Split, config: DataConfig) -> None:
    try:
        first = split.source.read(split.first)
    except Broken:
        first = None
    if isinstance(first, Example):
        raise InputError(f"{config.path} holds tokens, not texts; give their --tokenizer")
    first_usable(split, config)


def _texts_of(split: Split, config: DataConfig) -> Iterator[str]:
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
    elif config.fields_from_example:  # any text except the grammar
        values = [value for key, value in record.items() if key != config.fields_from_example]
    else:
        fields = [item for item in parse_fields(config.fields) if not item.special]
        values = [record.get(key) for item in fields for key in item.keys if not is_vision(key)]
    yield from (value for value in values if isinstance(value, str) and value)
