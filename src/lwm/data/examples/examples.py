"""One training example: tokens, which of them are learnt, which of them are vision codes.

The common currency of this room: sources and encoders make examples, packing cuts them into rows.
Knows nothing of files, of text or of rows.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

from lwm.core.errors import InputError
from lwm.models.vision_tokens import VisionVocabulary, single_table_ids

MAX_TOKENS = 1 << 28  # one example; beyond it stands a broken file, not a long book


BLIND = "it has vision codes, and the model cannot see"
"""Why a text model passes an example over."""


class Broken(Exception):
    """An example that cannot be used, for a reason that ends the sentence "FILE, line N: ...".

    Never reaches a user as it is: it becomes a `Report`, and the example is passed over.
    """


class MissingKey(Broken):
    """A key that the settings name is absent: in a first example, most likely the settings'
    fault."""


class Report(NamedTuple):
    """A broken example and where it lies."""

    example: int
    """Place among all examples of the data, from 0."""
    file: str
    line: int
    """Line, row or record in the file, from 1."""
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.reason}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One training example.

    Args:
        tokens: text tokens and vision codes, which are separate number spaces: a file of examples
            serves models whose table has its border elsewhere.
        weights: loss weight of each token as a target, 0 or 1.
        vision: whether a token is a vision code (or the end of a frame).
    """

    tokens: Int32[np.ndarray, " tokens"]
    weights: Float32[np.ndarray, " tokens"]
    vision: Bool[np.ndarray, " tokens"]

    def __len__(self) -> int:
        return len(self.tokens)

    def ids(self, text_vocab: int) -> Int32[np.ndarray, " tokens"]:
        """Ids of the one table of a model with so many ids of text."""
        if not self.vision.any():
            return self.tokens
        return single_table_ids(self.tokens, self.vision, text_vocab)

    @classmethod
    def of_text(cls, tokens: list[int], weights: list[float]) -> "Example":
        """An example without vision codes."""
        return cls(
            tokens=np.array(tokens, np.int32),
            weights=np.array(weights, np.float32),
            vision=np.zeros(len(tokens), bool),
        )


def require_usable(
    example: Example, *, text_vocab: int | None, vision: VisionVocabulary | None
) -> None:
    """Refuses an example that no row should carry.

    Args:
        text_vocab: text tokens must lie below it; unchecked if None.
        vision: what the model sees; None for one that does not.

    Raises:
        Broken: it is too long, teaches nothing, or its tokens lie outside what the model knows.
    """
    if len(example) > MAX_TOKENS:
        raise Broken(f"it has {len(example)} tokens, more than {MAX_TOKENS} in one example")
    seen = example.tokens[example.vision]
    if seen.size and vision is None:
        raise Broken(BLIND)
    if seen.size and vision and (seen.min() < 0 or seen.max() >= vision.size):
        worst = int(seen.min() if seen.min() < 0 else seen.max())
        raise Broken(
            f"it has the vision id {worst}, outside the model's vision vocabulary of {vision.size}"
        )
    if vision:
        _require_frames(example, vision)
    if not (example.weights > 0).any():
        raise Broken("no token of it carries loss")
    text = example.tokens[~example.vision]
    if text.size and (text.min() < 0 or (text_vocab is not None and text.max() >= text_vocab)):
        worst = int(text.min() if text.min() < 0 else text.max())
        raise Broken(f"it has the token {worst}, outside the model's vocabulary of {text_vocab}")


def _require_frames(example: Example, vision: VisionVocabulary) -> None:
    """Raises:
    Broken: ids of vision that stand together are no whole frames, each behind its codes ended.
    """
    edges = np.flatnonzero(np.diff(example.vision, prepend=False, append=False))
    for start, stop in edges.reshape(-1, 2):
        try:
            vision.split(example.tokens[start:stop])
        except InputError as error:
            raise Broken(f"its {error}") from error
