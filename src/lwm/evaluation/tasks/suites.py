"""Run the tasks of a suite at several lengths, as one task with rows of (task, length, seed)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Annotated, Literal

from annotated_types import Ge

from lwm.core.config import Checked
from lwm.core.errors import ConfigError, InputError
from lwm.data.text.tokenizer import Tokenizer
from lwm.evaluation.case import Case, Key, Verdict
from lwm.evaluation.tasks import babilong, infinitebench, ruler
from lwm.evaluation.tasks.filler import Prose
from lwm.evaluation.tasks.question import Question, Subtask, fit_question, require_fit
from lwm.evaluation.tasks.ruler_qa import QuestionFile, document_task

SuiteName = Literal["ruler", "babilong", "infinitebench"]
TASKS: Mapping[str, Sequence[str]] = {
    "ruler": ruler.TASKS,
    "babilong": babilong.TASKS,
    "infinitebench": infinitebench.TASKS,
}
FILES = {"qa_1": "--squad", "qa_2": "--hotpot"}
"""Tasks that need a file of questions, and the flag that names it."""
KEYS = ("task", "context_length", "seed")


def choose_tasks(
    suite: SuiteName, tasks: str | None, files: Iterable[str]
) -> tuple[list[str], dict[str, str]]:
    """Return the names of the tasks to run, and the skipped tasks with the reason.

    Args:
        tasks: names separated by commas; None means all.
        files: tasks whose file of questions is named.

    Raises:
        ConfigError: the suite has no such task, or it is named without its file.
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
    """Return the chosen tasks of a suite.

    Args:
        texts: filler; not read by suites that need none.
        files: questions of `qa_1` and `qa_2`.
    """
    if suite == "infinitebench":
        subtasks = infinitebench.infinitebench()
    elif suite == "babilong":
        subtasks = babilong.babilong(Prose("\n".join(texts)))
    else:
        subtasks = ruler.ruler(Prose("\n".join(texts)), tokenizer)
        subtasks |= {name: document_task(file) for name, file in files.items()}
    return {name: subtasks[name] for name in names}


@dataclass(frozen=True, kw_only=True)
class SuiteTask(Checked):
    """Run a suite's tasks at several lengths.

    Args:
        template: chat template of the prompts, see `prompts.wrap`.
        lengths: of prompt and answer together, in tokens, ascending.
        samples: examples of each task and length.
        seed: of the first example; the others count up from it.
    """

    suite: SuiteName
    subtasks: Mapping[str, Subtask]
    tokenizer: Tokenizer
    template: str
    lengths: Sequence[int]
    samples: Annotated[int, Ge(1)]
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.subtasks:
            raise InputError(f"{self.suite} has no task left to run; name some with --tasks")

    @property
    def name(self) -> str:
        """Name the suite, as in `lwm eval suite NAME`."""
        return f"suite {self.suite}"

    def units(self) -> list[list[Key]]:
        """Return the keys of all rows; the examples of a task and length are a unit."""
        seeds = range(self.seed, self.seed + self.samples)
        return [
            [{"task": task, "context_length": length, "seed": seed} for seed in seeds]
            for length in self.lengths
            for task in self.subtasks
        ]

    def case(self, key: Key) -> Case:
        """Make the example of a key."""
        return fit_question(*self._question(key))

    def _question(self, key: Key) -> tuple[Question, Tokenizer, str, int, str]:
        """Return the arguments of `fit_question`."""
        task, length, seed = (key[name] for name in KEYS)
        assert isinstance(task, str)
        assert isinstance(length, int)
        question = self.subtasks[task].make(Random(f"{task} {length} {seed}"), length)
        return question, self.tokenizer, self.template, length, task

    def judge(self, case: Case, response: str) -> Verdict:
        """Judge a response as the example's task does."""
        judge = self.subtasks[case.columns["task"]].judge
        return judge(case.reference, case.columns, response)

    def require_fit(self) -> None:
        """Check all examples before the run.

        The first example of each task is made at the least and the greatest length, all others
        without filler.

        Raises:
            InputError: a length is too small, or the source of the filler too short.
        """
        for unit in self.units():
            if unit[0]["context_length"] in (self.lengths[0], self.lengths[-1]):
                self.case(unit[0])
            for key in unit[1:]:
                require_fit(*self._question(key))
