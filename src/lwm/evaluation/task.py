"""Define evaluation tasks, and run them: answer, judge and append rows.

A task makes cases and judges responses in plain Python, so tests replace the model by scripted
answers. With several processes, all of them call `evaluate`; only process 0 writes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from lwm.core.distributed import first_process, together
from lwm.core.progress import progress
from lwm.evaluation.results import Key, Results, Row

ScoreBy = Literal["generation", "logits"]
Verdict = bool | Sequence[bool]
"""Whether a response is right, or whether each item of it is."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Hold one question.

    Args:
        target: token ids of the ideal answer, for scoring by logits.
        reference: the `answer` of the row.
        answer_spans: parts of the target that are scored, one for each item of the question;
            defaults to the whole target.
        columns: further columns of the row.
    """

    prompt: Sequence[int]
    target: Sequence[int]
    max_tokens: int
    reference: Any
    answer_spans: Sequence[range] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Task(Protocol):
    """Make the cases of an evaluation and judge the responses.

    Cases come in units. The cases of a unit are answered in order, starting from an empty cache:
    a prefix that they share is computed once, and a resumed run gives the same answers.
    """

    @property
    def name(self) -> str: ...

    def units(self) -> Sequence[Sequence[Key]]:
        """Return the keys of all rows, without making any case."""
        ...

    def case(self, key: Key) -> Case:
        """Make the case of a key; the same key gives the same case."""
        ...

    def judge(self, case: Case, response: str) -> Verdict: ...


@runtime_checkable
class Answerer(Protocol):
    """Answer cases: a model, or scripted answers in a test."""

    def restart(self) -> None: ...

    def answer(self, cases: Sequence[Case]) -> Iterable[str]: ...

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
    """Answer a task and return all rows; process 0 calls `on_row` with each new one."""
    units = task.units()
    pending = [unit for unit in units if any(key not in results for key in unit)]
    with progress("answering", sum(map(len, units))) as advance:
        advance(sum(map(len, units)) - sum(map(len, pending)))
        for unit in pending:
            answerer.restart()
            with together():  # a file may be missing on one machine
                cases = [task.case(key) for key in unit]
            answers = _verdicts(task, answerer, cases, score)
            for key, case, (response, verdict) in zip(unit, cases, answers, strict=True):
                advance()
                if key in results:  # a unit is always answered as a whole
                    continue
                items = [verdict] if isinstance(verdict, bool) else verdict
                row = {
                    **key, "response": response, "answer": case.reference, "correct": verdict,
                    "score": sum(items) / len(items), **case.columns,
                }  # fmt: skip
                results.append(row)
                if first_process():
                    on_row(row)
    return results.rows


def _verdicts(
    task: Task, answerer: Answerer, cases: Sequence[Case], score: ScoreBy
) -> Iterator[tuple[str, Verdict]]:
    if score == "generation":
        for case, response in zip(cases, answerer.answer(cases), strict=True):
            yield response, task.judge(case, response)
        return
    for case, hits in zip(cases, answerer.follow(cases), strict=True):
        spans = [[hits[i] for i in span] for span in case.answer_spans or [range(len(hits))]]
        response = f"{sum(map(sum, spans))} of {sum(map(len, spans))} tokens"
        yield response, [all(span) for span in spans] if case.answer_spans else all(spans[0])
