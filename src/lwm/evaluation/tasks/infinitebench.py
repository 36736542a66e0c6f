"""Make InfiniteBench's three retrieval tasks: a pass key, a string of digits, a JSON value.

Source: Zhang et al. 2024 (arXiv 2402.13718). Wording, answer lengths and scores are those of
OpenBMB/InfiniteBench; beginnings of answers are those of its prompts for YaRN-Mistral. Two things
differ: lengths are arbitrary, and depths are uniformly random instead of evenly spaced.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from random import Random
from typing import Any

from lwm.evaluation.task import Verdict
from lwm.evaluation.tasks.filler import NOISE, random_uuid
from lwm.evaluation.tasks.question import Question, Subtask


def _hidden_digits(
    what: str, request: str, repeats: int, max_tokens: int, random: Random, length: int
) -> Question:
    drawn = random.choices("0123456789", k=5)
    for _ in range(repeats):  # a model that copies must count repeated digits
        place = random.randrange(len(drawn))
        drawn.insert(place, drawn[place])
    digits, depth = "".join(drawn), random.random()
    needle = f"The {what} is {digits}. Remember it. {digits} is the {what}."
    query = f"What is the {what}?"

    def context(lines: int) -> str:
        before = round(depth * lines)
        return "\n".join([*[NOISE] * before, needle, *[NOISE] * (lines - before)])

    return Question(
        before="There is an important info hidden inside a lot of irrelevant text. "
        f"{request} I will quiz you about the important information there.\n\n",
        after=f"\n\n{query}",
        answer_prefix=f" The {what} is",
        context=context,
        answers=[digits],
        ideal=digits,
        max_tokens=max_tokens,
        columns={"question": query, "depth_percent": round(100 * depth, 1)},
    )


def _key_value(random: Random, length: int) -> Question:
    key, value = random_uuid(random), random_uuid(random)
    depth = random.random()
    others: list[str] = []

    def context(pairs: int) -> str:
        while len(others) < pairs:
            others.append(f'"{random_uuid(random)}": "{random_uuid(random)}"')
        before = round(depth * pairs)
        shown = [*others[:before], f'"{key}": "{value}"', *others[before:pairs]]
        return f"JSON data:\n{{{', '.join(shown)}}}"

    query = f'Key: "{key}"\nThe value associated with the specified key is: '
    return Question(
        before="Extract the value corresponding to the specified key in the JSON object below."
        "\n\n",
        after=f"\n\n{query}",
        context=context,
        answers=[value],
        ideal=f'"{value}"',
        max_tokens=50,
        columns={"question": query, "depth_percent": round(100 * depth, 1)},
    )


def _judge_number(answers: Sequence[str], columns: Mapping[str, Any], response: str) -> Verdict:
    return re.findall(r"[0-9]+", response)[:1] == list(answers)


def _judge_words(answers: Sequence[str], columns: Mapping[str, Any], response: str) -> Verdict:
    return answers[0] in re.split(r"[\s:\"'.,?!{}]+", response)


_passkey = partial(_hidden_digits, "pass key", "Find it and memorize them.", 0, 6)
_number_string = partial(_hidden_digits, "sequence of digits", "Find it.", 5, 12)
SUBTASKS = {
    "passkey": Subtask(make=_passkey, judge=_judge_number),
    "number_string": Subtask(make=_number_string, judge=_judge_number),
    "kv_retrieval": Subtask(make=_key_value, judge=_judge_words),
}
