"""A tokenizer of one's own, trained on the data at hand.

Byte-level BPE: any text can be written with it and comes back unchanged. Knows texts; knows
nothing of where they come from.
"""

from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lwm.core.errors import ConfigError, InputError
from lwm.data.text.tokenizer import Tokenizer

BOS, EOS = "<s>", "</s>"
LEAST_VOCABULARY = 256 + 2  # every byte, and what begins and ends a text
_PART = 1 << 16  # characters handed over at a time: the library holds words, not texts


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer; the same texts in any order give the same one.

    Args:
        vocab_size: tokens at most; small data may yield fewer.

    Raises:
        ConfigError: the vocabulary has no room for the bytes.
        InputError: there is no text.
    """
    if vocab_size < LEAST_VOCABULARY:
        raise ConfigError(
            f"a vocabulary of {vocab_size} is too small for a tokenizer of bytes; choose at least "
            f"{LEAST_VOCABULARY}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(  # type: ignore[assignment]
        add_prefix_space=False, use_regex=True
    )
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    given = _Parts(texts)
    backend.train_from_iterator(iter(given), trainer)
    if not given.any:
        raise InputError(
            "the data holds no text to train a tokenizer on; name other keys or files"
        )
    bos, eos = 0, 1  # the library numbers special tokens first
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{BOS}:0 $A:0",
        pair=f"{BOS}:0 $A:0 {BOS}:1 $B:1",
        special_tokens=[(BOS, bos)],
    )
    return Tokenizer(backend=backend, bos=BOS, eos=(eos,))


class _Parts:
    """Long texts in parts that are cut at line ends or blanks, where no word is cut in two."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts, self.any = texts, False

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            at = 0
            while at < len(text):
                cut = at + _PART
                if cut < len(text):
                    blank = max(text.rfind(mark, at + 1, cut) for mark in (" ", "\n"))
                    cut = blank if blank > at else cut
                self.any = True
                # Half a surrogate pair, which JSON allows, is no character and teaches nothing.
                yield text[at:cut].encode("utf-8", "ignore").decode()
                at = cut
