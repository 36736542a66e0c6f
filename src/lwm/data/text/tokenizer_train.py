"""Train a byte-level BPE tokenizer, which can encode any text without loss."""

from collections.abc import Iterable
from itertools import chain

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lwm.core.errors import ConfigError, InputError
from lwm.data.text.documents import text_pieces
from lwm.data.text.tokenizer import Tokenizer

BOS, EOS = "<s>", "</s>"
LEAST_VOCABULARY = 256 + 2  # every byte, BOS and EOS


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a tokenizer; the same texts in any order give the same one.

    Args:
        vocab_size: most tokens; small data may yield fewer.

    Raises:
        ConfigError: the vocabulary has no room for all bytes.
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
    # Half a surrogate pair, which JSON allows, is no character.
    pieces = (
        piece.encode("utf-8", "ignore").decode() for text in texts for piece in text_pieces(text)
    )
    if (first := next(pieces, None)) is None:
        raise InputError(
            "the data holds no text to train a tokenizer on; name other keys or files"
        )
    backend.train_from_iterator(chain([first], pieces), trainer)
    bos, eos = 0, 1  # the library numbers special tokens first
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{BOS}:0 $A:0",
        pair=f"{BOS}:0 $A:0 {BOS}:1 $B:1",
        special_tokens=[(BOS, bos)],
    )
    return Tokenizer(backend=backend, bos=BOS, eos=(eos,))
