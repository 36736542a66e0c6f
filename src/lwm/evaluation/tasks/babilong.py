"""Make BABILong's tasks: the facts of a story scattered through a long text, and a question.

Source: tasks qa1 to qa5 of Kuratov et al. 2024 (arXiv 2406.10149). Prompts, answer length, the
words that count as answers, and the score are those of booydar/babilong. `stories` replaces the
files of bAbI, and the user's text replaces PG-19.
"""

import tomllib
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.resources import files
from random import Random
from typing import Any

from lwm.evaluation.task import Verdict
from lwm.evaluation.tasks import stories
from lwm.evaluation.tasks.filler import Prose
from lwm.evaluation.tasks.question import Question, Subtask
from lwm.evaluation.tasks.stories import GIVERS, OBJECTS, PLACES, StoryMaker

# What makes the stories of each task, and the words that count as answers.
_STORIES: Mapping[str, tuple[StoryMaker, Sequence[str]]] = {
    "qa1": (stories.place_of_person, PLACES),
    "qa2": (stories.place_of_object, PLACES),
    "qa3": (stories.past_place_of_object, PLACES),
    "qa4": (stories.relative_place, PLACES),
    "qa5": (stories.gift, (*GIVERS, *OBJECTS)),
}

TASKS = tuple(_STORIES)


def babilong(prose: Prose) -> dict[str, Subtask]:
    """Return the five tasks by name, which hide facts in a text."""
    text = files("lwm.evaluation.tasks").joinpath("babilong.toml").read_text(encoding="utf-8")
    prompts = tomllib.loads(text)
    return {
        name: Subtask(partial(_make, prompts[name], story, prose), partial(_judge, labels))
        for name, (story, labels) in _STORIES.items()
    }


def _make(
    prompt: Mapping[str, Any], make_story: StoryMaker, prose: Prose, random: Random, length: int
) -> Question:
    story = make_story(random)
    depths = sorted(random.random() for _ in story.facts)
    text = prose.rotated(random.random())
    examples = "\n".join(
        f"<example>\n{example['story']}\nAnswer: {example['answer']}\n</example>"
        for example in prompt["examples"]
    )
    return Question(
        before=f"{prompt['instruction']}\n{examples}\n{prompt['request']}\n<context>\n",
        after=f"\n</context>\nQuestion: {story.question}",
        context=lambda words: text.hiding(words, story.facts, depths),
        answers=[story.answer],
        ideal=story.sentence,
        max_tokens=20,
        most=len(prose),
        columns={"question": story.question, "facts": len(story.facts)},
    )


def _judge(
    labels: Sequence[str], answers: Sequence[str], columns: Mapping[str, Any], response: str
) -> Verdict:
    return names_only(answers[0], response, labels, columns["question"])


def names_only(answer: str, response: str, labels: Sequence[str], question: str) -> bool:
    """Return whether the first sentence of a response names the answer and no other label that
    the question does not name."""
    sentence = response.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    named = {
        label
        for label in map(str.lower, labels)
        if label in sentence and label not in question.lower()
    }
    return named == {answer.lower()}
