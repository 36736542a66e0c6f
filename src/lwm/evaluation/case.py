"""What a task asks of a model, in tokens, and what counts as an answer.

Knows no model and no files: a task makes cases from keys and judges responses in plain Python, so
it is tested with an oracle in a model's place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

Key = Mapping[str, int | float | str]
"""What tells one row of a run from the others: `context_length`, `depth_percent`, `seed`, ..."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question.

    Args:
        prompt: token ids of all that the model reads.
        target: token ids of the ideal answer, which a model that is scored by logits must follow.
        asked: the parts of the target that it must follow, one for each thing asked; all of it
            unless given.
        max_tokens: longest answer.
        reference: what the row shows as `answer`.
        told: further columns of the row, such as where a needle lies.
    """

    prompt: Sequence[int]
    target: Sequence[int]
    max_tokens: int
    reference: Any
    asked: Sequence[range] = ()
    told: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How good a response is.

    Args:
        correct: true or false, or one of them for each thing asked.
        score: from 0 to 1.
    """

    correct: bool | Sequence[bool]
    score: float


@runtime_checkable
class Task(Protocol):
    """Cases in units: those of one unit are answered together, in this order, from an empty cache,
    so that what they share is read once and a run that was interrupted gives the same answers."""

    @property
    def name(self) -> str:
        """As in `lwm eval NAME`."""
        ...

    def units(self) -> Sequence[Sequence[Key]]:
        """Keys of all rows, cheap to make."""
        ...

    def case(self, key: Key) -> Case:
        """The question of a key; the same each time it is asked for."""
        ...

    def judge(self, case: Case, response: str) -> Verdict:
        """How good a generated response is."""
        ...
