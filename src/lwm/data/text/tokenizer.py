"""Text <-> token ids.

One class over the `tokenizers` library, whatever the tokenizer came from: a `tokenizer.json`, a
sentencepiece `tokenizer.model`, or the metadata of a GGUF file (`tokenizer_build` turns the latter
two into the first). Files beside it follow Hugging Face's names, so that our directories and
theirs share this reader.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers

from lwm.core.config import read_json
from lwm.core.errors import CheckpointError
from lwm.core.vocabulary import Vocabulary
from lwm.data.text.tokenizer_build import build, read_sentencepiece

MAX_TOKENIZER_BYTES = 256 << 20

_CONTEXT = 4  # tokens before a text that decide how its first one is written
_LONGEST_CHARACTER = 8  # tokens; what has not become a character by then is no character

# Where no file says which tokens begin and end a text, those of these names that are special.
_USUAL_BOS = ("<s>", "<|begin_of_text|>", "<bos>")
_USUAL_EOS = ("</s>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "<eos>")


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer and what a model's text needs besides: where it begins and ends, and how turns
    are written.

    Args:
        bos: token that begins a text, as text; None where there is none.
        eos: tokens that end an answer, as ids; the first is the one written at the end of a text.
        chat_template: the checkpoint's own Jinja template, if it has one.
    """

    backend: tokenizers.Tokenizer
    bos: str | None = None
    eos: tuple[int, ...] = ()
    chat_template: str | None = None

    def encode(self, text: str, *, specials: bool = True) -> list[int]:
        """Token ids. `specials` adds what the tokenizer puts round a text, usually a
        beginning-of-text token."""
        return self.backend.encode(text, add_special_tokens=specials).ids

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text."""
        return None if self.bos is None else self.backend.token_to_id(self.bos)

    def encode_part(self, text: str) -> list[int]:
        """Token ids of a part of a prompt: nothing is put round it, and it may begin with the
        token that begins texts, written out."""
        first = self.bos_id
        if self.bos and first is not None and text.startswith(self.bos):
            # Some tokenizers put a space before a text, but not behind a token of it.
            return [first, *self.encode_part(text.removeprefix(self.bos))]
        return self.encode(text, specials=False) if text else []

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens."""
        return self.backend.decode(list(tokens), skip_special_tokens=True)

    def decode_stream(self, tokens: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
        """Pieces of text as tokens come; a character of several tokens waits for its last.

        Args:
            after: tokens the text continues, so that a space between them and it is kept.
        """
        ids = list(after)[-_CONTEXT:]
        start, told = 0, len(ids)
        for token in tokens:
            ids.append(token)
            before, now = self.decode(ids[start:told]), self.decode(ids[start:])
            unfinished = now.endswith("\ufffd") and len(ids) - told < _LONGEST_CHARACTER
            if len(now) > len(before) and not unfinished:
                yield now[len(before) :]
                start, told = told, len(ids)
        if rest := self.decode(ids[start:])[len(self.decode(ids[start:told])) :]:
            yield rest

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    @property
    def eos_text(self) -> str:
        return (self.backend.id_to_token(self.eos[0]) or "") if self.eos else ""

    def save(self, directory: Path) -> None:
        """Writes `tokenizer.json` and the two small files Hugging Face keeps the rest in."""
        self.backend.save(str(directory / "tokenizer.json"))
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        if self.bos:
            config["bos_token"] = self.bos
        if self.eos:
            config["eos_token"] = self.eos_text
            generation = {
                "bos_token_id": self.bos_id,
                "eos_token_id": list(self.eos),
            }
            (directory / "generation_config.json").write_text(
                json.dumps(generation, indent=2), encoding="utf-8"
            )
        if self.chat_template:
            config["chat_template"] = self.chat_template
        (directory / "tokenizer_config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8"
        )


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer from a file or a directory.

    Raises:
        CheckpointError: there is none, or it is broken.
    """
    if path.is_dir():
        found = find_tokenizer(path)
        if found is None:
            raise CheckpointError(
                f"{path} holds neither tokenizer.json nor tokenizer.model; name a directory or "
                "file that does"
            )
        return found
    if not path.is_file():
        raise CheckpointError(f"the tokenizer {path} does not exist; check the path")
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise CheckpointError(
            f"{path} is larger than {MAX_TOKENIZER_BYTES >> 20} MB; it is no tokenizer"
        )
    if path.suffix == ".json":
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for any fault in the file
            raise CheckpointError(
                f"{path} is not a tokenizer.json ({error}); replace it"
            ) from error
        return _with_settings(Tokenizer(backend=backend), path.parent)
    return _with_settings(from_vocabulary(read_sentencepiece(path)), path.parent)


def from_vocabulary(vocabulary: Vocabulary) -> Tokenizer:
    """A tokenizer built from raw pieces.

    Raises:
        CheckpointError: the vocabulary contradicts itself, or splits text by unknown rules.
    """
    backend = build(vocabulary)  # checks the ids used below
    return Tokenizer(
        backend=backend,
        bos=None if vocabulary.bos is None else vocabulary.pieces[vocabulary.bos].text,
        eos=(() if vocabulary.eos is None else (vocabulary.eos,)) + vocabulary.also_eos,
        chat_template=vocabulary.chat_template,
    )


def checkpoint_tokenizer(source: Path | Vocabulary | None) -> Tokenizer | None:
    """The tokenizer that a checkpoint brings, as files or as raw pieces, if it brings one."""
    if isinstance(source, Vocabulary):
        return from_vocabulary(source)
    return None if source is None else find_tokenizer(source)


def find_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a model directory, if it has one."""
    for name in ("tokenizer.json", "tokenizer.model"):
        if (directory / name).is_file():
            return read_tokenizer(directory / name)
    return None


def _with_settings(tokenizer: Tokenizer, directory: Path) -> Tokenizer:
    """Adds what the files beside a tokenizer say."""

    def beside(name: str) -> dict[str, Any]:
        return read_json(directory / name) if (directory / name).is_file() else {}

    settings = beside("special_tokens_map.json") | beside("tokenizer_config.json")
    generation = beside("generation_config.json")
    model = beside("config.json")

    def token_text(value: Any) -> str | None:
        text = value.get("content") if isinstance(value, dict) else value
        return text if isinstance(text, str) else None

    def usual(names: Sequence[str]) -> Iterator[str]:
        added = tokenizer.backend.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special}
        return (name for name in names if name in special)

    bos = token_text(settings.get("bos_token")) or tokenizer.bos
    eos: list[Any] = [tokenizer.backend.token_to_id(token_text(settings.get("eos_token")) or "")]
    for value in (generation.get("eos_token_id"), model.get("eos_token_id")):
        eos += value if isinstance(value, list) else [value]
    known = [
        token for token in eos if isinstance(token, int) and 0 <= token < tokenizer.vocab_size
    ]
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones; the plain one is called default
        named = [item for item in template if isinstance(item, dict)]
        template = next((i.get("template") for i in named if i.get("name") == "default"), None)
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            template = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}); replace it") from error
    return replace(
        tokenizer,
        bos=bos or next(usual(_USUAL_BOS), None),
        eos=tuple(dict.fromkeys(known))
        or tokenizer.eos
        or tuple(tokenizer.backend.token_to_id(text) for text in usual(_USUAL_EOS)),
        chat_template=template if isinstance(template, str) else None,
    )
