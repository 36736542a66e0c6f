"""Convert text to token ids and back, by a `tokenizer.json`, a sentencepiece `tokenizer.model` or
the vocabulary of a GGUF file. The files beside a tokenizer have Hugging Face's names.

Text of users and files is plain: where it spells a control token such as `</s>`, it becomes pieces
of text, never the token. Only what this package writes itself, such as a rendered chat template,
is encoded with its control tokens; the text that users contribute to it is escaped.
"""

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, compress
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from lwm.core.config import read_json
from lwm.core.errors import CheckpointError, ConfigError, InputError
from lwm.core.vocabulary import Vocabulary
from lwm.data.text.documents import text_pieces
from lwm.data.text.long_texts import encode_parts
from lwm.data.text.tokenizer_build import build, prepend_bos, read_sentencepiece

LEAST_VOCABULARY = 256 + 2
"""Least size of a trained vocabulary: every byte, and the tokens that begin and end a text."""
_MAX_BYTES = 256 << 20
_MOST_IDS = 1 << 24
"""Limit on token ids: the library takes time and memory in proportion to the largest."""
_LONG_WORD = r"\S{128}|\s{128}"

_ESCAPE = "\ufdd0"  # a code point that Unicode reserves for the use inside programs
_ESCAPED = re.compile(f"{_ESCAPE}([0-9]*){_ESCAPE}")
_NONCE = secrets.token_hex(8)  # makes private names impossible to guess

_CONTEXT = 4  # tokens before a text that decide how its first token is decoded
_LONGEST_CHARACTER = 8  # tokens; more without a valid character are invalid UTF-8

