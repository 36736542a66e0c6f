"""Define cases, verdicts and tasks: what an evaluation asks and how it judges.

A task makes cases and judges responses in plain Python, so tests replace the model by scripted
answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

Key = Mapping[str, int | float | str]
"""The columns that identify a row of a run, such as `context_length`, `depth_percent`, `seed`."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Hold one question.

    Args:
        prompt: token ids that the model reads.
        target: token ids of the ideal answer, for scoring by logits.
        max_tokens: longest answer.
        reference: the `answer` of the row.
        answer_spans: parts of the target that are scored, one for each item of the question;
            defaults to the whole target.
        columns: further columns of the row, such as the depth of a needle.
    """

    prompt: Sequence[int]
    target: Sequence[int]
    max_tokens: int
    reference: Any
    answer_spans: Sequence[range] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Say how good a response is.

    Args:
        correct: one verdict, or one for each item of the question.
        score: from 0 to 1.
    """

    correct: bool | Sequence[bool]
    score: float


@runtime_checkable
class Task(Protocol):
    """Make the cases of an evaluation and judge the responses.

    Cases come in units. The cases of a unit are answered in order, starting from an empty cache:
    a prefix that they share is computed once, and a resumed run gives the same answers.
    """

    @property
    def name(self) -> str:
        """Name the evaluation, as in `lwm eval NAME`."""
        ...

    def units(self) -> Sequence[Sequence[Key]]:
        """Return the keys of all rows, without making any case."""
        ...

    def case(self, key: Key) -> Case:
        """Make the case of a key; the same key gives the same case."""
        ...

    def judge(self, case: Case, response: str) -> Verdict:
        """Judge a generated response."""
        ...
