"""BABILong: facts of a story scattered in their order through a long text, and a question.

Tasks qa1 to qa5 of Kuratov et al. 2024 (arXiv 2406.10149): prompts, 20 tokens of answer, the
words that count as answers, and the score are those of booydar/babilong. Stories are made by our
own `stories` in place of bAbI's files, and the text is the user's in place of PG-19.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

from lwm.evaluation.case import Verdict
from lwm.evaluation.tasks.sizing import Prose, Question
from lwm.evaluation.tasks.stories import (
    GIVERS,
    OBJECTS,
    PLACES,
    Story,
    where_is_a_person,
    where_is_an_object,
    where_was_an_object,
    which_place_lies_there,
    who_gave_what_to_whom,
)
from lwm.evaluation.tasks.subtask import Subtask

MAX_TOKENS = 20


@dataclass(frozen=True, kw_only=True)
class _Form:
    """A task's stories and prompt, in the words of the published one.

    Args:
        labels: words that count as answers.
        examples: each a story with its question, and the answer.
    """

    tell: Callable[[Random], Story]
    labels: Sequence[str]
    instruction: str
    examples: Sequence[tuple[str, str]]
    request: str


_ITEMS_MOVE_ALONG = (
    "I give you context with the facts about locations and actions of different "
    "persons hidden in some random text and a question. You need to answer the question based "
    "only on the information from the facts.\n"
    "If a person got an item in the first location and travelled to the second location the "
    "item is also in the second location. If a person dropped an item in the first location "
    "and moved to the second location the item remains in the first location."
)

_FORMS = {
    "qa1": _Form(
        tell=where_is_a_person,
        labels=PLACES,
        instruction="I will give you context with the facts about positions of different persons "
        "hidden in some random text and a question. You need to answer the question based only on "
        "the information from the facts. If a person was in different locations, use the latest "
        "location to answer the question.",
        examples=(
            (
                "Charlie went to the hallway. Judith come back to the kitchen. Charlie travelled "
                "to balcony. Where is Charlie?",
                "The most recent location of Charlie is balcony.",
            ),
            (
                "Alan moved to the garage. Charlie went to the beach. Alan went to the shop. "
                "Rouse travelled to balcony. Where is Alan?",
                "The most recent location of Alan is shop.",
            ),
        ),
        request="Always return your answer in the following format: The most recent location of "
        "’person’ is ’location’. Do not write anything else after that.",
    ),
    "qa2": _Form(
        tell=where_is_an_object,
        labels=PLACES,
        instruction=_ITEMS_MOVE_ALONG,
        examples=(
            (
                "Charlie went to the kitchen. Charlie got a bottle. Charlie moved to the balcony. "
                "Where is the bottle?",
                "The bottle is in the balcony.",
            ),
            (
                "Alan moved to the garage. Alan got a screw driver. Alan moved to the kitchen. "
                "Where is the screw driver?",
                "The screw driver is in the kitchen.",
            ),
        ),
        request="Always return your answer in the following format: The ’item’ is in ’location’. "
        "Do not write anything else after that.",
    ),
    "qa3": _Form(
        tell=where_was_an_object,
        labels=PLACES,
        instruction=_ITEMS_MOVE_ALONG,
        examples=(
            (
                "John journeyed to the bedroom. Mary grabbed the apple. Mary went back to the "
                "bathroom. Daniel journeyed to the bedroom. Daniel moved to the garden. Mary "
                "travelled to the kitchen. Where was the apple before the kitchen?",
                "Before the kitchen the apple was in the bathroom.",
            ),
            (
                "John went back to the bedroom. John went back to the garden. John went back to "
                "the kitchen. Sandra took the football. Sandra travelled to the garden. Sandra "
                "journeyed to the bedroom. Where was the football before the bedroom?",
                # The published prompt says "Before the kitchen" here, which contradicts it.
                "Before the bedroom the football was in the garden.",
            ),
        ),
        request="Always return your answer in the following format: Before the $location_1$ the "
        "$item$ was in the $location_2$. Do not write anything else after that.",
    ),
    "qa4": _Form(
        tell=which_place_lies_there,
        labels=PLACES,
        instruction="I will give you context with the facts about different people, their "
        "location and actions, hidden in some random text and a question. You need to answer the "
        "question based only on the information from the facts.",
        examples=(
            (
                "The hallway is south of the kitchen. The bedroom is north of the kitchen. What "
                "is the kitchen south of?",
                "bedroom",
            ),
            (
                "The garden is west of the bedroom. The bedroom is west of the kitchen. What is "
                "west of the bedroom?",
                "garden",
            ),
        ),
        request="Your answer should contain only one word - location. Do not write anything else "
        "after that.",
    ),
    "qa5": _Form(
        tell=who_gave_what_to_whom,
        labels=(*GIVERS, *OBJECTS),
        instruction="I will give you context with the facts about locations and their relations "
        "hidden in some random text and a question. You need to answer the question based only on "
        "the information from the facts.",
        examples=(
            (
                "Mary picked up the apple there. Mary gave the apple to Fred. Mary moved to the "
                "bedroom. Bill took the milk there. Who did Mary give the apple to?",
                "Fred",
            ),
            (
                "Jeff took the football there. Jeff passed the football to Fred. Jeff got the "
                "milk there. Bill travelled to the bedroom. Who gave the football?",
                "Jeff",
            ),
            (
                "Fred picked up the apple there. Fred handed the apple to Bill. Bill journeyed to "
                "the bedroom. Jeff went back to the garden. What did Fred give to Bill?",
                "apple",
            ),
        ),
        request="Your answer should contain only one word. Do not write anything else after that. "
        "Do not explain your answer.",
    ),
}

TASKS = tuple(_FORMS)


def babilong(prose: Prose) -> dict[str, Subtask]:
    """The five tasks by name.

    Args:
        prose: what the facts are hidden in.
    """
    return {
        name: Subtask(make=partial(_make, form, prose), judge=partial(_judge, form))
        for name, form in _FORMS.items()
    }


def _make(form: _Form, prose: Prose, random: Random, length: int) -> Question:
    story = form.tell(random)
    depths = sorted(random.random() for _ in story.facts)
    text = prose.rotated(random.random())
    examples = "\n".join(
        f"<example>\n{told}\nAnswer: {answer}\n</example>" for told, answer in form.examples
    )
    return Question(
        before=f"{form.instruction}\n{examples}\n{form.request}\n<context>\n",
        after=f"\n</context>\nQuestion: {story.question}",
        context=lambda words: text.hiding(words, story.facts, depths),
        answers=[story.answer],
        ideal=story.sentence,
        max_tokens=MAX_TOKENS,
        most=len(prose),
        told={"question": story.question, "facts": len(story.facts)},
    )


def _judge(form: _Form, answers: Sequence[str], told: Mapping[str, Any], response: str) -> Verdict:
    correct = names_it_alone(response, answers[0], form.labels, told["question"])
    return Verdict(correct=correct, score=float(correct))


def names_it_alone(response: str, answer: str, labels: Sequence[str], question: str) -> bool:
    """Whether the first sentence of a response names the answer and no other label; labels of the
    question do not count, for they are never answers."""
    said = response.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    known = {label.lower() for label in labels}
    named = {label for label in known if label in said and label not in question.lower()}
    return named == {answer.lower()}
