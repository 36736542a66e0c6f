"""Hold a tokenizer's vocabulary as plain data.

Checkpoint readers produce it and `data.text.tokenizer_build` builds tokenizers from it.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

# Piece types, numbered as in sentencepiece's model.proto and in GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class Piece(NamedTuple):
    """Hold one entry of a vocabulary; its index is its token id."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Hold the pieces and the rules that segment text into them.

    Args:
        method: merge pairs of sentencepiece pieces (`pieces`), take the most likely segmentation
            (`unigram`), or merge pairs of bytes (`byte_level`).
        merges: rules `left right`, best first; only for `byte_level`, the others use scores.
        splitter: GGUF's name of the rules that split text before merging; only for `byte_level`.
        space_prefix: segment a text as if it began with a space.
        collapse_spaces: treat runs of spaces as one.
        character_map: sentencepiece's compiled normalization, if there is one.
        bos, eos: ids of the tokens that begin and end a text.
        also_eos: further tokens that end an answer, such as the end of a turn.
    """

    method: Literal["pieces", "unigram", "byte_level"]
    pieces: tuple[Piece, ...]
    merges: tuple[str, ...] = ()
    splitter: str = "default"
    space_prefix: bool = True
    collapse_spaces: bool = False
    character_map: bytes = b""
    add_bos: bool = True
    bos: int | None = None
    eos: int | None = None
    also_eos: tuple[int, ...] = ()
    chat_template: str | None = None
