"""Questions whose context grows by units of filler, made as long as a length allows.

A suite says what the context is with any number of units (words, sentences, lines, documents); the
number that fills a length is found here, in tokens of any tokenizer. Knows no suite and no model.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count as count_up
from typing import Any

from lwm.core.errors import InputError
from lwm.data.text.tokenizer import Tokenizer
from lwm.evaluation.case import Case
from lwm.evaluation.tasks.prompts import wrap

_ANCHOR = 8  # characters before an answer that decide how its first token is written
_STEP = 64  # units of the first guess
_APART = 8  # units between two guesses that tell how fast tokens grow
_PATIENCE = 24  # guesses
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*$")
_RARE = 200  # words; a text with fewer sentences than one in so many has no sentences to speak of
_INSTEAD = 20  # words that then count as one


@dataclass(frozen=True, kw_only=True)
class Question:
    """An example of a suite, of any length.

    Args:
        before, after: the user's words round the context.
        context: what the context is with so many units of filler; what a unit more adds is about
            the same each time.
        answers: what the response is judged by.
        ideal: the answer that a model scored by logits must follow.
        max_tokens: longest answer; more where the tokenizer needs more for the ideal one.
        answer_prefix: what the assistant's turn begins with.
        least: units without which there is no question.
        most: units that the filler's source has; None where it has no end.
        source: what the filler comes from, for messages.
        told: further columns of the row.
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
    told: Mapping[str, Any] = field(default_factory=dict)


def fitted(
    question: Question, tokenizer: Tokenizer, template: str, length: int, name: str
) -> Case:
    """The question with as much filler as leaves room for the answer: prompt and `max_tokens`
    take `length` tokens, or less by under a unit.

    Args:
        name: of the task, for messages.

    Raises:
        InputError: the length is too small for the question, or the filler ends before it.
    """
    head, tail, target, max_tokens = _parts(question, tokenizer, template)
    around = len(head) + len(tail) + max_tokens

    @lru_cache(maxsize=2)  # the last guess but one is often the answer
    def ids(units: int) -> list[int]:
        return tokenizer.encode(question.context(units), specials=False)

    def count(units: int) -> int:
        return around + len(ids(units))

    _require(count(question.least), length, name)
    most = length + question.least if question.most is None else question.most
    units = fullest(count, length, question.least, most)
    if units == question.most and (longest := count(units)) < length:
        raise InputError(
            f"the {question.source} gives {name} {longest:,} tokens and the context length asked "
            f"for is {length:,}; give a longer one or choose shorter --lengths"
        )
    prompt = [*head, *ids(units), *tail]
    return Case(
        prompt=prompt,
        target=target,
        max_tokens=max_tokens,
        reference=list(question.answers),
        told={"task": name, **question.told, "prompt_tokens": len(prompt)},
    )


def require_least(
    question: Question, tokenizer: Tokenizer, template: str, length: int, name: str
) -> None:
    """Raises:
    InputError: the length is too small for the question without filler.
    """
    head, tail, _, max_tokens = _parts(question, tokenizer, template)
    context = tokenizer.encode(question.context(question.least), specials=False)
    _require(len(head) + len(context) + len(tail) + max_tokens, length, name)


def _require(least: int, length: int, name: str) -> None:
    if least > length:
        raise InputError(
            f"{name} takes at least {least:,} tokens and the context length asked for is "
            f"{length:,}; choose longer --lengths"
        )


def _parts(
    question: Question, tokenizer: Tokenizer, template: str
) -> tuple[list[int], list[int], list[int], int]:
    """Ids before and behind the context, the ideal answer's, and room for an answer."""
    head, tail = wrap(tokenizer, template, question.before, question.after, question.answer_prefix)
    target = continuation(tokenizer, tail, question.ideal)
    return head, tail, target, max(question.max_tokens, len(target))


