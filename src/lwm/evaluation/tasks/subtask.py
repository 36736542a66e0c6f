"""What a suite needs of each of its tasks. Knows neither model nor tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol, runtime_checkable

from lwm.evaluation.case import Verdict
from lwm.evaluation.tasks.sizing import Question


@runtime_checkable
class Make(Protocol):
    """Makes an example."""

    def __call__(self, random: Random, length: int, /) -> Question:
        """An example of any length.

        Args:
            random: all that examples differ by; the same state gives the same one.
            length: the context length it will be fitted to, for what is more than filler.
        """
        ...


@runtime_checkable
class Judge(Protocol):
    """Judges a response."""

    def __call__(
        self, answers: Sequence[str], told: Mapping[str, Any], response: str, /
    ) -> Verdict: ...


@dataclass(frozen=True, kw_only=True)
class Subtask:
    """One task of a suite."""

    make: Make
    judge: Judge
