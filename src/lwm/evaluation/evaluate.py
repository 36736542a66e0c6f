"""Run a task: answer the cases that have no row yet, judge the answers, and append rows.

With several processes, all of them call `evaluate`; only process 0 writes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, Protocol, runtime_checkable

from lwm.core.distributed import first_process, together
from lwm.core.progress import progress
from lwm.evaluation.case import Case, Task, Verdict
from lwm.evaluation.results import Results, Row

ScoreBy = Literal["generation", "logits"]


@runtime_checkable
class Answerer(Protocol):
    """Answer cases: a model, or scripted answers in a test."""

    def restart(self) -> None:
        """Empty the cache."""
        ...

    def answer(self, cases: Sequence[Case]) -> Iterable[str]:
        """Yield one response for each case, in order."""
        ...

    def follow(self, cases: Sequence[Case]) -> Iterable[Sequence[bool]]:
        """Yield, for each case, whether each target token is the likeliest after its prefix."""
        ...


def evaluate(
    task: Task,
    answerer: Answerer,
    results: Results,
    *,
    score: ScoreBy = "generation",
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Answer a task and return all rows, those of an interrupted run first.

    Args:
        score: judge the generated response, or whether the model would follow the ideal answer.
        on_row: callback for each new row, in process 0.
    """
    units = task.units()
    pending = [unit for unit in units if any(key not in results for key in unit)]
    verdicts_of = _generated if score == "generation" else _followed
    with progress("answering", sum(map(len, units))) as advance:
        advance(sum(map(len, units)) - sum(map(len, pending)))
        for unit in pending:
            answerer.restart()
            with together():  # a file may be missing on one machine
                cases = [task.case(key) for key in unit]
            answers = verdicts_of(task, answerer, cases)
            for key, case, (response, verdict) in zip(unit, cases, answers, strict=True):
                advance()
                if key in results:  # a unit is always answered as a whole
                    continue
                row = {
                    **key, "response": response, "answer": case.reference,
                    "correct": verdict.correct, "score": verdict.score, **case.columns,
                }  # fmt: skip
                results.append(row)
                if first_process():
                    on_row(row)
    return results.rows


def _generated(
    task: Task, answerer: Answerer, cases: Sequence[Case]
) -> Iterator[tuple[str, Verdict]]:
    for case, response in zip(cases, answerer.answer(cases), strict=True):
        yield response, task.judge(case, response)


def _followed(
    task: Task, answerer: Answerer, cases: Sequence[Case]
) -> Iterator[tuple[str, Verdict]]:
    for case, hits in zip(cases, answerer.follow(cases), strict=True):
        spans = [[hits[i] for i in span] for span in case.answer_spans or [range(len(hits))]]
        correct = list(map(all, spans))
        response = f"{sum(map(sum, spans))} of {sum(map(len, spans))} tokens"
        yield (
            response,
            Verdict(
                correct=correct if case.answer_spans else correct[0],
                score=sum(correct) / len(correct),
            ),
        )
