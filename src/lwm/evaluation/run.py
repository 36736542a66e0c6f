"""Goes through a task: asks what has no row yet, judges, and appends rows as answers come.

Knows tasks, an answerer and a run's results; knows no model and draws nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, Protocol, runtime_checkable

from lwm.core.progress import progress
from lwm.evaluation.case import Case, Task, Verdict
from lwm.evaluation.results import Results, Row

Score = Literal["generation", "logits"]


@runtime_checkable
class Answerer(Protocol):
    """A model, or an oracle in its place."""

    def restart(self) -> None:
        """Forgets what it has read."""
        ...

    def answer(self, cases: Sequence[Case]) -> Iterable[str]:
        """Responses, in order, as they come."""
        ...

    def follow(self, cases: Sequence[Case]) -> Iterable[Sequence[bool]]:
        """For each case, whether each token of its target is the likeliest behind those before
        it."""
        ...


def run(
    task: Task,
    answerer: Answerer,
    results: Results,
    *,
    score: Score = "generation",
    told: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """All rows of a task, those that were there before first.

    Args:
        score: judge what the model writes, or whether it would follow the ideal answer.
        told: called with each new row.
    """
    units = task.units()
    todo = [unit for unit in units if any(key not in results for key in unit)]
    asked = _written if score == "generation" else _followed
    with progress("answering", sum(map(len, units))) as advance:
        advance(sum(map(len, units)) - sum(map(len, todo)))
        for unit in todo:
            answerer.restart()
            cases = [task.case(key) for key in unit]
            found = asked(task, answerer, cases)
            for key, case, (response, verdict) in zip(unit, cases, found, strict=True):
                advance()
                if key in results:  # a unit is asked whole, whatever rows it has
                    continue
                row = {
                    **key, "response": response, "answer": case.reference,
                    "correct": verdict.correct, "score": verdict.score, **case.told,
                }  # fmt: skip
                results.append(row)
                told(row)
    return results.rows


def _written(
    task: Task, answerer: Answerer, cases: Sequence[Case]
) -> Iterator[tuple[str, Verdict]]:
    for case, response in zip(cases, answerer.answer(cases), strict=True):
        yield response, task.judge(case, response)


def _followed(
    task: Task, answerer: Answerer, cases: Sequence[Case]
) -> Iterator[tuple[str, Verdict]]:
    for case, hits in zip(cases, answerer.follow(cases), strict=True):
        parts = case.asked or [range(len(hits))]
        right = [all(hits[i] for i in part) for part in parts]
        count, of = sum(hits[i] for part in parts for i in part), sum(map(len, parts))
        correct = right if case.asked else right[0]
        yield f"{count} of {of} tokens", Verdict(correct=correct, score=sum(right) / len(right))
