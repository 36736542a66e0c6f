"""A tokenizer's raw material, as a checkpoint or a sentencepiece model carries it.

Plain data between the room that reads files and the room that builds tokenizers; knows neither.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

# Kinds of piece, the same numbers in sentencepiece's model.proto and in GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class Piece(NamedTuple):
    """One entry of a vocabulary; its place in the list is its id."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Pieces and the rules that put text together from them.

    Args:
        method: merge pairs of sentencepiece pieces, take the likeliest segmentation, or merge
            pairs of bytes.
        merges: rules `left right`, best first; for `byte_level` alone, the others follow from
            scores.
        splitter: GGUF's name of the rules that split text before merging; for `byte_level` alone.
        space_prefix: a text starts as if a space stood before it.
        collapse_spaces: runs of spaces count as one.
        character_map: sentencepiece's compiled normalisation, if it has one.
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
