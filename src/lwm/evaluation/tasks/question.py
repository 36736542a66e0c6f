"""Write prompts around a long context: a question, and filler up to a length in tokens.

A unit of filler is a word, a sentence, a line or a document. A context is encoded separately from
the text around it, so that its length is exact.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count as count_up
from random import Random
from typing import Any

from lwm.core.errors import InputError
from lwm.data.text.templates import choose_template, render, unused_text
from lwm.data.text.tokenizer import Tokenizer
from lwm.evaluation.task import Case, Verdict

_FIRST_STEP = 64  # units
_SLOPE_STEP = 8  # units between two counts that suffice to estimate tokens per unit
_MAX_ESTIMATES = 24
_ANCHOR = 8  # characters before an answer that determine how its first token is encoded


@dataclass(frozen=True, kw_only=True)
class Question:
    """Hold an example of a suite's task, for any length.

    Args:
        before, after: the user's text around the context.
        context: returns the context with a number of units of filler; each unit must add about
            the same number of tokens.
        ideal: the answer that a model scored by logits must follow.
        max_tokens: longest answer; raised if the tokenizer needs more for the ideal one.
        answer_prefix: beginning of the assistant's turn.
        least, most: limits of the number of units.
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


@dataclass(frozen=True)
class Subtask:
    """Hold one task of a suite: what makes a question for a context length, and what judges a
    response by the answers and columns of its question."""

    make: Callable[[Random, int], Question]
    judge: Callable[[Sequence[str], Mapping[str, Any], str], Verdict]


def fit_question(
    question: Question, tokenizer: Tokenizer, template: str, length: int, name: str, fill: bool
) -> Case:
    """Add filler until prompt and `max_tokens` take `length` tokens, or less by under one unit.

    Raise InputError if the question is longer or its filler too short. Without `fill`, add the
    least filler only.
    """
    head, tail = wrap(tokenizer, template, question.before, question.after, question.answer_prefix)
    target = continuation(tokenizer, tail, question.ideal)
    max_tokens = max(question.max_tokens, len(target))

    @lru_cache(maxsize=2)  # the result is often the second-to-last count
    def ids(units: int) -> list[int]:
        return tokenizer.encode(question.context(units), specials=False)

    def count(units: int) -> int:
        return len(head) + len(ids(units)) + len(tail) + max_tokens

    units = question.least
    if count(units) > length:
        raise InputError(
            f"{name} takes at least {count(units):,} tokens and the requested context length is "
            f"{length:,}; choose longer --lengths"
        )
    if fill:
        most = length + units if question.most is None else question.most
        units = most_units(count, length, units, most)
        if units == question.most and count(units) < length:
            raise InputError(
                f"the {question.source} gives {name} {count(units):,} tokens and the requested "
                f"context length is {length:,}; name a longer one or choose shorter --lengths"
            )
    prompt = [*head, *ids(units), *tail]
    return Case(
        prompt=prompt,
        target=target,
        max_tokens=max_tokens,
        reference=list(question.answers),
        columns={"task": name, **question.columns, "prompt_tokens": len(prompt)},
    )


def most_units(count: Callable[[int], int], budget: int, least: int, most: int) -> int:
    """Return the largest number of units whose tokens fit a budget; `least` must fit.

    Each count tokenizes the whole context, so few are made: a guess follows from the slope of the
    two counts before. Repeated guesses on one side take larger steps; after many, bisect.
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


def wrap(
    tokenizer: Tokenizer, template: str, before: str, after: str, answer_prefix: str = ""
) -> tuple[list[int], list[int]]:
    """Return the token ids before and after a context; raise InputError for a useless template.

    Args:
        template: `auto`, `original`, `chatml`, or `none` for the text without a template.
        before, after: the user's text around the context.
        answer_prefix: beginning of the assistant's answer.
    """
    if template == "none":
        bos = tokenizer.bos or ""
        head, tail = bos + tokenizer.escape(before), tokenizer.escape(after)
    else:
        marker = unused_text(before + after + answer_prefix)
        message = {"role": "user", "content": before + marker + after}
        text = render(choose_template(template, tokenizer), [message], tokenizer)
        if text.count(marker) != 1:
            raise InputError(
                "the chat template does not write the user's text once; choose another with "
                "--template"
            )
        head, tail = text.split(marker)
    if answer_prefix and not tail[-1:].isspace() and not answer_prefix[0].isspace():
        tail += " "
    answer_prefix = tokenizer.escape(answer_prefix)
    return tokenizer.encode_part(head), tokenizer.encode_part(tail + answer_prefix)


def continuation(
    tokenizer: Tokenizer, tail: Sequence[int], answer: str, separator: str = " "
) -> list[int]:
    """Encode an answer that follows a prompt, with a separator if it ends without white space."""
    anchor = tokenizer.decode(tail)[-_ANCHOR:]
    if anchor and not anchor[-1].isspace():
        answer = separator + answer
    base = tokenizer.encode(anchor, specials=False)
    both = tokenizer.encode(anchor + answer, specials=False)
    if both[: len(base)] == base:
        return both[len(base) :]
    return tokenizer.encode(answer, specials=False)  # a token would span anchor and answer
