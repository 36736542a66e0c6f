"""Make RULER's procedural tasks: eight of needles, variables to trace, words that are common.

To add a task:

1. Add its prompt to `ruler.toml`.
2. Write a function `(sources, random, length) -> Question` like `_frequent_words` below. Its
   question has a function that returns the context with a number of units of filler, and the
   answers; `question.py` fills it up to any length. Take all randomness from `random`.
3. Add a line to `_TASKS` at the end of this file. `lwm eval suite ruler --tasks NAME` runs it, and
   tests/evaluation/tasks/test_suites.py checks it. Responses are judged by `string_match_all`.

Source: Hsieh et al. 2024 (arXiv 2404.06654). Templates, beginnings of answers, answer lengths,
settings and scores are those of NVIDIA/RULER (scripts/synthetic.yaml). Differences: the user's
text replaces the essays and is not repeated if it is too short; keys are compounds of our own
words; `cwe` takes words from our list and from the text; keys of one example are distinct.
"""

import math
import re
import string
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from itertools import islice, pairwise
from random import Random
from typing import Any

from lwm.data.text.tokenizer import Tokenizer
from lwm.evaluation.task import Verdict
from lwm.evaluation.tasks.filler import (
    NOISE,
    Prose,
    distinct,
    distinct_words,
    plain_words,
    random_uuid,
    scatter,
)
from lwm.evaluation.tasks.question import Question, Subtask, most_units


@dataclass(frozen=True)
class _Sources:
    prose: Prose
    words: Sequence[str]
    tokenizer: Tokenizer

    def tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text, specials=False))


def ruler(prose: Prose, tokenizer: Tokenizer) -> dict[str, Subtask]:
    """Return the procedural tasks by name; the text replaces the essays."""
    sources = _Sources(prose, plain_words(prose.words), tokenizer)
    return {
        name: Subtask(make=partial(make, sources), judge=string_match_all)
        for name, make in _TASKS.items()
    }


_PROMPTS = tomllib.loads(
    files("lwm.evaluation.tasks").joinpath("ruler.toml").read_text(encoding="utf-8")
)


def _prompt(name: str, **values: Any) -> dict[str, Any]:
    """Return what a prompt of `ruler.toml` determines of a `Question`."""
    prompt = _PROMPTS[name]
    values["question"] = prompt["question"].format(**values)
    parts = {part: prompt[part].format(**values) for part in ("before", "after", "answer_prefix")}
    columns = {"question": values["question"]}
    return {**parts, "max_tokens": prompt["max_tokens"], "columns": columns}


def string_match_all(answers: Sequence[str], columns: Mapping[str, Any], response: str) -> Verdict:
    """Return which of the answers the response contains, ignoring case."""
    text = re.sub(r"[\x00-\x1f]", "\n", response.strip()).strip().lower()
    correct = [answer.lower() in text for answer in answers]
    return correct[0] if len(correct) == 1 else correct


def string_match_part(
    answers: Sequence[str], columns: Mapping[str, Any], response: str
) -> Verdict:
    """Return whether the response contains any of the answers, ignoring case."""
    verdict = string_match_all(answers, columns, response)
    return verdict if isinstance(verdict, bool) else any(verdict)


def _enumerate(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}, and {words[-1]}"


