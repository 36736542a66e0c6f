"""Suites of long-context tasks, each as one task with rows of (task, length, seed).

Knows tasks by name; knows no model and draws nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from random import Random
from typing import Literal

from lwm.core.errors import ConfigError, InputError
from lwm.data.text.tokenizer import Tokenizer
from lwm.evaluation.case import Case, Key, Verdict
from lwm.evaluation.tasks import babilong, infinitebench, ruler, ruler_qa
from lwm.evaluation.tasks.sizing import Prose, Question, fitted, require_least
from lwm.evaluation.tasks.subtask import Subtask

SuiteName = Literal["ruler", "babilong", "infinitebench"]
TASKS: Mapping[str, Sequence[str]] = {
    "ruler": ruler.TASKS,
    "babilong": babilong.TASKS,
    "infinitebench": infinitebench.TASKS,
}
FILES = {"qa_1": "--squad", "qa_2": "--hotpot"}
"""Tasks that need a file of questions, and the flag that names it."""
KEYS = ("task", "context_length", "seed")


def chosen(
    suite: SuiteName, tasks: str | None, files: Iterable[str]
) -> tuple[list[str], dict[str, str]]:
    """Names of the tasks to run, and of those left out why.

    Args:
        tasks: names with commas between; all of them unless given.
        files: tasks whose file of questions is there.

    Raises:
        ConfigError: the suite has no such task, or it was asked for and its file was not named.
    """
    known, files = TASKS[suite], set(files)
    wanted = list(known) if tasks is None else list(dict.fromkeys(tasks.split(",")))
    for name in wanted:
        if name not in known:
            raise ConfigError(f"{suite} has no task {name!r}; it has {', '.join(known)}")
        if tasks is not None and name in FILES and name not in files:
            raise ConfigError(
                f"the task {name} needs a file of questions; name one with {FILES[name]}"
            )
    left_out = {
        name: f"no {FILES[name]}" for name in wanted if name in FILES and name not in files
    }
    return [name for name in wanted if name not in left_out], left_out


def subtasks(
    suite: SuiteName,
    names: Sequence[str],
    tokenizer: Tokenizer,
    texts: Iterable[str],
    files: Mapping[str, ruler_qa.Questions],
) -> dict[str, Subtask]:
    """The chosen tasks of a suite.

    Args:
        texts: what things are hidden in; not read where the suite hides nothing in a text.
        files: questions of `qa_1` and `qa_2`.
    """
    if suite == "infinitebench":
        all_of_them = infinitebench.infinitebench()
    elif suite == "babilong":
        all_of_them = babilong.babilong(Prose("\n".join(texts)))
    else:
        all_of_them = ruler.ruler(Prose("\n".join(texts)), tokenizer)
        all_of_them |= {name: ruler_qa.qa(file) for name, file in files.items()}
    return {name: all_of_them[name] for name in names}


class Suite:
    """A suite's tasks at several lengths.

    Args:
        template: how the prompt is written, as `prompts.wrap` takes it.
        lengths: of prompt and answer together, in tokens.
        samples: examples of each task and length.
        seed: of the first example; the following count on.
    """

    def __init__(
        self,
        *,
        name: SuiteName,
        subtasks: Mapping[str, Subtask],
        tokenizer: Tokenizer,
        template: str,
        lengths: Sequence[int],
        samples: int,
        seed: int = 0,
    ) -> None:
        if samples < 1:
            raise ConfigError(f"samples is {samples}; it must be at least 1")
        if not subtasks:
            raise InputError(f"{name} has no task left to run; name some with --tasks")
        self._name, self._subtasks, self._tokenizer = name, subtasks, tokenizer
        self._template, self._lengths = template, lengths
        self._seeds = range(seed, seed + samples)

    @property
    def name(self) -> str:
        return f"suite {self._name}"

    def units(self) -> list[list[Key]]:
        return [
            [{"task": task, "context_length": length, "seed": seed} for seed in self._seeds]
            for length in self._lengths
            for task in self._subtasks
        ]

    def case(self, key: Key) -> Case:
        return fitted(*self._asked(key))

    def _asked(self, key: Key) -> tuple[Question, Tokenizer, str, int, str]:
        """What sizes a question: itself, how it is written, how long, and its task."""
        task, length, seed = (key[name] for name in KEYS)
        assert isinstance(task, str)
        assert isinstance(length, int)
        question = self._subtasks[task].make(Random(f"{task} {length} {seed}"), length)
        return question, self._tokenizer, self._template, length, task

    def judge(self, case: Case, response: str) -> Verdict:
        judge = self._subtasks[case.told["task"]].judge
        return judge(case.reference, case.told, response)

    def require(self) -> None:
        """Builds each task's first example of the least and the greatest length, and all others
        without their filler.

        Raises:
            InputError: one does not come out: a length is too small, or what it is filled from
                ends too early.
        """
        for unit in self.units():
            if unit[0]["context_length"] in (self._lengths[0], self._lengths[-1]):
                self.case(unit[0])
            for key in unit[1:]:
                require_least(*self._asked(key))