def fullest(count: Callable[[int], int], budget: int, least: int, most: int) -> int:
    """The number of units that fills a budget: it fits, and one more does not, or is `most`.

    Counting costs a tokenisation of the whole, so each guess follows from the two before; guesses
    that fall on the same side again and again go further each time, and many guesses are halved.

    Args:
        count: tokens with so many units; grows about evenly. With `least` it must fit.
    """
    low, high = least, most + 1  # the answer is from low to below high
    last, last_count = least, count(least)
    slope, same, push = 0.0, 0, 1
    for turn in count_up():
        if high - low <= 1:
            return low
        if turn > _PATIENCE:
            guess = (low + high) // 2
        elif not slope:
            guess = low + _STEP
        else:
            guess = last + int((budget - last_count) / slope)
            guess = max(guess, low + push) if same > 0 else min(guess, high - push)
        guess = min(max(guess, low + 1), high - 1)
        found = count(guess)
        if abs(guess - last) >= _APART and found != last_count:
            slope = (found - last_count) / (guess - last)
        last, last_count = guess, found
        if found <= budget:
            low, push, same = guess, push * 2 if same > 0 else 1, 1
        else:
            high, push, same = guess, push * 2 if same < 0 else 1, -1
    raise AssertionError


def continuation(
    tokenizer: Tokenizer, tail: Sequence[int], answer: str, between: str = " "
) -> list[int]:
    """Tokens of an answer behind the end of a prompt.

    Args:
        between: what parts them where the prompt ends with no blank.
    """
    anchor = tokenizer.decode(tail)[-_ANCHOR:]
    if anchor and not anchor[-1].isspace():
        answer = between + answer
    base = tokenizer.encode(anchor, specials=False)
    whole = tokenizer.encode(anchor + answer, specials=False)
    if whole[: len(base)] == base:
        return whole[len(base) :]
    return tokenizer.encode(answer, specials=False)  # the anchor's last token would swallow some


class Prose:
    """Text to hide sentences in: its words, and where its sentences end."""

    def __init__(self, text: str) -> None:
        words = text.split()
        ends = [place for place, word in enumerate(words, 1) if _SENTENCE_END.search(word)]
        if len(ends) * _RARE < len(words):
            ends = list(range(_INSTEAD, len(words), _INSTEAD))
        self.words, self._ends = words, ends

    def __len__(self) -> int:
        return len(self.words)

    def rotated(self, depth: float) -> "Prose":
        """The same text from another sentence on, and its beginning behind its end.

        Args:
            depth: where the sentence is, from 0 to below 1.
        """
        place = int(depth * len(self._ends))
        start = self._ends[place] if self._ends else 0
        other = Prose.__new__(Prose)
        other.words = self.words[start:] + self.words[:start]
        other._ends = [end - start for end in self._ends[place + 1 :]]
        other._ends += [end + len(self.words) - start for end in self._ends[: place + 1]]
        return other

    def hiding(self, count: int, sentences: Sequence[str], depths: Sequence[float]) -> str:
        """The first words, with sentences put between those of the text.

        Args:
            count: words of the text.
            depths: where each sentence goes, ascending, from 0 (before all) to 1 (behind all).
        """
        bounds = [0, *self._ends[: bisect_left(self._ends, count)], count]
        parts, last = [], 0
        for sentence, depth in zip(sentences, depths, strict=True):
            place = bounds[int((len(bounds) - 1) * depth)]
            parts += [*self.words[last:place], sentence]
            last = place
        return " ".join([*parts, *self.words[last:count]])


def scattered(lines: Sequence[str], among: Sequence[str], depths: Sequence[float]) -> list[str]:
    """Lines put among others, in their order.

    Args:
        depths: where each goes, ascending, from 0 (before all) to 1 (behind all).
    """
    places = [round(depth * len(among)) for depth in depths]
    found: list[str] = []
    for at in range(len(among) + 1):
        found += lines[bisect_left(places, at) : bisect_right(places, at)]
        found += among[at : at + 1]
    return found
