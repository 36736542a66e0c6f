"""The fields grammar: which keys of an example become tokens, in what order, and which are learnt.

    fields    = field { "," field }
    field     = "[" parts "]" | parts          brackets: no loss
    parts     = "<|bos|>" | "<|eos|>" | key { "+" key }

Keys joined by `+` are joined as text by a separator and then tokenised together. A key that
contains `vision` holds a flat list of codes, whole frames of them; it becomes `<vision>`, the
codes with an end token after each frame, `</vision>`. Beside vision no separator is put: codes are
no text.

Knows examples as mappings and the numbers of the vision vocabulary; knows nothing of files, rows
or other parts of a model. Source of the grammar: the original's
text processors (LargeWorldModel/LWM), of which this is a fresh statement.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import dropwhile
from typing import Any

import numpy as np

from lwm.core.errors import ConfigError
from lwm.data.examples.examples import BLIND, Broken, Example, MissingKey
from lwm.data.text.tokenizer import Tokenizer
from lwm.models.vision_tokens import VisionVocabulary

BOS, EOS = "<|bos|>", "<|eos|>"


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
        vision: what the model sees; None for one that does not.
        max_frames: a longer video gives so many of its frames, evenly spread; 0 for all.

    Raises:
        ConfigError: the grammar is malformed, needs a token that the tokenizer lacks, or names
            codes for a model that cannot see.
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
                f"to false and leave {BOS} and {EOS} out of the fields, or give another tokenizer"
            )
        named = next((key for item in parsed for key in item.keys if is_vision(key)), None)
        if named and self.vision is None:
            raise ConfigError(
                f"the fields {self.fields!r} name {named!r}, which holds vision codes, and the "
                "model cannot see; take a recipe of 'lwm train --list' that does, add vision to "
                "the model with 'lwm convert --add-vision', or leave the field out"
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
        """The example, or None where all its texts are empty.

        Args:
            drop_prompt: leave out what stands before the vision that is learnt, so that the model
                can also make pictures of nothing in particular. Examples that teach text stay.

        Raises:
            Broken: a key is missing or holds something else than is needed.
        """
        grammar = self._grammar(record, line)
        pieces = _Pieces()
        dropped = drop_prompt and _teaches_vision(grammar)
        if dropped:
            grammar = tuple(
                dropwhile(lambda item: not (item.learnt and not item.special), grammar)
            )
        if self.add_bos or (dropped and self.bos is not None):
            pieces.add([self._special(BOS)], 0.0)
        written = False
        for number, item in enumerate(grammar):
            weight = float(item.learnt)
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
        found = require_key(record, self.fields_from_example)
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
                f"the key {self.fields_from_example!r} holds {json_type(found)}, where a text of "
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
            raise Broken(BLIND)
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


def require_key(record: Mapping[str, Any], key: str) -> Any:
    """Raises:
    MissingKey: names the keys that there are.
    """
    if key not in record:
        present = ", ".join(sorted(map(str, record))[:20]) or "none"
        raise MissingKey(f"it has no key {key!r} (its keys: {present})")
    return record[key]


def _teaches_vision(grammar: tuple[Field, ...]) -> bool:
    """Whether all that is learnt is vision, special tokens aside."""
    learnt = [item for item in grammar if item.learnt and not item.special]
    return bool(learnt) and all(is_vision(key) for item in learnt for key in item.keys)


def _codes(key: str, value: Any, vision: VisionVocabulary) -> np.ndarray:
    """Codes by frame, [frames, codes of one]."""
    a_frame, codebook = vision.codes_per_frame, vision.codes
    whole = isinstance(value, list) and all(type(code) is int for code in value)
    if not whole:
        raise Broken(f"the key {key!r} holds {json_type(value)}, where a list of codes is needed")
    if not value or len(value) % a_frame:
        raise Broken(
            f"the key {key!r} holds {len(value)} codes, which is no multiple of {a_frame}, the "
            "codes of a frame"
        )
    if min(value) < 0 or max(value) >= codebook:
        worst = min(value) if min(value) < 0 else max(value)
        raise Broken(
            f"the key {key!r} holds the code {worst}, outside 0 to {codebook - 1}, the model's "
            "codebook"
        )
    return np.array(value, np.int32).reshape(-1, a_frame)


def json_type(value: Any) -> str:
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