def _number(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


# Needles

_DEPTHS = [step / 39 for step in range(40)]
_RANDOM_VALUES: Mapping[str, Callable[[Random], Iterator[str]]] = {
    "words": lambda random: distinct_words(random, ()),
    "numbers": partial(distinct, lambda random: str(random.randint(10**6, 10**7 - 1))),
    "uuids": partial(distinct, random_uuid),
}


def _needles(
    sources: _Sources,
    random: Random,
    length: int,
    *,
    filler: str = "essay",
    keys: str = "words",
    values: str = "numbers",
    num_keys: int = 1,
    num_values: int = 1,
    num_queries: int = 1,
) -> Question:
    """Hide sentences that assign values to keys among an essay, noise, or other needles."""
    next_key, next_value = _RANDOM_VALUES[keys](random), _RANDOM_VALUES[values](random)

    def sentence(key: str, value: str) -> str:
        return f"One of the special magic {values} for {key} is: {value}."

    hidden = {next(next_key): list(islice(next_value, num_values)) for _ in range(num_keys)}
    needles = [sentence(key, value) for key, several in hidden.items() for value in several]
    random.shuffle(needles)
    queried = random.sample(list(hidden), num_queries)
    prose = sources.prose if filler == "essay" else None
    if prose is not None:
        depths = sorted(random.sample(_DEPTHS, len(needles)))
        context = partial(prose.hiding, sentences=needles, depths=depths)
    else:
        depths = sorted(random.random() for _ in needles)
        lines: list[str] = []

        def context(count: int) -> str:
            while len(lines) < count:
                noise = filler == "noise"
                lines.append(NOISE if noise else sentence(next(next_key), next(next_value)))
            return "\n".join(scatter(needles, lines[:count], depths))

    answers = [value for key in queried for value in hidden[key]]
    name = "niah_one" if len(answers) == 1 else "niah_several"
    return Question(
        **_prompt(name, value=values[:-1], keys=_enumerate(queried)),
        context=context,
        answers=answers,
        ideal=_enumerate(answers) + ".",
        least=0 if prose else 1,
        most=None if prose is None else len(prose),
    )


# Variables

_HOPS = 4
_EXAMPLE_TOKENS = 500


def _variables(sources: _Sources, random: Random, length: int) -> Question:
    """Make `vt`: find all variables that a value is passed to, after a solved example."""
    solved = _variable_chain(random, letters=3)

    def example(lines: int) -> str:
        prompt = f"{solved.before}{solved.context(lines)}{solved.after}{solved.answer_prefix}"
        return f"{prompt} {solved.ideal}\n\n"

    def tokens(lines: int) -> int:
        return sources.tokens(example(lines))

    lines = least = solved.least
    if tokens(least) <= _EXAMPLE_TOKENS:
        lines = most_units(tokens, _EXAMPLE_TOKENS, least, _EXAMPLE_TOKENS)
    return _variable_chain(random, letters=5, example=example(lines))


def _variable_chain(random: Random, letters: int, example: str = "") -> Question:
    names = distinct(lambda r: "".join(r.choices(string.ascii_uppercase, k=letters)), random)
    chain = list(islice(names, _HOPS + 1))
    value = random.randint(10_000, 99_999)
    lines = [f"VAR {chain[0]} = {value}"]
    lines += [f"VAR {new} = VAR {old} " for old, new in pairwise(chain)]
    depths = sorted(random.random() for _ in lines)
    return Question(
        **_prompt("vt", example=example, value=value, count=len(chain)),
        context=lambda noises: "\n".join(scatter(lines, [NOISE] * noises, depths)),
        answers=chain,
        ideal=" ".join(chain),
        least=1,
    )


# Common and frequent words

_SHORT = 4096  # tokens; below, the words are repeated less often
_COMMON = 10


def _common_words(sources: _Sources, random: Random, length: int) -> Question:
    """Make `cwe`: find the ten common words of a numbered list, after a solved example."""
    short = length < _SHORT
    often, seldom = (6, 1) if short else (30, 3)
    sample = Random(0).sample(sources.words, 100)
    tokens_per_word = sources.tokens(_number(sample)) / len(sample)
    # A list that would use up all words has compounds only, so that the ten do not stand out.
    enough = length / (tokens_per_word * seldom) < len(sources.words)
    words = distinct_words(random, sources.words if enough else ())
    example_size, example_often, example_seldom = (20, 3, 1) if short else (40, 10, 3)
    example = list(islice(words, example_size))
    common = list(islice(words, _COMMON))
    order = random.getrandbits(64)
    rare: list[str] = []

    def context(count: int) -> str:
        rare.extend(islice(words, max(0, count - len(rare))))
        return _shuffled(common, rare[:count], often, seldom, Random(order))

    solved = _shuffled(example[:_COMMON], example[_COMMON:], example_often, example_seldom, random)
    prompt = _prompt("cwe", example="")
    solved = f"{prompt['before']}{solved}{prompt['after']}{prompt['answer_prefix']}"
    return Question(
        **_prompt("cwe", example=f"{solved} {_number(example[:_COMMON])}\n"),
        context=context,
        answers=common,
        ideal=_number(common),
        least=_COMMON,
    )


def _shuffled(
    common: Sequence[str], rare: Sequence[str], often: int, seldom: int, random: Random
) -> str:
    words = [*common] * often + [*rare] * seldom
    random.shuffle(words)
    return _number(words)


_LEAST_CODED = 53  # the fourth word is more frequent than the fifth, in spite of rounding


def _frequent_words(sources: _Sources, random: Random, length: int) -> Question:
    """Make `fwe`: find the most frequent of invented words; frequencies have a zeta distribution
    with alpha 2, and the most frequent word is dots, to be ignored."""
    words = distinct(lambda r: "".join(r.choices(string.ascii_lowercase, k=6)), random)
    kinds = max((length - 50) // 50, 5)
    ranked = ["...", *islice(words, kinds - 1)]
    order = random.getrandbits(64)

    def context(count: int) -> str:
        repeats = (int(count * 6 / math.pi**2 / rank**2) for rank in range(1, kinds + 1))
        text = [word for word, n in zip(ranked, repeats, strict=True) for _ in range(n)]
        Random(order).shuffle(text)
        return " ".join(text)

    return Question(
        **_prompt("fwe"),
        context=context,
        answers=ranked[1:4],
        ideal=_enumerate(ranked[1:4]) + ".",
        least=_LEAST_CODED,
    )


_TASKS: Mapping[str, Callable[[_Sources, Random, int], Question]] = {
    "niah_single_1": partial(_needles, filler="noise"),
    "niah_single_2": _needles,
    "niah_single_3": partial(_needles, values="uuids"),
    "niah_multikey_1": partial(_needles, num_keys=4),
    "niah_multikey_2": partial(_needles, filler="needles"),
    "niah_multikey_3": partial(_needles, filler="needles", keys="uuids", values="uuids"),
    "niah_multivalue": partial(_needles, num_values=4),
    "niah_multiquery": partial(_needles, num_keys=4, num_queries=4),
    "vt": _variables,
    "cwe": _common_words,
    "fwe": _frequent_words,
}

TASKS = (*_TASKS, "qa_1", "qa_2")
"""All tasks of the suite; those of question answering are in `ruler_qa`."""