# Special tokens that begin and end a text if no file names them.
_COMMON_BOS = ("<s>", "<|begin_of_text|>", "<bos>")
_BOS_AND_EOS = ("bos_token", "eos_token")
_COMMON_EOS = ("</s>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "<eos>")


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Hold a tokenizer, the tokens that begin and end a text, and a chat template.

    Args:
        bos: token that begins a text, as text; None if there is none.
        eos: tokens that end an answer, as ids; the first ends a text.
        chat_template: the checkpoint's own Jinja template, if it has one.
        other_tokens: the texts of `pad_token`, `unk_token` and others, for templates.
        limit: text ids of the model; texts with other tokens are refused. None if unknown.
    """

    backend: tokenizers.Tokenizer
    bos: str | None = None
    eos: tuple[int, ...] = ()
    chat_template: str | None = None
    other_tokens: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None

    def encode(self, text: str, *, specials: bool = True) -> list[int]:
        """Return the token ids of plain text, in which spelled control tokens are text.

        `specials` adds the tokens around a text, usually a beginning-of-text token.
        """
        require_unicode(text)
        ids = _text_ids(self.backend, text)
        if not self._special_ids.isdisjoint(ids):
            ids = _text_ids(self._plain_backend, text)
        return self._limited(self._surrounded(ids) if specials else ids)

    def encode_controlled(self, text: str, *, specials: bool = False) -> list[int]:
        """Return the token ids of a text with control tokens, whose plain parts are escaped.

        `specials` is as for `encode`; a text that begins with `bos` does not get it again.
        """
        require_unicode(text)
        specials = specials and not (self.bos and text.startswith(self.bos))
        backend = self.backend
        if _ESCAPE in text:
            backend = self._plain_backend
            private = self._control_tokens.sub(lambda match: self._private(match.group()), text)
            text = _ESCAPED.sub(
                lambda match: self._contents[int(match[1])] if match[1] else _ESCAPE, private
            )
        ids = _text_ids(backend, text)
        return self._limited(self._surrounded(ids) if specials else ids)

    def _surrounded(self, ids: list[int]) -> list[int]:
        """Add the tokens that the tokenizer puts around a text."""
        example = self.backend.encode("a")
        added = example.special_tokens_mask
        before = added.index(0) if 0 in added else len(added)
        return [*example.ids[:before], *ids, *compress(example.ids[before:], added[before:])]

    def _limited(self, ids: list[int]) -> list[int]:
        if self.limit is not None and (worst := max(ids, default=0)) >= self.limit:
            text = self.backend.decode([worst], skip_special_tokens=False)
            raise InputError(
                f"{text!r} is token {worst}, outside the model's vocabulary of {self.limit}; "
                "leave it out of the text, or name the model's own tokenizer"
            )
        return ids

    def encode_part(self, text: str) -> list[int]:
        """Return the token ids of a part of a prompt, as `encode_controlled`; the text after a
        `bos` at its beginning is encoded like the start of a text."""
        first = self.bos_id
        if self.bos and first is not None and text.startswith(self.bos):
            # Some tokenizers put a space before a text, but not after a special token.
            return [first, *self.encode_part(text.removeprefix(self.bos))]
        return self.encode_controlled(text) if text else []

    def escape(self, text: str) -> str:
        """Escape what spells a control token, so that `encode_controlled` leaves it plain."""
        text = text.replace(_ESCAPE, 2 * _ESCAPE)
        if not self._contents:
            return text
        return self._control_tokens.sub(
            lambda match: f"{_ESCAPE}{self._contents.index(match.group())}{_ESCAPE}", text
        )

    @cached_property
    def _contents(self) -> tuple[str, ...]:
        """Return the spellings of the control tokens, longest first."""
        added = self.backend.get_added_tokens_decoder().values()
        contents = {token.content for token in added if token.special and token.content}
        return tuple(sorted(contents, key=lambda content: (-len(content), content)))

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token for token, content in added.items() if content.special)

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._contents)) or r"(?!)")

    @cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """Return the tokenizer with control tokens under private names, which no text spells."""
        data = json.loads(self.backend.to_str())
        names = {content: self._private(content) for content in self._contents}
        for token in data["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = data["model"]
        vocabulary = model.get("vocab")
        if isinstance(vocabulary, dict):
            model["vocab"] = {names.get(name, name): i for name, i in vocabulary.items()}
        elif isinstance(vocabulary, list):  # unigram: pieces with their scores
            model["vocab"] = [[names.get(name, name), *rest] for name, *rest in vocabulary]
        if "merges" in model:  # a rule that makes a control token would make it of text
            rules = [
                rule if isinstance(rule, list) else rule.split(" ") for rule in model["merges"]
            ]
            model["merges"] = [rule for rule in rules if not names.keys() & {*rule, "".join(rule)}]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        try:
            return tokenizers.Tokenizer.from_str(json.dumps(data))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(
                f"the tokenizer's rules do not fit its vocabulary ({error}); replace its file"
            ) from error

    def _private(self, content: str) -> str:
        return f"<{_NONCE}:{self._contents.index(content)}>"

    @property
    def named_tokens(self) -> dict[str, str]:
        """Return the texts of `bos_token`, `eos_token` and others that are defined, by name."""
        named = {**self.other_tokens, "bos_token": self.bos, "eos_token": self.eos_text}
        return {name: text for name, text in named.items() if text}

    @property
    def bos_id(self) -> int | None:
        """Return the id of the token that begins a text."""
        return None if self.bos is None else self.backend.token_to_id(self.bos)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text without special tokens."""
        return self.backend.decode(list(tokens), skip_special_tokens=True)

    def decode_stream(self, tokens: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
        """Yield text as tokens arrive; a character of several tokens waits for the last one.

        Args:
            after: tokens before the text, which decide whether it begins with a space.
        """
        decoder = self.stream_decoder(after)
        for token in tokens:
            if piece := decoder.push(token):
                yield piece
        if rest := decoder.finish():
            yield rest

    def stream_decoder(self, after: Sequence[int] = ()) -> "StreamDecoder":
        """Return what `decode_stream` uses, for tokens that arrive one by one."""
        return StreamDecoder(self, after)

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens."""
        return self.backend.get_vocab_size()

    @property
    def eos_text(self) -> str:
        """Return the token that ends a text, as text; empty if there is none."""
        return (self.backend.id_to_token(self.eos[0]) or "") if self.eos else ""

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json` and the two files of Hugging Face that hold the rest."""
        tokenizer = directory / "tokenizer.json"  # the library writes only to UTF-8 names
        tokenizer.write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        settings = {**self.named_tokens, "chat_template": self.chat_template}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{key: value for key, value in settings.items() if value},
        }
        contents: dict[str, dict[str, Any]] = {"tokenizer_config.json": config}
        if self.eos:
            ids = {"bos_token_id": self.bos_id, "eos_token_id": list(self.eos)}
            contents["generation_config.json"] = ids
        for name, content in contents.items():
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (directory / name).write_text(text, encoding="utf-8")


class StreamDecoder:
    """Decode tokens as they arrive; see `Tokenizer.decode_stream`."""

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int]) -> None:
        self._decode = tokenizer.decode
        self._ids = list(after)[-_CONTEXT:]
        self._start, self._done = 0, len(self._ids)

    def push(self, token: int) -> str:
        """Return the text that a token completes, which may be empty."""
        ids = self._ids
        ids.append(token)
        before, now = self._decode(ids[self._start : self._done]), self._decode(ids[self._start :])
        unfinished = now.endswith("\ufffd") and len(ids) - self._done < _LONGEST_CHARACTER
        if len(now) <= len(before) or unfinished:
            return ""
        self._start, self._done = self._done, len(ids)
        return now[len(before) :]

    def finish(self) -> str:
        """Return the text of tokens that waited for others."""
        before = self._decode(self._ids[self._start : self._done])
        return self._decode(self._ids[self._start :])[len(before) :]


