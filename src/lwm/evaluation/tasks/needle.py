"""The original's needle tests: a number said somewhere in a long text, or several, to be found.

Source: LargeWorldModel paper (arXiv 2402.08268), section 3.3, and its scripts' wording, placement
and scoring; the idea is Kamradt's (2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lwm.core.errors import CapacityError, ConfigError, InputError
from lwm.data.text.templates import ORIGINAL, choose_template
from lwm.data.text.tokenizer import Tokenizer
from lwm.evaluation.case import Case, Key, Verdict
from lwm.evaluation.tasks.haystack import Haystack
from lwm.evaluation.tasks.prompts import wrap
from lwm.evaluation.tasks.sizing import continuation

KEPT_FREE = 200
"""Tokens of a context length left to question and answer."""

MANNER = (
    "Don't give information outside the document or repeat your findings. Keep your response "
    "short and direct."
)

CITIES = (
    "Accra", "Adelaide", "Algiers", "Amman", "Amsterdam", "Ankara", "Antwerp", "Asmara", "Athens",
    "Auckland", "Baghdad", "Baku", "Bangkok", "Barcelona", "Beijing", "Belgrade", "Bergen",
    "Berlin", "Bogota", "Bordeaux", "Brisbane", "Brussels", "Bucharest", "Budapest", "Cairo",
    "Calgary", "Caracas", "Chicago", "Copenhagen", "Dakar", "Damascus", "Delhi", "Denver",
    "Doha", "Dublin", "Edinburgh", "Florence", "Geneva", "Glasgow", "Hamburg", "Hanoi", "Harare",
    "Havana", "Helsinki", "Istanbul", "Jakarta", "Kabul", "Kampala", "Kathmandu", "Kyoto",
    "Lagos", "Lima", "Lisbon", "London", "Lusaka", "Madrid", "Manila", "Marseille", "Melbourne",
    "Montreal", "Moscow", "Mumbai", "Nairobi", "Naples", "Osaka", "Oslo", "Ottawa", "Paris",
    "Prague", "Quito", "Riga", "Rome", "Santiago", "Seoul", "Sofia", "Stockholm", "Sydney",
    "Tallinn", "Tbilisi", "Tokyo", "Toronto", "Tunis", "Turin", "Vienna", "Vilnius", "Warsaw",
    "Yerevan", "Zagreb", "Zurich",
)  # fmt: skip


def needle_text(city: str, number: str) -> str:
    return f"\nThe special magic {city} number is: {number}\n"


def question_text(cities: Sequence[str], *, one_of_many: bool) -> str:
    """The question for one city, or for several.

    Args:
        one_of_many: the wording of the test of several needles.
    """
    if not one_of_many:
        return f"What is the special magic {cities[0]} number?"
    if len(cities) == 1:
        return f"What is the special magic number for {cities[0]}?"
    listed = f"{', '.join(cities[:-1])}, and {cities[-1]}"
    return f"What are the special magic numbers for {listed}?"


@dataclass(frozen=True, kw_only=True)
class NeedleTask:
    """Numbers in a haystack.

    Args:
        lengths: of the whole prompt, of which `KEPT_FREE` tokens are left to question and answer.
        depths: per cent of the text before the needle.
        rounds: questions for each length and depth, or for each length where several are hidden.
        seed: of the first round; the following count on.
        needles: hidden in one text; None for the test of a single one, in its own wording.
        retrieved: of the needles asked for.
        by_logits: the answer is begun for the model, so that what follows are the numbers.
    """

    tokenizer: Tokenizer
    haystack: Haystack
    lengths: Sequence[int]
    depths: Sequence[float]
    rounds: int = 1
    seed: int = 0
    needles: int | None = None
    retrieved: int = 1
    template: str = "auto"
    max_tokens: int = 64
    by_logits: bool = False

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"rounds is {self.rounds}; it must be at least 1")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be 0 or more")
        count = self._count
        if not 1 <= self.retrieved <= count <= len(CITIES):
            raise ConfigError(
                f"{count} needles are hidden and {self.retrieved} asked for; hide from 1 to "
                f"{len(CITIES)} and ask for 1 of them at least"
            )
        least = KEPT_FREE + 100 * count
        if min(self.lengths) < least:
            raise ConfigError(
                f"the length {min(self.lengths)} is too short for {count} needles and a question; "
                f"{least} tokens are the least"
            )
        wanted = max(self.lengths) - KEPT_FREE
        if len(self.haystack.ids) < wanted:
            raise InputError(
                f"the haystack has {len(self.haystack.ids):,} tokens and the longest context "
                f"needs {wanted:,}; name a longer --haystack, or shorten --lengths"
            )

    @property
    def name(self) -> str:
        return "needle" if self.needles is None else "multi-needle"

    @property
    def _count(self) -> int:
        return 1 if self.needles is None else self.needles

    @property
    def _original(self) -> bool:
        return (
            self.template != "none" and choose_template(self.template, self.tokenizer) == ORIGINAL
        )

    def units(self) -> list[list[Key]]:
        seeds = range(self.seed, self.seed + self.rounds)
        if self.needles is not None:
            return [
                [{"context_length": length, "seed": seed} for seed in seeds]
                for length in self.lengths
            ]
        return [
            [
                {"context_length": length, "depth_percent": depth, "seed": seed}
                for depth in self.depths
            ]
            for length in self.lengths
            for seed in seeds
        ]

    def case(self, key: Key) -> Case:
        length, seed = int(key["context_length"]), int(key["seed"])
        count = self._count
        single = [float(key["depth_percent"])] if self.needles is None else []
        draw = np.random.default_rng([seed, length, *(round(depth * 10) for depth in single)])
        depths = single or draw.choice(self.depths, count, replace=count > len(self.depths))
        cities = [str(city) for city in draw.choice(CITIES, count, replace=False)]
        numbers = self._numbers(draw, count)
        hidden = [
            (float(depth), self.tokenizer.encode_part(needle_text(city, number)))
            for depth, city, number in zip(depths, cities, numbers, strict=True)
        ]
        size = length - KEPT_FREE - sum(len(needle) for _, needle in hidden)
        # Not by the depth: what stands before the needles is the same for all of a unit.
        window = self.haystack.window(size, [seed, length])
        asked = sorted(draw.choice(count, self.retrieved, replace=False).tolist())
        question = question_text([cities[i] for i in asked], one_of_many=self.needles is not None)
        said = [f"The special magic {cities[i]} number is:" for i in asked]
        # The original ends its own prompt with a space.
        prefix = said[0] if self.by_logits else " " if self._original else ""
        head, tail = wrap(self.tokenizer, self.template, "", f" {question} {MANNER}", prefix)
        target, parts = self._target(tail, said, [numbers[i] for i in asked])
        context = window.planted(hidden)
        one = self.needles is None
        found = [numbers[i] for i in asked]
        told = {"depth_percent": [hidden[i][0] for i in asked]} if not one else {}
        return Case(
            prompt=[*head, *context, *tail],
            target=target,
            asked=() if one else parts,
            max_tokens=self.max_tokens,
            reference=found[0] if one else found,
            told={**told, "question": question, "context_tokens": len(context)},
        )

    def require_context(self, limit: int) -> None:
        """Raises:
        CapacityError: the longest prompt and its answer go beyond a context of so many tokens.
        """
        case = self.case(self.units()[-1][-1])
        whole = len(case.prompt) + max(self.max_tokens, len(case.target))
        if whole > limit:
            raise CapacityError(
                f"a prompt of length {max(self.lengths):,} takes {whole:,} tokens with its words "
                f"and its answer, and the context is {limit:,}; shorten --lengths or --max-tokens"
            )

    def judge(self, case: Case, response: str) -> Verdict:
        if isinstance(case.reference, str):
            correct = case.reference in response
            return Verdict(correct=correct, score=float(correct))
        verdicts = [number in response for number in case.reference]
        return Verdict(correct=verdicts, score=sum(verdicts) / len(verdicts))

    def _numbers(self, draw: np.random.Generator, count: int) -> list[str]:
        """Seven digits each, no two alike and none that the haystack has."""
        found: list[str] = []
        while len(found) < count:
            number = str(draw.integers(1_000_000, 10_000_000))
            if number not in found and number not in self.haystack.numbers:
                found.append(number)
        return found

    def _target(
        self, tail: Sequence[int], said: Sequence[str], numbers: Sequence[str]
    ) -> tuple[list[int], list[range]]:
        """What follows where the answer is begun, and where in it the numbers are.

        Args:
            said: what stands before each number.
        """
        target: list[int] = []
        parts = []
        for i, number in enumerate(numbers):
            if i:
                target += continuation(self.tokenizer, [*tail, *target], f". {said[i]}", "")
            own = continuation(self.tokenizer, [*tail, *target], number)
            parts.append(range(len(target), len(target) + len(own)))
            target += own
        return target, parts
