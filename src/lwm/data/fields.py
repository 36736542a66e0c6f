"""The fields grammar: which keys of an example become tokens, in what order, and which are learnt.

    fields    = field { "," field }
    field     = "[" parts "]" | parts          brackets: no loss
    parts     = "<|bos|>" | "<|eos|>" | key { "+" key }

Keys joined by `+` are joined as text by a separator and then tokenised together. A key that
contains `vision` holds a flat list of codes, 256 a frame; it becomes `<vision>`, the codes with an
end token after each frame, `</vision>`. Beside vision no separator is put: codes are no text.

Knows examples as mappings; knows nothing of files or rows. Source of the grammar: the original's
text processors (LargeWorldModel/LWM), of which this is a fresh statement.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from lwm.core.errors import ConfigError
from lwm.data.examples import Broken, Example, MissingKey
from lwm.data.tokenizer import Tokenizer

BOS, EOS = "<|bos|>", "<|eos|>"
CODES_PER_FRAME = 256
CODEBOOK = 8192
END_OF_FRAME, END_OF_VISION = 8192, 8193


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field: a special token, or keys whose texts are tokenised together."""

    keys: tuple[str, ...]
    learnt: bool

    @property
    def special(self) -> str | None:
        return self.keys[0] if self.keys[0] in (BOS, EOS) else None


def is_vision(key: str) -> bool:
    return "vision" in key


@lru_cache(maxsize=4096)  # examples may bring their own grammar, mostly the same few
def parse_fields(text: str) -> tuple[Field, ...]:
    """Reads the grammar.

    Raises:
        ConfigError: a field is empty, brackets are not round one field, or a special token is
            joined with keys.
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
            f"the fields {text!r} have brackets inside {part!r}; brackets go round one whole "
            "field, as in '[context],[question+hint],answer'"
        )
    if len(keys) > 1 and (BOS in keys or EOS in keys):
        raise ConfigError(
            f"the fields {text!r} join a special token with '+'; separate it by a comma"
        )
    return Field(keys=keys, learnt=not bracketed)


@dataclass(frozen=True, kw_only=True)
class FieldsEncoder:
    """Turns a mapping into an example by the grammar.

    Args:
        fields: the grammar; unused where `fields_from_example` names a key that holds it.
        fields_index: which of several grammars that an example holds; -1 draws one by its line.
        prepend_text: stands before the first field, and is learnt if that is.

    Raises:
        ConfigError: the grammar is malformed, or needs a token that the tokenizer lacks.
    """

    tokenizer: Tokenizer
    fields: str = "text"
    fields_from_example: str = ""
    fields_index: int = -1
    subfield_separator: str = " "
    prepend_text: str = ""
    add_bos: bool = True
    add_eos: bool = True
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
                f"to false and leave {BOS} and {EOS} out of the fields, or give another tokenizer"
            )
        markers = (self._encode("<vision>"), self._encode("</vision>"))
        object.__setattr__(self, "_markers", markers)

    @property
    def bos(self) -> int | None:
        return self.tokenizer.backend.token_to_id(self.tokenizer.bos or "")

    @property
    def eos(self) -> int | None:
        return self.tokenizer.eos[0] if self.tokenizer.eos else None

    def __call__(self, record: Mapping[str, Any], line: int) -> Example | None:
        """The example, or None where all its texts are empty.

        Raises:
            Broken: a key is missing or holds something else than is needed.
        """
        grammar = self._grammar(record, line)
        pieces = _Pieces()
        if self.add_bos:
            pieces.add([self._special(BOS)], 0.0)
        written = False
        for number, item in enumerate(grammar):
            weight = float(item.learnt)
            prefix = self.prepend_text if number == 0 else ""
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
        found = value_of(record, self.fields_from_example)
        if isinstance(found, list) and found:
            if self.fields_index >= len(found):
                raise Broken(
                    f"the key {self.fields_from_example!r} has {len(found)} alternatives and "
                    f"fields_index asks for number {self.fields_index}"
                )
            chosen = self.fields_index
            if chosen < 0:
                chosen = random.Random(line).randrange(len(found))
            found = found[chosen]
        if not isinstance(found, str):
            raise Broken(
                f"the key {self.fields_from_example!r} holds {kind_of(found)}, where a text of "
                "fields or a list of such texts is needed"
            )
        try:
            return parse_fields(found)
        except ConfigError as error:
            raise Broken(str(error)) from error

    def _add_parts(
        self, pieces: "_Pieces", record: Mapping[str, Any], item: Field, prefix: str
    ) -> bool:
        """Adds a field; whether it held anything."""
        weight, texts, filled = float(item.learnt), [], False
        for key in item.keys:
            value = value_of(record, key)
            if is_vision(key):
                text = prefix + self.subfield_separator.join(texts)
                pieces.add(self._encode(text), weight)
                texts, prefix = [], ""
                self._add_vision(pieces, key, value, weight)
                filled = True
                continue
            if not isinstance(value, str):
                raise Broken(f"the key {key!r} holds {kind_of(value)}, where text is needed")
            texts.append(value)
            filled |= bool(value)
        pieces.add(self._encode(prefix + self.subfield_separator.join(texts)), weight)
        return filled

    def _add_vision(self, pieces: "_Pieces", key: str, value: Any, weight: float) -> None:
        codes = _codes(key, value)
        ends = np.full((len(codes), 1), END_OF_FRAME, np.int32)
        ends[-1] = END_OF_VISION
        before, after = self._markers
        pieces.add(before, weight)
        pieces.add(np.hstack([codes, ends]).ravel().tolist(), weight, vision=True)
        pieces.add(after, weight)

    def _encode(self, text: str) -> list[int]:
        return encode_text(self.tokenizer, text) if text else []

    def _special(self, name: str) -> int:
        token = self.bos if name == BOS else self.eos
        if token is None:
            raise Broken(f"its fields ask for {name}, which the tokenizer does not have")
        return token


class _Pieces:
    """Tokens as they are gathered."""

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
    """Tokens without any that the tokenizer would add round a text.

    Raises:
        Broken: the text holds half a surrogate pair, which JSON allows and no text does.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Broken("its text holds half of a surrogate pair, which is no character") from error
    return tokenizer.encode(text, specials=False)


def value_of(record: Mapping[str, Any], key: str) -> Any:
    """Raises:
    MissingKey: names the keys that there are.
    """
    if key not in record:
        present = ", ".join(sorted(map(str, record))[:20]) or "none"
        raise MissingKey(f"it has no key {key!r} (its keys: {present})")
    return record[key]


def _codes(key: str, value: Any) -> np.ndarray:
    """Codes by frame, [frames, 256]."""
    whole = isinstance(value, list) and all(type(code) is int for code in value)
    if not whole:
        raise Broken(f"the key {key!r} holds {kind_of(value)}, where a list of codes is needed")
    if not value or len(value) % CODES_PER_FRAME:
        raise Broken(
            f"the key {key!r} holds {len(value)} codes, which is no multiple of {CODES_PER_FRAME}"
        )
    if min(value) < 0 or max(value) >= CODEBOOK:
        worst = min(value) if min(value) < 0 else max(value)
        raise Broken(f"the key {key!r} holds the code {worst}, outside 0 to {CODEBOOK - 1}")
    return np.array(value, np.int32).reshape(-1, CODES_PER_FRAME)


def kind_of(value: Any) -> str:
    """What a value of the wrong type is, for a sentence."""
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
