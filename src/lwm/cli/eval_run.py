"""What the verbs of `lwm eval` share: asking a model a task's questions, and telling each row."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lwm.core.distributed import first_process
from lwm.core.progress import say

if TYPE_CHECKING:
    from lwm.evaluation.case import Task
    from lwm.evaluation.results import Results, Row
    from lwm.evaluation.run import Score
    from lwm.inference.model import Model


def answered(
    task: "Task",
    model: "Model",
    results: "Results",
    *,
    score: "Score",
    batch_tokens: int,
    template: str = "auto",
    place: Callable[["Row"], str],
) -> "list[Row]":
    """All rows of a run, each told as it comes.

    Args:
        place: what a row was asked, in a few words.
    """
    from lwm.evaluation.answering import ModelAnswerer
    from lwm.evaluation.run import run

    if results.rows and first_process():
        say(f"{results.directory} has {len(results.rows)} rows; going on behind them")

    def tell(row: "Row") -> None:
        response = " ".join(str(row["response"]).split())
        say(f"{place(row)}: {row['score']:.0%}  {response[:60]}")

    answerer = ModelAnswerer(model, batch_tokens, template)
    return run(task, answerer, results, score=score, told=tell)


def digest(path: Path) -> str | None:
    """Tells a file's contents from others; None where a name is that of no file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def told_score(task: "Task", model: str, rows: "list[Row]") -> str:
    mean = sum(row["score"] for row in rows) / len(rows)
    return f"{task.name} {model}: {mean:.1%} of {len(rows)}"
