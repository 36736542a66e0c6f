"""A data set as settings name it: opened, parted, and refused where not even its beginning can be
used.

Knows sources and encoders by name; knows nothing of rows.
"""

from typing import Literal

from lwm.core.errors import InputError
from lwm.data.config import DataConfig
from lwm.data.examples.conversations import ConversationEncoder
from lwm.data.examples.examples import Broken, Example, MissingKey, Report
from lwm.data.examples.fields import FieldsEncoder
from lwm.data.rows.draws import Split
from lwm.data.sources.opening import open_records
from lwm.data.text.tokenizer import Tokenizer
from lwm.models.vision_tokens import VisionVocabulary

Part = Literal["train", "evaluation"]

_PROBED = 100  # broken examples at the beginning before the data as a whole is refused


def open_split(
    config: DataConfig,
    split: Part,
    encode: FieldsEncoder | ConversationEncoder,
    before: int,
    vocab_size: int | None,
    vision: VisionVocabulary | None,
) -> tuple[Split, int]:
    """A data set's split, and the examples of the whole set."""
    source = open_records(config.path, config.format)
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


def encoder_of(
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


def making(config: DataConfig) -> str:
    """What examples are made from, as the settings say it."""
    if config.messages:
        return f"messages {config.messages}"
    key = config.fields_from_example
    return f"those of the key {key}" if key else config.fields


def require_sound(split: Split, config: DataConfig) -> Example:
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


def _require_no_fields(split: Split, config: DataConfig) -> None:
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
