"""Run the tasks of a suite at several lengths, as one task with rows of (task, length, seed)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Annotated, Literal

from annotated_types import Ge

from lwm.core.config import Checked
from lwm.core.errors import ConfigError, InputError
from lwm.data.text.tokenizer import Tokenizer
from lwm.evaluation.results import Key
from lwm.evaluation.task import Case, Verdict
from lwm.evaluation.tasks import babilong, infinitebench, ruler
from lwm.evaluation.tasks.filler import Prose
from lwm.evaluation.tasks.question import Subtask, fit_question
from lwm.evaluation.tasks.ruler_qa import QuestionFile, document_task

SuiteName = Literal["ruler", "babilong", "infinitebench"]
TASKS: Mapping[str, Sequence[str]] = {
    "ruler": ruler.TASKS,
    "babilong": babilong.TASKS,
    "infinitebench": tuple(infinitebench.SUBTASKS),
}
FILES = {"qa_1": "--squad", "qa_2": "--hotpot"}
"""Tasks that need a file of questions, and the flag that names it."""
KEYS = ("task", "context_length", "seed")


def choose_tasks(
    suite: SuiteName, tasks: str | None, files: Iterable[str]
) -> tuple[list[str], dict[str, str]]:
    """Return the names of the tasks to run, and the skipped tasks with the reason.

    Raise ConfigError if a named task does not exist or needs a file that is not in `files`.
    """
    known, files = TASKS[suite], set(files)
    names = list(known) if tasks is None else list(dict.fromkeys(tasks.split(",")))
    for name in names:
        if name not in known:
            raise ConfigError(f"{suite} has no task {name!r}; it has {', '.join(known)}")
        if tasks is not None and name in FILES and name not in files:
            raise ConfigError(
                f"the task {name} needs a file of questions; name one with {FILES[name]}"
            )
    skipped = {name: f"no {FILES[name]}" for name in names if name in FILES and name not in files}
    return [name for name in names if name not in skipped], skipped


def make_subtasks(
    suite: SuiteName,
    names: Sequence[str],
    tokenizer: Tokenizer,
    texts: Iterable[str],
    files: Mapping[str, QuestionFile],
) -> dict[str, Subtask]:
    """Return the chosen tasks of a suite; `texts` are read only by suites that need filler."""
    if suite == "infinitebench":
        subtasks = dict(infinitebench.SUBTASKS)
    elif suite == "babilong":
        subtasks = babilong.babilong(Prose("\n".join(texts)))
    else:
        subtasks = ruler.ruler(Prose("\n".join(texts)), tokenizer)
        subtasks |= {name: document_task(file) for name, file in files.items()}
    return {name: subtasks[name] for name in names}


@dataclass(frozen=True, kw_only=True)
class SuiteTask(Checked):
    """Run a suite's tasks at several lengths."""

    suite: SuiteName
    subtasks: Mapping[str, Subtask]
    tokenizer: Tokenizer
    template: str
    lengths: Sequence[int]  # of prompt and answer together, in tokens, ascending
    samples: Annotated[int, Ge(1)]
    seed: int = 0  # of the first example

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.subtasks:
            raise InputError(f"{self.suite} has no task left to run; name some with --tasks")

    @property
    def name(self) -> str:
        return f"suite {self.suite}"

    def units(self) -> list[list[Key]]:
        seeds = range(self.seed, self.seed + self.samples)
        return [
            [{"task": task, "context_length": length, "seed": seed} for seed in seeds]
            for length in self.lengths
            for task in self.subtasks
        ]

    def case(self, key: Key, *, fill: bool = True) -> Case:
        task, length, seed = (key[name] for name in KEYS)
        assert isinstance(task, str)
        assert isinstance(length, int)
        question = self.subtasks[task].make(Random(f"{task} {length} {seed}"), length)
        return fit_question(question, self.tokenizer, self.template, length, task, fill)

    def judge(self, case: Case, response: str) -> Verdict:
        judge = self.subtasks[case.columns["task"]].judge
        return judge(case.reference, case.columns, response)

    def require_fit(self) -> None:
        """Raise InputError if an example does not fit: the first of each task at the least and
        greatest length is made with filler, the others without."""
        for first, *others in self.units():
            if first["context_length"] in (self.lengths[0], self.lengths[-1]):
                self.case(first)
            for key in others:
                self.case(key, fill=False)
