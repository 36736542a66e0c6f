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
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import dropwhile
from typing import Any

import numpy as np

from lwm.core.errors import ConfigError
from lwm.data.examples.examples import NO_VISION, Broken, Example, MissingKey
from lwm.data.text.tokenizer import Tokenizer
from lwm.models.vision_tokens import VisionVocabulary

BOS, EOS = "<|bos|>", "<|eos|>"


@dataclass(frozen=True, kw_only=True)
class Field:
    """Hold one field: a special token, or keys whose texts are tokenized together."""

    keys: tuple[str, ...]
    loss: bool

    @property
    def special(self) -> str | None:
        """Return the special token that the field is, if it is one."""
        return self.keys[0] if self.keys[0] in (BOS, EOS) else None


def is_vision(key: str) -> bool:
    """Return whether a key holds vision codes."""
    return "vision" in key


@lru_cache(maxsize=4096)  # examples may hold a grammar, mostly one of a few
def parse_fields(text: str) -> tuple[Field, ...]:
    """Parse the grammar.

    Raises:
        ConfigError: the grammar is malformed.
    """
    return tuple(_parse_field(part.strip(), text) for part in text.split(","))


def _parse_field(part: str, text: str) -> Field:
    bracketed = part.startswith("[") and part.endswith("]")
    inner = part[1:-1] if bracketed else part
    keys = tuple(key.strip() for key in inner.split("+"))
    if not all(keys):
        raise ConfigError(
            f"the fields {text!r} have an empty field; write keys of the examples such as "
            "'[question],answer'"
        )
    if any(mark in inner for mark in "[]"):
        raise ConfigError(
            f"the fields {text!r} have brackets inside {part!r}; brackets enclose one whole "
            "field, as in '[context],[question+hint],answer'"
        )
    if len(keys) > 1 and (BOS in keys or EOS in keys):
        raise ConfigError(
            f"the fields {text!r} join a special token with '+'; separate it by a comma"
        )
    return Field(keys=keys, loss=not bracketed)


