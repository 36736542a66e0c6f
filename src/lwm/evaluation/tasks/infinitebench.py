"""InfiniteBench's three retrieval tasks: a pass key, a string of digits, a value of a JSON object.

Zhang et al. 2024 (arXiv 2402.13718); wording, numbers of tokens to generate and scores are those
of OpenBMB/InfiniteBench, the beginnings of answers those of its prompts for YaRN-Mistral. There
each task has one length; here any. Depths are drawn evenly, where the published sets step through.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from random import Random
from typing import Any

from lwm.evaluation.case import Verdict
from lwm.evaluation.tasks.sizing import Question
from lwm.evaluation.tasks.subtask import Subtask
from lwm.evaluation.tasks.words import random_uuid

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

TASKS = ("passkey", "number_string", "kv_retrieval")


def infinitebench() -> dict[str, Subtask]:
    """The three tasks by name."""
    passkey = partial(
        _hidden_digits,
        "Find it and memorize them.",
        "The pass key is {key}. Remember it. {key} is the pass key.",
        "What is the pass key?",
        "The pass key is",
        6,
        lambda random: "".join(random.choices("0123456789", k=5)),
    )
    number_string = partial(
        _hidden_digits,
        "Find it.",
        "The sequence of digits is {key}. Remember it. {key} is the sequence of digits.",
        "What is the sequence of digits?",
        "The sequence of digits is",
        12,
        _repeating_digits,
    )
    return {
        "passkey": Subtask(make=passkey, judge=_first_number),
        "number_string": Subtask(make=number_string, judge=_first_number),
        "kv_retrieval": Subtask(make=_key_value, judge=_among_words),
    }


def _repeating_digits(random: Random) -> str:
    """Ten digits of which five repeat the one before: hard to copy, for the model must count."""
    digits = random.choices("0123456789", k=5)
    for _ in range(5):
        place = random.randrange(len(digits))
        digits.insert(place, digits[place])
    return "".join(digits)


def _hidden_digits(
    request: str,
    needle: str,
    query: str,
    prefix: str,
    max_tokens: int,
    draw: Any,
    random: Random,
    length: int,
) -> Question:
    key, depth = draw(random), random.random()
    told = needle.format(key=key)

    def context(lines: int) -> str:
        ahead = round(depth * lines)
        return "\n".join([*[NOISE] * ahead, told, *[NOISE] * (lines - ahead)])

    return Question(
        before="There is an important info hidden inside a lot of irrelevant text. "
        f"{request} I will quiz you about the important information there.\n\n",
        after=f"\n\n{query}",
        answer_prefix=f" {prefix}",
        context=context,
        answers=[key],
        ideal=key,
        max_tokens=max_tokens,
        told={"question": query, "depth_percent": round(100 * depth, 1)},
    )


def _key_value(random: Random, length: int) -> Question:
    key, value = random_uuid(random), random_uuid(random)
    depth = random.random()
    others: list[str] = []

    def context(pairs: int) -> str:
        while len(others) < pairs:
            others.append(f'"{random_uuid(random)}": "{random_uuid(random)}"')
        ahead = round(depth * pairs)
        told = [*others[:ahead], f'"{key}": "{value}"', *others[ahead:pairs]]
        return f"JSON data:\n{{{', '.join(told)}}}"

    query = f'Key: "{key}"\nThe value associated with the specified key is: '
    return Question(
        before="Extract the value corresponding to the specified key in the JSON object below."
        "\n\n",
        after=f"\n\n{query}",
        context=context,
        answers=[value],
        ideal=f'"{value}"',
        max_tokens=50,
        told={"question": query, "depth_percent": round(100 * depth, 1)},
    )


def _first_number(answers: Sequence[str], told: Mapping[str, Any], response: str) -> Verdict:
    """The first run of digits is the answer."""
    found = re.search(r"[0-9]+", response)
    correct = found is not None and found[0] == answers[0]
    return Verdict(correct=correct, score=float(correct))


def _among_words(answers: Sequence[str], told: Mapping[str, Any], response: str) -> Verdict:
    """The answer is one of the response's words, parted at blanks and punctuation."""
    correct = answers[0] in re.split(r"[\s:\"'.,?!{}]+", response)
    return Verdict(correct=correct, score=float(correct))
