"""Convert text to token ids and back.

One class wraps the `tokenizers` library for a `tokenizer.json`, a sentencepiece `tokenizer.model`
and the metadata of a GGUF file; `tokenizer_build` converts the latter two. The files beside it
have Hugging Face's names, so this module reads our directories and theirs.
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

_CONTEXT = 4  # tokens before a text that decide how its first token is decoded
_LONGEST_CHARACTER = 8  # tokens; more without a valid character are invalid UTF-8

# Special tokens that begin and end a text if no file names them.
_COMMON_BOS = ("<s>", "<|begin_of_text|>", "<bos>")
_COMMON_EOS = ("</s>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "<eos>")


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Hold a tokenizer, the tokens that begin and end a text, and a chat template.

    Args:
        bos: token that begins a text, as text; None if there is none.
        eos: tokens that end an answer, as ids; the first ends a text.
        chat_template: the checkpoint's own Jinja template, if it has one.
    """

    backend: tokenizers.Tokenizer
    bos: str | None = None
    eos: tuple[int, ...] = ()
    chat_template: str | None = None

    def encode(self, text: str, *, specials: bool = True) -> list[int]:
        """Return token ids; `specials` adds special tokens, usually a beginning-of-text token."""
        return self.backend.encode(text, add_special_tokens=specials).ids

    @property
    def bos_id(self) -> int | None:
        """Return the id of the token that begins a text."""
        return None if self.bos is None else self.backend.token_to_id(self.bos)

    def encode_part(self, text: str) -> list[int]:
        """Return the token ids of a part of a prompt, which may begin with `bos` as text."""
        first = self.bos_id
        if self.bos and first is not None and text.startswith(self.bos):
            # Some tokenizers put a space before a text, but not after a special token.
            return [first, *self.encode_part(text.removeprefix(self.bos))]
        return self.encode(text, specials=False) if text else []

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text without special tokens."""
        return self.backend.decode(list(tokens), skip_special_tokens=True)

    def decode_stream(self, tokens: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
        """Yield text as tokens arrive; a character of several tokens waits for the last one.

        Args:
            after: tokens before the text, which decide whether it begins with a space.
        """
        ids = list(after)[-_CONTEXT:]
        start, done = 0, len(ids)
        for token in tokens:
            ids.append(token)
            before, now = self.decode(ids[start:done]), self.decode(ids[start:])
            unfinished = now.endswith("\ufffd") and len(ids) - done < _LONGEST_CHARACTER
            if len(now) > len(before) and not unfinished:
                yield now[len(before) :]
                start, done = done, len(ids)
        if rest := self.decode(ids[start:])[len(self.decode(ids[start:done])) :]:
            yield rest

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
    """Read a tokenizer from a file or a directory.

    Raises:
        CheckpointError: there is none, or it is broken.
    """
    if path.is_dir():
        tokenizer = find_tokenizer(path)
        if tokenizer is None:
            raise CheckpointError(
                f"{path} holds neither tokenizer.json nor tokenizer.model; name a directory or "
                "file that does"
            )
        return tokenizer
    if not path.is_file():
        raise CheckpointError(f"the tokenizer {path} does not exist; check the path")
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise CheckpointError(
            f"{path} is larger than {MAX_TOKENIZER_BYTES >> 20} MB; it is no tokenizer"
        )
    if path.suffix == ".json":
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(
                f"{path} is not a tokenizer.json ({error}); replace it"
            ) from error
        return _with_settings(Tokenizer(backend=backend), path.parent)
    return _with_settings(from_vocabulary(read_sentencepiece(path)), path.parent)


def from_vocabulary(vocabulary: Vocabulary) -> Tokenizer:
    """Build a tokenizer from pieces.

    Raises:
        CheckpointError: the vocabulary is inconsistent, or splits text by unknown rules.
    """
    backend = build(vocabulary)  # checks the ids used below
    return Tokenizer(
        backend=backend,
        bos=None if vocabulary.bos is None else vocabulary.pieces[vocabulary.bos].text,
        eos=(() if vocabulary.eos is None else (vocabulary.eos,)) + vocabulary.also_eos,
        chat_template=vocabulary.chat_template,
    )


def checkpoint_tokenizer(source: Path | Vocabulary | None) -> Tokenizer | None:
    """Return the tokenizer of a checkpoint, from files or pieces; None if it has none."""
    if isinstance(source, Vocabulary):
        return from_vocabulary(source)
    return None if source is None else find_tokenizer(source)


def find_tokenizer(directory: Path) -> Tokenizer | None:
    """Return the tokenizer of a model directory; None if it has none."""
    for name in ("tokenizer.json", "tokenizer.model"):
        if (directory / name).is_file():
            return read_tokenizer(directory / name)
    return None


def _with_settings(tokenizer: Tokenizer, directory: Path) -> Tokenizer:
    """Add the settings of the files beside a tokenizer."""

    def beside(name: str) -> dict[str, Any]:
        return read_json(directory / name) if (directory / name).is_file() else {}

    settings = beside("special_tokens_map.json") | beside("tokenizer_config.json")
    generation = beside("generation_config.json")
    model = beside("config.json")

    def token_text(value: Any) -> str | None:
        text = value.get("content") if isinstance(value, dict) else value
        return text if isinstance(text, str) else None

    def common(names: Sequence[str]) -> Iterator[str]:
        added = tokenizer.backend.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special}
        return (name for name in names if name in special)

    bos = token_text(settings.get("bos_token")) or tokenizer.bos
    eos: list[Any] = [tokenizer.backend.token_to_id(token_text(settings.get("eos_token")) or "")]
    for value in (generation.get("eos_token_id"), model.get("eos_token_id")):
        eos += value if isinstance(value, list) else [value]
    valid = [
        token for token in eos if isinstance(token, int) and 0 <= token < tokenizer.vocab_size
    ]
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates
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
        bos=bos or next(common(_COMMON_BOS), None),
        eos=tuple(dict.fromkeys(valid))
        or tokenizer.eos
        or tuple(tokenizer.backend.token_to_id(text) for text in common(_COMMON_EOS)),
        chat_template=template if isinstance(template, str) else None,
    )