@dataclass(frozen=True, kw_only=True)
class FieldsEncoder:
    """Encode records as examples by the grammar.

    Args:
        fields: the grammar; unused if `fields_from_example` names a key that holds it.
        fields_index: index of an example's grammar if it holds several; -1 chooses by its line.
        prepend_text: text before the first field, with that field's loss.
        vision: the model's vision vocabulary; None for a text model.
        max_frames: most frames of a video, evenly spaced; 0 for all.

    Raises:
        ConfigError: the grammar is malformed, needs a token that the tokenizer lacks, or names
            vision codes for a text model.
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
    _markers: tuple[list[int], list[int]] = field(init=False, repr=False, default=([], []))

    def __post_init__(self) -> None:
        needed = {self.bos: self.add_bos, self.eos: self.add_eos}
        parsed = () if self.fields_from_example else parse_fields(self.fields)
        for special in (item.special for item in parsed):
            needed |= {self.bos: True} if special == BOS else {}
            needed |= {self.eos: True} if special == EOS else {}
        if needed.get(None):
            raise ConfigError(
                "the tokenizer has no token that begins or ends a text; set add_bos and add_eos "
                f"to false and omit {BOS} and {EOS} from the fields, or give another tokenizer"
            )
        named = next((key for item in parsed for key in item.keys if is_vision(key)), None)
        if named and self.vision is None:
            raise ConfigError(
                f"the fields {self.fields!r} name {named!r}, which holds vision codes, but the "
                "model is a text model; use a vision recipe of 'lwm train --list', add vision to "
                "the model with 'lwm convert --add-vision', or omit the field"
            )
        markers = (self._encode("<vision>"), self._encode("</vision>"))
        object.__setattr__(self, "_markers", markers)

    @property
    def bos(self) -> int | None:
        return self.tokenizer.bos_id

    @property
    def eos(self) -> int | None:
        return self.tokenizer.eos[0] if self.tokenizer.eos else None

    def __call__(
        self, record: Mapping[str, Any], line: int, *, drop_prompt: bool = False
    ) -> Example | None:
        """Return the example, or None if all its texts are empty.

        Args:
            drop_prompt: omit all fields before the vision that carries loss, for classifier-free
                guidance. Examples whose text carries loss stay unchanged.

        Raises:
            Broken: a key is missing or has a value of the wrong type.
        """
        grammar = self._grammar(record, line)
        pieces = _Pieces()
        dropped = drop_prompt and _only_vision_has_loss(grammar)
        if dropped:
            grammar = tuple(dropwhile(lambda item: not (item.loss and not item.special), grammar))
        if self.add_bos or (dropped and self.bos is not None):
            pieces.add([self._special(BOS)], 0.0)
        written = False
        for number, item in enumerate(grammar):
            weight = float(item.loss)
            prefix = self.prepend_text if number == 0 and not dropped else ""
            if item.special:
                pieces.add(self._encode(prefix), weight)
                pieces.add([self._special(item.special)], weight)
                continue
            written |= self._add_parts(pieces, record, item, prefix)
        if not written:
            return None
        if self.add_eos:
            pieces.add([self._special(EOS)], 1.0)
        return pieces.example()

    def _grammar(self, record: Mapping[str, Any], line: int) -> tuple[Field, ...]:
        if not self.fields_from_example:
            return parse_fields(self.fields)
        fields = require_key(record, self.fields_from_example)
        if isinstance(fields, list) and fields:
            if self.fields_index >= len(fields):
                raise Broken(
                    f"the key {self.fields_from_example!r} has {len(fields)} alternatives, but "
                    f"fields_index is {self.fields_index}"
                )
            chosen = self.fields_index
            if chosen < 0:
                chosen = random.Random(line).randrange(len(fields))
            fields = fields[chosen]
        if not isinstance(fields, str):
            raise Broken(
                f"the key {self.fields_from_example!r} holds {json_type(fields)}, where a text of "
                "fields or a list of such texts is needed"
            )
        try:
            return parse_fields(fields)
        except ConfigError as error:
            raise Broken(str(error)) from error

    def _add_parts(
        self, pieces: "_Pieces", record: Mapping[str, Any], item: Field, prefix: str
    ) -> bool:
        """Add a field, and return whether it has content."""
        weight, texts, filled = float(item.loss), [], False
        for key in item.keys:
            value = require_key(record, key)
            if is_vision(key):
                text = prefix + self.subfield_separator.join(texts)
                pieces.add(self._encode(text), weight)
                texts, prefix = [], ""
                self._add_vision(pieces, key, value, weight)
                filled = True
                continue
            if not isinstance(value, str):
                raise Broken(f"the key {key!r} holds {json_type(value)}, where text is needed")
            texts.append(value)
            filled |= bool(value)
        pieces.add(self._encode(prefix + self.subfield_separator.join(texts)), weight)
        return filled

    def _add_vision(self, pieces: "_Pieces", key: str, value: Any, weight: float) -> None:
        if self.vision is None:
            raise Broken(NO_VISION)
        codes = _codes(key, value, self.vision)
        if 0 < self.max_frames < len(codes):
            codes = codes[np.linspace(0, len(codes) - 1, self.max_frames).astype(int)]
        before, after = self._markers
        pieces.add(before, weight)
        pieces.add(self.vision.interleave(codes).tolist(), weight, vision=True)
        pieces.add(after, weight)

    def _encode(self, text: str) -> list[int]:
        return encode_text(self.tokenizer, text) if text else []

    def _special(self, name: str) -> int:
        token = self.bos if name == BOS else self.eos
        if token is None:
            raise Broken(f"its fields need {name}, which the tokenizer does not have")
        return token


class _Pieces:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.weights: list[float] = []
        self.vision: list[bool] = []

    def add(self, tokens: list[int], weight: float, *, vision: bool = False) -> None:
        self.tokens += tokens
        self.weights += [weight] * len(tokens)
        self.vision += [vision] * len(tokens)

    def example(self) -> Example:
        return Example(
            tokens=np.array(self.tokens, np.int32),
            weights=np.array(self.weights, np.float32),
            vision=np.array(self.vision, bool),
        )


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a text without special tokens.

    Raises:
        Broken: the text holds half a surrogate pair, which JSON allows.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Broken("its text holds half of a surrogate pair, which is no character") from error
    return tokenizer.encode(text, specials=False)


def require_key(record: Mapping[str, Any], key: str) -> Any:
    """Return the value of a key; raise `MissingKey` with the keys of the record."""
    if key not in record:
        present = ", ".join(sorted(map(str, record))[:20]) or "none"
        raise MissingKey(f"it has no key {key!r} (its keys: {present})")
    return record[key]


def _only_vision_has_loss(grammar: tuple[Field, ...]) -> bool:
    with_loss = [item for item in grammar if item.loss and not item.special]
    return bool(with_loss) and all(is_vision(key) for item in with_loss for key in item.keys)


def _codes(key: str, value: Any, vision: VisionVocabulary) -> np.ndarray:
    frame, codebook = vision.codes_per_frame, vision.codes
    whole = isinstance(value, list) and all(type(code) is int for code in value)
    if not whole:
        raise Broken(f"the key {key!r} holds {json_type(value)}, where a list of codes is needed")
    if not value or len(value) % frame:
        raise Broken(
            f"the key {key!r} holds {len(value)} codes, which is no multiple of {frame}, the "
            "codes of a frame"
        )
    if min(value) < 0 or max(value) >= codebook:
        worst = min(value) if min(value) < 0 else max(value)
        raise Broken(
            f"the key {key!r} holds the code {worst}, outside 0 to {codebook - 1}, the model's "
            "codebook"
        )
    return np.array(value, np.int32).reshape(-1, frame)


def json_type(value: Any) -> str:
    """Name the JSON type of a value, for error messages."""
    names = {
        "NoneType": "null",
        "str": "text",
        "dict": "an object",
        "list": "a list",
        "bool": "true or false",
        "int": "a number",
        "float": "a number",
    }
    return names.get(type(value).__name__, f"a {type(value).__name__}")
