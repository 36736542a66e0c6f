"""Hide one or several numbers in a long text and ask for them, as the original needle tests do.

Source: LargeWorldModel paper (arXiv 2402.08268), section 3.3, and the wording, placement and
scoring of its scripts; the idea is Kamradt's (2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge

from lwm.core.config import Checked
from lwm.core.errors import CapacityError, ConfigError, InputError
from lwm.data.text.templates import ORIGINAL, choose_template
from lwm.data.text.tokenizer import Tokenizer
from lwm.evaluation.results import Key
from lwm.evaluation.task import Case, Verdict
from lwm.evaluation.tasks.filler import CITIES
from lwm.evaluation.tasks.haystack import Haystack
from lwm.evaluation.tasks.question import continuation, wrap

RESERVED = 200  # tokens of a context length for question and answer

_STYLE = (
    "Don't give information outside the document or repeat your findings. Keep your response "
    "short and direct."
)


@dataclass(frozen=True)
class _Needle:
    city: str
    number: str
    depth: float

    @property
    def text(self) -> str:
        return f"\nThe special magic {self.city} number is: {self.number}\n"

    @property
    def answer_prefix(self) -> str:
        return f"The special magic {self.city} number is:"


def _question(cities: Sequence[str], *, one_of_many: bool) -> str:
    if not one_of_many:
        return f"What is the special magic {cities[0]} number?"
    if len(cities) == 1:
        return f"What is the special magic number for {cities[0]}?"
    listed = f"{', '.join(cities[:-1])}, and {cities[-1]}"
    return f"What are the special magic numbers for {listed}?"


@dataclass(frozen=True, kw_only=True)
class NeedleTask(Checked):
    """Ask for numbers that are hidden in a haystack.

    Args:
        rounds: questions for each length and depth, or for each length with several needles.
        seed: of the first round; the others count up from it.
        needles: hidden in each text; None selects the test of one needle and its wording.
        retrieved: number of needles to ask for.
        together: whether each text has a needle at every depth, and each question asks for one of
            them; a text is then computed once.
        by_logits: whether the prompt begins the answer, so that only numbers follow.
    """

    tokenizer: Tokenizer
    haystack: Haystack
    lengths: Sequence[int]
    depths: Sequence[float]
    rounds: Annotated[int, Ge(1)] = 1
    seed: Annotated[int, Ge(0)] = 0
    needles: int | None = None
    retrieved: int = 1
    together: bool = False
    template: str = "auto"
    max_tokens: Annotated[int, Ge(1)] = 64
    by_logits: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        alone = len(self.depths) if self.together else 1
        count = alone if self.needles is None else self.needles
        if not 1 <= self.retrieved <= count <= len(CITIES):
            raise ConfigError(
                f"{count} needles are hidden and {self.retrieved} asked for; hide from 1 to "
                f"{len(CITIES)} and ask for at least 1 of them"
            )
        least = RESERVED + 100 * count
        if min(self.lengths) < least:
            raise ConfigError(
                f"the length {min(self.lengths)} is too short for {count} needles and a question; "
                f"it must be at least {least} tokens"
            )
        needed = max(self.lengths) - RESERVED
        if len(self.haystack.ids) < needed:
            raise InputError(
                f"the haystack has {len(self.haystack.ids):,} tokens and the longest context "
                f"needs {needed:,}; name a longer --haystack, or shorten --lengths"
            )

    @property
    def name(self) -> str:
        return "needle" if self.needles is None else "multi-needle"

    def units(self) -> list[list[Key]]:
        seeds = range(self.seed, self.seed + self.rounds)
        if self.needles is not None:
            return [[{"context_length": n, "seed": seed} for seed in seeds] for n in self.lengths]
        return [
            [{"context_length": n, "depth_percent": depth, "seed": seed} for depth in self.depths]
            for n in self.lengths
            for seed in seeds
        ]

    def case(self, key: Key) -> Case:
        length, seed = int(key["context_length"]), int(key["seed"])
        rng = np.random.default_rng([seed, length])
        if self.needles is not None:
            few = self.needles > len(self.depths)
            depths = rng.choice(self.depths, self.needles, replace=few).tolist()
        elif self.together:
            depths = [float(depth) for depth in self.depths]
        else:
            depths = [float(key["depth_percent"])]
            rng = np.random.default_rng([seed, length, round(depths[0] * 10)])
        needles = self._make_needles(rng, depths)
        if self.needles is None:
            chosen = [depths.index(float(key["depth_percent"]))]
        else:
            chosen = sorted(rng.choice(len(needles), self.retrieved, replace=False).tolist())
        queried = [needles[i] for i in chosen]
        context = self._context(needles, length, seed)
        question = _question(
            [needle.city for needle in queried], one_of_many=self.needles is not None
        )
        prefix = ""
        if self.by_logits:
            prefix = queried[0].answer_prefix
        elif self.template != "none":  # the original's prompt ends in a space
            is_original = choose_template(self.template, self.tokenizer) == ORIGINAL
            prefix = " " if is_original else ""
        head, tail = wrap(self.tokenizer, self.template, "", f" {question} {_STYLE}", prefix)
        target, spans = self._target(tail, queried)
        numbers = [needle.number for needle in queried]
        one = self.needles is None
        columns = {} if one else {"depth_percent": [needle.depth for needle in queried]}
        return Case(
            prompt=[*head, *context, *tail],
            target=target,
            answer_spans=() if one else spans,
            max_tokens=self.max_tokens,
            reference=numbers[0] if one else numbers,
            columns=columns | {"question": question, "context_tokens": len(context)},
        )

    def _make_needles(self, rng: np.random.Generator, depths: Sequence[float]) -> list[_Needle]:
        cities = rng.choice(CITIES, len(depths), replace=False).tolist()
        numbers: list[str] = []
        while len(numbers) < len(depths):
            number = str(rng.integers(1_000_000, 10_000_000))
            if number not in numbers and number not in self.haystack.numbers:
                numbers.append(number)
        return [_Needle(*parts) for parts in zip(cities, numbers, depths, strict=True)]

    def _context(self, needles: Sequence[_Needle], length: int, seed: int) -> list[int]:
        encode = self.tokenizer.encode
        encoded = [(needle.depth, encode(needle.text, specials=False)) for needle in needles]
        size = length - RESERVED - sum(len(ids) for _, ids in encoded)
        # The window does not depend on the depth, so that a unit shares what precedes the needle.
        return self.haystack.window(size, [seed, length]).with_needles(encoded)

    def require_context(self, limit: int) -> None:
        """Raise CapacityError if prompt and answer exceed a model's context."""
        case = self.case(self.units()[-1][-1])
        needed = len(case.prompt) + max(self.max_tokens, len(case.target))
        if needed > limit:
            raise CapacityError(
                f"a prompt of length {max(self.lengths):,} takes {needed:,} tokens with question "
                f"and answer, and the context is {limit:,}; shorten --lengths or --max-tokens"
            )

    def judge(self, case: Case, response: str) -> Verdict:
        if isinstance(case.reference, str):
            return case.reference in response
        return [number in response for number in case.reference]

    def _target(
        self, tail: Sequence[int], needles: Sequence[_Needle]
    ) -> tuple[list[int], list[range]]:
        target: list[int] = []
        spans = []
        for i, needle in enumerate(needles):
            if i:
                sentence = f". {needle.answer_prefix}"
                target += continuation(self.tokenizer, [*tail, *target], sentence, "")
            number = continuation(self.tokenizer, [*tail, *target], needle.number)
            spans.append(range(len(target), len(target) + len(number)))
            target += number
        return target, spans
