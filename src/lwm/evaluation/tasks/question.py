"""Define a suite's question, whose context grows by units of filler, and fit it to a length.

A unit is a word, a sentence, a line or a document. Lengths are counted in tokens of the model's
tokenizer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count as count_up
from random import Random
from typing import Any

from lwm.core.errors import InputError
from lwm.data.text.tokenizer import Tokenizer
from lwm.evaluation.case import Case, Verdict
from lwm.evaluation.tasks.prompts import continuation, wrap

_FIRST_STEP = 64  # units
_SLOPE_STEP = 8  # units between two counts that suffice to estimate tokens per unit
_MAX_ESTIMATES = 24


@dataclass(frozen=True, kw_only=True)
class Question:
    """Hold an example of a suite's task, for any length.

    Args:
        before, after: the user's text around the context.
        context: returns the context with a number of units of filler; each unit must add about
            the same number of tokens.
        answers: what the response is judged by.
        ideal: the answer that a model scored by logits must follow.
        max_tokens: longest answer; raised if the tokenizer needs more for the ideal one.
        answer_prefix: beginning of the assistant's turn.
        least: smallest number of units.
        most: largest number of units; None if the filler has no end.
        source: where the filler comes from, for error messages.
        columns: further columns of the row.
    """

    before: str
    after: str
    context: Callable[[int], str]
    answers: Sequence[str]
    ideal: str
    max_tokens: int
    answer_prefix: str = ""
    least: int = 0
    most: int | None = None
    source: str = "haystack"
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Subtask:
    """Hold one task of a suite.

    Args:
        make: makes a question from a random generator and the context length it will have; the
            same state of the generator gives the same question.
        judge: judges a response by the answers and columns of its question.
    """

    make: Callable[[Random, int], Question]
    judge: Callable[[Sequence[str], Mapping[str, Any], str], Verdict]


def fit_question(
    question: Question, tokenizer: Tokenizer, template: str, length: int, name: str
) -> Case:
    """Add as much filler to a question as its length allows.

    Prompt and `max_tokens` together take `length` tokens, or less by under one unit.

    Args:
        name: of the task, for error messages.

    Raises:
        InputError: the question is longer than `length`, or its filler is too short.
    """
    head, tail, target, max_tokens = _parts(question, tokenizer, template)
    around = len(head) + len(tail) + max_tokens

    @lru_cache(maxsize=2)  # the result is often the last count but one
    def ids(units: int) -> list[int]:
        return tokenizer.encode(question.context(units), specials=False)

    def count(units: int) -> int:
        return around + len(ids(units))

    _require_length(count(question.least), length, name)
    most = length + question.least if question.most is None else question.most
    units = most_units(count, length, question.least, most)
    if units == question.most and (longest := count(units)) < length:
        raise InputError(
            f"the {question.source} gives {name} {longest:,} tokens and the requested context "
            f"length is {length:,}; name a longer one or choose shorter --lengths"
        )
    prompt = [*head, *ids(units), *tail]
    return Case(
        prompt=prompt,
        target=target,
        max_tokens=max_tokens,
        reference=list(question.answers),
        columns={"task": name, **question.columns, "prompt_tokens": len(prompt)},
    )


def require_fit(
    question: Question, tokenizer: Tokenizer, template: str, length: int, name: str
) -> None:
    """Refuse a question that is longer than `length` with the least filler.

    Raises:
        InputError: names the least length.
    """
    head, tail, _, max_tokens = _parts(question, tokenizer, template)
    context = tokenizer.encode(question.context(question.least), specials=False)
    _require_length(len(head) + len(context) + len(tail) + max_tokens, length, name)


def _require_length(least: int, length: int, name: str) -> None:
    if least > length:
        raise InputError(
            f"{name} takes at least {least:,} tokens and the requested context length is "
            f"{length:,}; choose longer --lengths"
        )


def _parts(
    question: Question, tokenizer: Tokenizer, template: str
) -> tuple[list[int], list[int], list[int], int]:
    """Return the ids before and after the context, the ideal answer, and room for an answer."""
    head, tail = wrap(tokenizer, template, question.before, question.after, question.answer_prefix)
    target = continuation(tokenizer, tail, question.ideal)
    return head, tail, target, max(question.max_tokens, len(target))


def most_units(count: Callable[[int], int], budget: int, least: int, most: int) -> int:
    """Return the largest number of units whose tokens fit a budget.

    Each count tokenizes the whole context, so few are made: a guess follows from the slope of the
    two counts before. Guesses that stay on one side of the budget take larger and larger steps,
    and after many guesses the interval is bisected.

    Args:
        count: returns the tokens of a number of units; it grows about evenly, and `least` fits.
    """
    low, high = least, most + 1  # `low` fits, `high` does not
    last, last_count = least, count(least)
    slope, side, step = 0.0, 0, 1
    for turn in count_up():
        if high - low <= 1:
            return low
        if turn > _MAX_ESTIMATES:
            guess = (low + high) // 2
        elif not slope:
            guess = low + _FIRST_STEP
        else:
            guess = last + int((budget - last_count) / slope)
            guess = max(guess, low + step) if side > 0 else min(guess, high - step)
        guess = min(max(guess, low + 1), high - 1)
        tokens = count(guess)
        if abs(guess - last) >= _SLOPE_STEP and tokens != last_count:
            slope = (tokens - last_count) / (guess - last)
        last, last_count = guess, tokens
        if tokens <= budget:
            low, step, side = guess, step * 2 if side > 0 else 1, 1
        else:
            high, step, side = guess, step * 2 if side < 0 else 1, -1
    raise AssertionError
