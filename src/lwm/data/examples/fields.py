"""Encode records by the fields grammar: the keys that become tokens, their order, their loss.

    fields    = field { "," field }
    field     = "[" parts "]" | parts          brackets: no loss
    parts     = "<|bos|>" | "<|eos|>" | key { "+" key }

Keys joined by `+` are joined as text by a separator and then tokenized together. A key that
contains `vision` holds a flat list of the codes of whole frames; it becomes `<vision>`, the codes
with an end token after each frame, `</vision>`. There is no separator next to vision.

Source of the grammar: the text processors of LargeWorldModel/LWM, implemented independently.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import dropwhile
from typing import Any, NamedTuple

import numpy as np

from lwm.core.errors import ConfigError, InputError
from lwm.data.examples.examples import NO_VISION, Broken, Example, MissingKey, TooLong
from lwm.data.text.long_texts import encode_parts
from lwm.data.text.tokenizer import Tokenizer
from lwm.models.vision_tokens import VisionVocabulary

BOS, EOS = "<|bos|>", "<|eos|>"


class Field(NamedTuple):
    """Hold one field: keys whose texts are tokenized together, or a special token without keys."""

    keys: tuple[str, ...]
    loss: bool
    special: str | None = None


def is_vision(key: str) -> bool:
    """Return whether a key holds vision codes."""
    return "vision" in key


@lru_cache(maxsize=4096)  # examples may hold a grammar, mostly one of a few
def parse_fields(text: str) -> tuple[Field, ...]:
    """Parse the grammar; raise ConfigError if it is malformed."""
    return tuple(_parse_field(part.strip(), text) for part in text.split(","))


def _parse_field(part: str, text: str) -> Field:
    bracketed = part.startswith("[") and part.endswith("]")
    inner = part[1:-1] if bracketed else part
    keys = tuple(key.strip() for key in inner.split("+"))
    if not all(keys):
        raise ConfigError(f"the fields {text!r} have an empty field; write '[question],answer'")
    if any(mark in inner for mark in "[]"):
        raise ConfigError(
            f"the fields {text!r} have brackets inside {part!r}; brackets enclose one whole "
            "field, as in '[context],[question+hint],answer'"
        )
    if BOS in keys or EOS in keys:
        if len(keys) > 1:
            raise ConfigError(
                f"the fields {text!r} join a special token with '+'; separate it by a comma"
            )
        return Field((), not bracketed, special=inner.strip())
    return Field(keys, not bracketed)


_Piece = tuple[list[int], bool, bool]  # tokens, whether they carry loss, whether they are vision


@dataclass(frozen=True, kw_only=True)
class FieldsEncoder:
    """Encode records as examples by the grammar.

    Args:
        fields: the grammar; unused if `fields_from_example` names a key that holds it.
        fields_index: index of an example's grammar if it holds several; -1 chooses by its line.
        prepend_text: text before the first field, with that field's loss.
        vision: the model's vision vocabulary; None for a text model.
        max_frames: most frames of a video, evenly spaced; 0 for all.
    """

    tokenizer: Tokenizer
    fields: str = "text"
    fields_from_example: str = ""
    fields_index: int = -1
    subfield_separator: str = " "
    prepend_text: str = ""
    add_bos: bool = True
    add_eos: bool = True
    vision: VisionVocabulary | None = None
    max_frames: int = 0

    def __post_init__(self) -> None:
        parsed = () if self.fields_from_example else parse_fields(self.fields)
        specials = {item.special for item in parsed}
        for name, added in ((BOS, self.add_bos), (EOS, self.add_eos)):
            if self._specials[name] is None and (added or name in specials):
                raise ConfigError(
                    "the tokenizer has no token that begins or ends a text; set add_bos and "
                    f"add_eos to false and omit {BOS} and {EOS} from the fields, or give another "
                    "tokenizer"
                )
        named = next((key for item in parsed for key in item.keys if is_vision(key)), None)
        if named and self.vision is None:
            raise ConfigError(
                f"the fields {self.fields!r} name {named!r}, which holds vision codes, but the "
                "model is a text model; use a vision recipe of 'lwm train --list', add vision to "
                "the model with 'lwm convert --add-vision', or omit the field"
            )

    @cached_property
    def _specials(self) -> dict[str, int | None]:
        eos = self.tokenizer.eos
        return {BOS: self.tokenizer.bos_id, EOS: eos[0] if eos else None}

    @cached_property
    def _markers(self) -> tuple[list[int], list[int]]:
        encode = self.tokenizer.encode_controlled
        return encode("<vision>"), encode("</vision>")

    def __call__(
        self, record: Mapping[str, Any], line: int, *, drop_prompt: bool = False
    ) -> Example | None:
        """Return the example, or None if all its texts are empty; raise `Broken`.

        Args:
            drop_prompt: omit all fields before the vision that carries loss, for classifier-free
                guidance. Examples whose text carries loss stay unchanged.
        """
        grammar, prefix = self._grammar(record, line), self.prepend_text
        learned = [key for item in grammar if item.loss for key in item.keys]
        dropped = drop_prompt and learned and all(map(is_vision, learned))
        if dropped:
            grammar = tuple(dropwhile(lambda item: not (item.keys and item.loss), grammar))
            prefix = ""
        pieces: list[_Piece] = []
        if self.add_bos or (dropped and self._specials[BOS] is not None):
            pieces.append((self._special(BOS), False, False))
        for item in grammar:
            pieces += self._field(record, item, prefix)
            prefix = ""
        if not any(is_vision(key) or record[key] for item in grammar for key in item.keys):
            return None
        if self.add_eos:
            pieces.append((self._special(EOS), True, False))
        lengths = [len(tokens) for tokens, _, _ in pieces]
        with_keys = [item for item in grammar if item.keys]
        return Example(
            tokens=np.array([token for tokens, _, _ in pieces for token in tokens], np.int32),
            weights=np.repeat(np.array([loss for _, loss, _ in pieces], np.float32), lengths),
            vision=np.repeat([vision for _, _, vision in pieces], lengths),
            plain=len(with_keys) == 1
            and with_keys[0].loss
            and not any(map(is_vision, with_keys[0].keys)),
        )

    def truncated(
        self, record: Mapping[str, Any], line: int, longest: int, *, drop_prompt: bool = False
    ) -> Example:
        """Return an example of at most `longest` tokens, without the beginning of its longest text
        that carries no loss; raise `TooLong` if that does not suffice, or if it has vision."""
        grammar = self._grammar(record, line)
        learned = {key for item in grammar if item.loss for key in item.keys}
        prompts = {key for item in grammar if not item.loss for key in item.keys} - learned
        example = self(record, line, drop_prompt=drop_prompt)
        if not prompts or example is None or example.vision.any():
            raise TooLong
        key = max(sorted(prompts), key=lambda key: len(record[key]))
        while (excess := len(example) - longest) > 0:
            record = {**record, key: text_end(self.tokenizer, record[key], excess)}
            example = self(record, line, drop_prompt=drop_prompt)
            if example is None or not record[key]:
                raise TooLong
        return replace(example, truncated=True)

    def _grammar(self, record: Mapping[str, Any], line: int) -> tuple[Field, ...]:
        if not self.fields_from_example:
            return parse_fields(self.fields)
        label = f"the key {self.fields_from_example!r}"
        fields = require_key(record, self.fields_from_example)
        if isinstance(fields, list) and fields:
            index, count = self.fields_index, len(fields)
            if index >= count:
                raise Broken(f"{label} has {count} alternatives, but fields_index is {index}")
            fields = fields[random.Random(line).randrange(count) if index < 0 else index]
        if not isinstance(fields, str):
            kind = json_type(fields)
            raise Broken(
                f"{label} holds {kind}, where a text of fields or a list of them is needed"
            )
        try:
            return parse_fields(fields)
        except ConfigError as error:
            raise Broken(str(error)) from error

    def _field(self, record: Mapping[str, Any], item: Field, prefix: str) -> Iterator[_Piece]:
        texts: list[str] = []
        for key in item.keys:
            value = require_key(record, key)
            if is_vision(key):
                text = prefix + self.subfield_separator.join(texts)
                yield self._encode(text), item.loss, False
                texts, prefix = [], ""
                before, after = self._markers
                yield before, item.loss, False
                yield self._vision_ids(key, value), item.loss, True
                yield after, item.loss, False
            elif isinstance(value, str):
                texts.append(value)
            else:
                raise Broken(f"the key {key!r} holds {json_type(value)}, where text is needed")
        yield self._encode(prefix + self.subfield_separator.join(texts)), item.loss, False
        if item.special:
            yield self._special(item.special), item.loss, False

    def _vision_ids(self, key: str, value: Any) -> list[int]:
        if self.vision is None:
            raise Broken(NO_VISION)
        frame, codebook = self.vision.codes_per_frame, self.vision.codes
        label = f"the key {key!r} holds"
        if not isinstance(value, list) or not all(type(code) is int for code in value):
            raise Broken(f"{label} {json_type(value)}, where a list of codes is needed")
        if not value or len(value) % frame:
            raise Broken(
                f"{label} {len(value)} codes, which is not a multiple of {frame}, the codes of a "
                "frame"
            )
        worst = min(value) if min(value) < 0 else max(value)
        if not 0 <= worst < codebook:
            raise Broken(
                f"{label} the code {worst}, outside 0 to {codebook - 1}, the model's codebook"
            )
        codes = np.array(value, np.int32).reshape(-1, frame)
        if 0 < self.max_frames < len(codes):
            codes = codes[np.linspace(0, len(codes) - 1, self.max_frames).astype(int)]
        return self.vision.interleave(codes).tolist()

    def _encode(self, text: str) -> list[int]:
        return encode_text(self.tokenizer, text) if text else []

    def _special(self, name: str) -> list[int]:
        token = self._specials[name]
        if token is None:
            raise Broken(f"its fields need {name}, which the tokenizer does not have")
        return [token]


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of plain text; raise `Broken` if it is not valid Unicode."""
    try:
        return tokenizer.encode(text, specials=False)
    except InputError as error:
        raise Broken(str(error)) from error


def text_end(tokenizer: Tokenizer, text: str, excess: int) -> str:
    """Return a text without its first `excess` tokens; nothing if only blanks are left."""
    starts = [start for part in encode_parts(tokenizer.backend, text) for start in part.starts]
    end = text[next((start for start in starts[excess:] if start), len(text)) :]
    return end if end.strip() else ""


def require_key(record: Mapping[str, Any], key: str) -> Any:
    """Return the value of a key; raise `MissingKey` with the keys of the record."""
    if key not in record:
        present = ", ".join(sorted(map(str, record))[:20]) or "none"
        raise MissingKey(f"it has no key {key!r} (its keys: {present})")
    return record[key]


_JSON_TYPES = {
    type(None): "null",
    str: "text",
    dict: "an object",
    list: "a list",
    bool: "true or false",
    int: "a number",
    float: "a number",
}


def json_type(value: Any) -> str:
    """Name the JSON type of a value, for error messages."""
    return _JSON_TYPES.get(type(value), f"a {type(value).__name__}")
