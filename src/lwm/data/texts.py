"""The texts of a data set, which a tokenizer is trained on.

Knows splits and the shapes of examples; knows nothing of tokens.
"""

from collections.abc import Iterator
from typing import Any

from lwm.core.errors import InputError
from lwm.data.config import DataConfig
from lwm.data.examples.examples import Broken, Example
from lwm.data.examples.fields import is_vision, parse_fields
from lwm.data.rows.draws import Order, Split
from lwm.data.splits import encoder_of, open_split, require_sound
from lwm.data.text.templates import text_content
from lwm.data.text.tokenizer_train import LEAST_VOCABULARY, train_tokenizer
from lwm.models.vision_tokens import VisionVocabulary


def training_texts(config: DataConfig, vision: VisionVocabulary | None = None) -> Iterator[str]:
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
        split, _ = open_split(own, "train", encoder_of(own, plain, vision), 0, None, vision)
        _require_texts(split, own)
        waiting.append(_texts_of(split, own))
    return _in_turn(waiting)


def _in_turn(waiting: list[Iterator[str]]) -> Iterator[str]:
    while waiting:
        one = waiting.pop(0)
        if (text := next(one, None)) is not None:
            yield text
            waiting.append(one)


def _require_texts(split: Split, config: DataConfig) -> None:
    try:
        first = split.source.read(split.first)
    except Broken:
        first = None
    if isinstance(first, Example):
        raise InputError(f"{config.path} holds tokens, not texts; give --tokenizer with theirs")
    require_sound(split, config)


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
    elif config.fields_from_example:  # whatever text it has beside its grammar
        values = [value for key, value in record.items() if key != config.fields_from_example]
    else:
        fields = [item for item in parse_fields(config.fields) if not item.special]
        values = [record.get(key) for item in fields for key in item.keys if not is_vision(key)]
    yield from (value for value in values if isinstance(value, str) and value)
