"""What the verbs of `lwm eval` share: asking a model a task's questions, and telling the score."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lwm.core.distributed import first_process
from lwm.core.progress import say

if TYPE_CHECKING:
    from lwm.evaluation.case import Task
    from lwm.evaluation.results import Row
    from lwm.evaluation.run import Score
    from lwm.generation.model import Model


def answered(
    task: "Task",
    model: "Model",
    out: Path,
    settings: Mapping[str, Any],
    *,
    score: "Score",
    batch_tokens: int,
    template: str = "auto",
    place: Callable[["Row"], str],
) -> "list[Row]":
    """All rows of a run, each told as it comes. To be called behind all that may be refused: a
    directory keeps the settings it was begun with.

    Args:
        out: the run's directory.
        settings: what the rows depend on.
        place: what a row was asked, in a few words.
    """
    from lwm.evaluation.answering import ModelAnswerer
    from lwm.evaluation.results import Results
    from lwm.evaluation.run import run

    results = Results(out, settings, tuple(task.units()[0][0]))
    if results.rows and first_process():
        say(f"{results.directory} has {len(results.rows)} rows; going on behind them")

    def tell(row: "Row") -> None:
        response = " ".join(str(row["response"]).split())
        say(f"{place(row)}: {row['score']:.0%}  {response[:60]}")

    answerer = ModelAnswerer(model, batch_tokens, template)
    return run(task, answerer, results, score=score, told=tell)


def report(
    task: "Task", out: Path, settings: Mapping[str, Any], rows: "list[Row]", **shown: Any
) -> None:
    """Writes a run's report and prints where it is, behind its score.

    Args:
        shown: further parts of the report, as `write_report` takes them.
    """
    from lwm.evaluation.report.page import write_report
    from lwm.evaluation.report.scores import overall, percent, points_of

    keys = [key for unit in task.units() for key in unit]
    path = write_report(out, settings, rows, keys=keys, **shown)
    print(f"{task.name} {settings['model']}: {percent(overall(points_of(rows)))}% of {len(rows)}")
    print(path)


def digest(path: Path) -> str | None:
    """Tells a file's contents from others; None where a name is that of no file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