def _text_ids(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    return [token for part in encode_parts(backend, text) for token in part.ids]


def require_unicode(text: str) -> str:
    """Return a text; raise InputError if it holds half of a surrogate pair."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"U+{ord(text[error.start]):04X}"
            raise InputError(
                f"the text has half of a surrogate pair, {half}, at character {error.start}; "
                "remove it or decode the text again"
            ) from error
    return text


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer from a file or a directory; raise CheckpointError if it cannot be read."""
    if path.is_dir():
        if (tokenizer := find_tokenizer(path)) is None:
            raise CheckpointError(
                f"{path} has neither tokenizer.json nor tokenizer.model; name one that does"
            )
        return tokenizer
    if not path.is_file():
        raise CheckpointError(f"the tokenizer {path} does not exist; check the path")
    if path.stat().st_size > _MAX_BYTES:
        raise CheckpointError(f"{path} is larger than {_MAX_BYTES >> 20} MB; name a tokenizer")
    if path.suffix != ".json":
        return _with_settings(from_vocabulary(read_sentencepiece(path)), path.parent)
    try:
        backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        backend.decode(backend.encode("a b").ids)  # some broken rules fail only when they are used
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # plain Exception, and panics of the library's Rust
        raise CheckpointError(f"{path} is not a tokenizer.json ({error}); replace it") from error
    if (largest := max(backend.get_vocab().values(), default=0)) >= _MOST_IDS:
        raise CheckpointError(
            f"{path} gives a token the id {largest:,}, and ids below {_MOST_IDS:,} can be read; "
            "replace it"
        )
    backend.no_truncation()  # the file may keep these settings of its last use
    backend.no_padding()
    return _with_settings(Tokenizer(backend=backend), path.parent)


def from_vocabulary(vocabulary: Vocabulary) -> Tokenizer:
    """Build a tokenizer from pieces; raise CheckpointError if they are inconsistent."""
    backend = build(vocabulary)  # checks the ids used below
    return Tokenizer(
        backend=backend,
        bos=None if vocabulary.bos is None else vocabulary.pieces[vocabulary.bos].text,
        eos=(() if vocabulary.eos is None else (vocabulary.eos,)) + vocabulary.also_eos,
        chat_template=vocabulary.chat_template,
    )


def checkpoint_tokenizer(source: Path | Vocabulary | None) -> Tokenizer | None:
    """Return the tokenizer of a checkpoint, from files or pieces, if there is one."""
    if isinstance(source, Vocabulary):
        return from_vocabulary(source)
    return None if source is None else find_tokenizer(source)


def find_tokenizer(directory: Path) -> Tokenizer | None:
    """Return the tokenizer of a model directory, if there is one."""
    files = (directory / name for name in ("tokenizer.json", "tokenizer.model"))
    file = next((file for file in files if file.is_file()), None)
    return None if file is None else read_tokenizer(file)


def _with_settings(tokenizer: Tokenizer, directory: Path) -> Tokenizer:
    """Add the settings of the files beside a tokenizer."""

    def beside(name: str) -> dict[str, Any]:
        return read_json(directory / name) if (directory / name).is_file() else {}

    settings = beside("special_tokens_map.json") | beside("tokenizer_config.json")

    def token_text(key: str) -> str | None:
        value = settings.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        return text if isinstance(text, str) else None

    backend = tokenizer.backend
    eos: list[Any] = [backend.token_to_id(token_text("eos_token") or "")]
    for name in ("generation_config.json", "config.json"):
        value = beside(name).get("eos_token_id")
        eos += value if isinstance(value, list) else [value]
    valid = dict.fromkeys(i for i in eos if type(i) is int and 0 <= i < tokenizer.vocab_size)
    added = backend.get_added_tokens_decoder().values()
    special = {token.content for token in added if token.special}
    bos = (name for name in _COMMON_BOS if name in special)
    common_eos = (backend.token_to_id(name) for name in _COMMON_EOS if name in special)
    names = [name for name in settings if name.endswith("_token") and name not in _BOS_AND_EOS]
    others = {name: text for name in names if (text := token_text(name)) is not None}
    return replace(
        tokenizer,
        other_tokens=others,
        bos=token_text("bos_token") or tokenizer.bos or next(bos, None),
        eos=tuple(valid) or tokenizer.eos or tuple(common_eos),
        chat_template=_chat_template(settings.get("chat_template"), directory),
    )


def _chat_template(template: Any, directory: Path) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}); replace it") from error
    if isinstance(template, list):  # several named templates
        named = [item for item in template if isinstance(item, dict)]
        template = next((i.get("template") for i in named if i.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer of at most `vocab_size` tokens."""
    if vocab_size < LEAST_VOCABULARY:
        raise ConfigError(
            f"a vocabulary of {vocab_size} is too small; choose at least {LEAST_VOCABULARY}"
        )
    bos, eos = "<s>", "</s>"
    backend = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    # A number is its digits, one by one, as in Llama: models copy and compare them better.
    digits = pre_tokenizers.Digits(individual_digits=True)
    # Training takes time in proportion to the length of words, and no token is that long.
    long_words = pre_tokenizers.Split(Regex(_LONG_WORD), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [long_words, digits, words]
    )
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[bos, eos],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Half a surrogate pair, which JSON allows, is not a character.
    pieces = (
        piece.encode("utf-8", "ignore").decode() for text in texts for piece in text_pieces(text)
    )
    if (first := next(pieces, None)) is None:
        raise InputError("the data has no text to train a tokenizer on; name other keys or files")
    backend.train_from_iterator(chain([first], pieces), trainer)
    backend.pre_tokenizer = words  # type: ignore[assignment]
    prepend_bos(backend, bos, 0)  # the library numbers special tokens first
    return Tokenizer(backend=backend, bos=bos, eos=(1,))
