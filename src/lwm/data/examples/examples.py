"""Represent training examples, which sources and encoders make and packing cuts into rows."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

from lwm.core.errors import InputError
from lwm.models.vision_tokens import VisionVocabulary, single_table_ids

MAX_TOKENS = 1 << 28
"""Most tokens of an example; a longer one is a broken file, not a long book."""

NO_VISION = "it has vision codes, but the model is a text model"


class Broken(Exception):
    """Signal that an example cannot be used; the reason ends the sentence "FILE, line N: ...".

    It becomes a `Report` and the example is skipped, so users do not see the exception.
    """


class MissingKey(Broken):
    """Signal that a key of the settings is absent; in a first example, the settings are wrong."""


class TooLong(Exception):
    """Signal that an example is longer than a row and is skipped."""


LongExamples = Literal["truncate", "skip"]


class Report(NamedTuple):
    """Hold a broken example's place and the reason."""

    example: int  # number among all examples of the data, from 0
    file: str
    line: int  # line, row or record in the file, from 1
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.reason}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """Hold one training example.

    Args:
        tokens: text tokens and vision ids, in separate number spaces, so that a file of examples
            serves models with different text vocabularies.
        weights: loss weight of each token as a target, 0 or 1.
        vision: whether a token is a vision id.
        plain: whether it is a text that may go on in another row: nothing in it depends on a
            question, a system message or an image before it.
        truncated: whether it is only the end of a longer example.
    """

    tokens: Int32[np.ndarray, " tokens"]
    weights: Float32[np.ndarray, " tokens"]
    vision: Bool[np.ndarray, " tokens"]
    plain: bool = False
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    def ids(self, text_vocab: int) -> Int32[np.ndarray, " tokens"]:
        """Return the ids in the one table of a model with `text_vocab` text ids."""
        if not self.vision.any():
            return self.tokens
        return single_table_ids(self.tokens, self.vision, text_vocab)

    @classmethod
    def of_text(cls, tokens: list[int], weights: list[float]) -> "Example":
        """Return an example without vision."""
        ids, vision = np.array(tokens, np.int32), np.zeros(len(tokens), bool)
        return cls(tokens=ids, weights=np.array(weights, np.float32), vision=vision)


def require_usable(
    example: Example, *, text_vocab: int | None, vision: VisionVocabulary | None
) -> None:
    """Raise `Broken` if an example is too long, has no loss, or has ids outside the vocabularies.

    Args:
        text_vocab: bound of text tokens; not checked if None.
        vision: the model's vision vocabulary; None for a text model.
    """
    if len(example) > MAX_TOKENS:
        raise Broken(f"it has {len(example)} tokens, more than {MAX_TOKENS} in one example")
    vision_ids = example.tokens[example.vision]
    if vision_ids.size and vision is None:
        raise Broken(NO_VISION)
    if vision:
        worst = _outside(vision_ids, vision.size)
        if worst is not None:
            size = f"the model's vision vocabulary of {vision.size}"
            raise Broken(f"it has the vision id {worst}, outside {size}")
        edges = np.flatnonzero(np.diff(example.vision, prepend=False, append=False))
        for start, stop in edges.reshape(-1, 2):
            try:
                vision.split(example.tokens[start:stop])
            except InputError as error:
                raise Broken(f"its {error}") from error
    if not (example.weights > 0).any():
        raise Broken("no token of it carries loss")
    worst = _outside(example.tokens[~example.vision], text_vocab)
    if worst is not None:
        raise Broken(f"it has the token {worst}, outside the model's vocabulary of {text_vocab}")


def _outside(tokens: np.ndarray, size: int | None) -> int | None:
    """Return a token below 0 or not below `size`; None if there is none."""
    least, most = int(tokens.min(initial=0)), int(tokens.max(initial=0))
    if least < 0:
        return least
    return most if size is not None and most >= size else None
