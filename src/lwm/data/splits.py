"""Open the data sets that the settings name, and refuse data whose beginning cannot be used."""

from dataclasses import dataclass
from typing import Literal

from lwm.core.errors import InputError
from lwm.data.config import DataConfig
from lwm.data.examples.conversations import ConversationEncoder
from lwm.data.examples.examples import Broken, Example, MissingKey, Report
from lwm.data.examples.fields import FieldsEncoder
from lwm.data.rows.draws import Encode, Order, Split
from lwm.data.sources.opening import open_records
from lwm.data.text.tokenizer import Tokenizer
from lwm.models.vision_tokens import VisionVocabulary

Part = Literal["train", "evaluation"]

_PROBED = 100  # broken examples at the beginning after which the data as a whole is refused


@dataclass(frozen=True, kw_only=True)
class OpenDataSet:
    """Hold one data set of a mixture, opened and checked.

    Args:
        first: the first usable example.
        total: examples of the whole data set.
    """

    split: Split
    order: Order
    first: Example
    total: int


def open_mixture(
    config: DataConfig,
    tokenizer: Tokenizer,
    part: Part,
    *,
    streams: int,
    text_vocab: int | None,
    vision: VisionVocabulary | None,
) -> list[OpenDataSet]:
    """Open every data set and read the first usable example of each.

    Args:
        streams: rows of the global batch.
        text_vocab: text ids of the model; not checked if None.

    Raises:
        ConfigError: settings contradict each other or the tokenizer.
        InputError: a data set is missing, empty or broken, or lacks a field.
    """
    opened: list[OpenDataSet] = []
    for name, (_, settings) in config.sets().items():
        split, total = open_split(
            settings,
            tokenizer,
            part,
            name=name,
            before=sum(other.total for other in opened),
            text_vocab=text_vocab,
            vision=vision,
        )
        order = Order(
            first=split.first,
            count=split.count,
            shuffle=config.shuffle,
            seed=config.seed,
            streams=streams,
        )
        first = first_usable(split, settings)
        opened.append(OpenDataSet(split=split, order=order, first=first, total=total))
    return opened


def open_split(
    config: DataConfig,
    tokenizer: Tokenizer,
    part: Part,
    *,
    name: str = "",
    before: int = 0,
    text_vocab: int | None = None,
    vision: VisionVocabulary | None = None,
) -> tuple[Split, int]:
    """Return a part of one data set, and the number of examples of the whole set.

    Raises:
        ConfigError: settings contradict the tokenizer or the model.
        InputError: the data is missing or empty, or the part has no examples.
    """
    encode = _encoder(config, tokenizer, vision)
    source = open_records(config.path, config.format)
    total = len(source)
    held_out = round(total * config.held_out)
    if part == "evaluation" and not held_out:
        raise InputError(
            f"held_out is {config.held_out:g} of {total} examples, which reserves none for "
            "evaluation; raise --data.held-out, give more examples, or turn evaluation off with "
            "--data.held-out 0 --evaluate-every 0"
        )
    if part == "train" and held_out == total:
        raise InputError(
            f"held_out is {config.held_out:g} of {total} examples, which leaves none to train on; "
            "lower --data.held-out, or give more examples"
        )
    split = Split(
        source=source,
        first=total - held_out if part == "evaluation" else 0,
        count=held_out if part == "evaluation" else total - held_out,
        encode=encode,
        name=name,
        before=before,
        text_vocab=text_vocab,
        vision=vision,
    )
    return split, total


def _encoder(config: DataConfig, tokenizer: Tokenizer, vision: VisionVocabulary | None) -> Encode:
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


def first_usable(split: Split, config: DataConfig) -> Example:
    """Return the first usable example.

    Raises:
        InputError: the first examples are all broken, or lack a field.
    """
    _refuse_fields_of_tokens(split, config)
    faults: list[Report] = []
    remedy = "--data.messages" if config.messages else "--data.fields"
    for index in range(split.first, split.first + split.count):
        try:
            example = split.example(index)
        except MissingKey as broken:
            raise InputError(
                f"{split.report(index, broken)}; name other keys with {remedy}"
            ) from broken
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
