"""Answer cases with a model, in batches that fit a budget of tokens."""

from collections.abc import Iterator, Sequence

import numpy as np

from lwm.core.errors import CapacityError
from lwm.data.text.templates import TURN_ENDS
from lwm.engine.engine import Engine
from lwm.engine.request import Request
from lwm.engine.runner import reserved_length
from lwm.engine.sampling import GREEDY
from lwm.evaluation.task import Case
from lwm.generation.model import Model


class ModelAnswerer:
    """Answer cases greedily with a loaded model.

    Args:
        budget: total prompt tokens of a batch. If it does not hold two prompts, they run one at a
            time, and a prefix shared with the prompt before is not recomputed.
        template: chat template of the prompts; its end of turn ends an answer.
    """

    def __init__(self, model: Model, budget: int = 0, template: str = "auto") -> None:
        self._model, self._budget, self._template = model, budget, template
        self.engine: Engine | None = None
        self._shape = (0, 0)

    def restart(self) -> None:
        if self.engine is not None:
            self.engine.scheduler.forget()

    def answer(self, cases: Sequence[Case]) -> Iterator[str]:
        tokenizer = self._model.tokenizer
        end = TURN_ENDS.get(self._template)
        turn_end = None if end is None else tokenizer.backend.token_to_id(end)
        stops = (*tokenizer.eos, *(() if turn_end is None else (turn_end,)))
        for batch in self._batches(cases):
            prompts = [case.prompt for case in batch]
            lengths = [case.max_tokens for case in batch]
            for tokens in self._generate(prompts, lengths, stops):
                yield "".join(tokenizer.decode_stream(tokens))

    def follow(self, cases: Sequence[Case]) -> Iterator[list[bool]]:
        for batch in self._batches(cases):
            hits: list[list[bool]] = [[] for _ in batch]
            # One token is generated after each prefix of the target. The cache keeps the prompt,
            # so it is computed once.
            for position in range(max(len(case.target) for case in batch)):
                active = [i for i, case in enumerate(batch) if position < len(case.target)]
                prompts = [[*batch[i].prompt, *batch[i].target[:position]] for i in active]
                generated = self._generate(prompts, [1] * len(active), ())
                for i, tokens in zip(active, generated, strict=True):
                    hits[i].append(tokens == [batch[i].target[position]])
            yield from hits

    def _batches(self, cases: Sequence[Case]) -> Iterator[Sequence[Case]]:
        longest = max(len(case.prompt) + max(case.max_tokens, len(case.target)) for case in cases)
        limit = self._model.config.generation_length
        if longest > limit:
            raise CapacityError(
                f"a prompt and its answer take {longest:,} tokens and the context of "
                f"{self._model.source} is {limit:,}; shorten the lengths or raise the context "
                "with --theta"
            )
        slots = int(np.clip(self._budget // longest, 1, len(cases)))
        # The shape depends on these cases only, not on earlier ones: rounding depends on the
        # shape of the cache, and a resumed run must give the same answers.
        shape = (slots, reserved_length(longest, self._model.config))
        if self.engine is None or shape != self._shape or self.engine.scheduler.capacity < longest:
            self.engine = None  # frees its cache before the next is allocated
            self.engine = self._model.new_engine(slots, longest)
            self._shape = shape
        for first in range(0, len(cases), slots):
            yield cases[first : first + slots]

    def _generate(
        self, prompts: Sequence[Sequence[int]], lengths: Sequence[int], stops: Sequence[int]
    ) -> list[list[int]]:
        engine = self.engine
        assert engine is not None
        numbers = [
            engine.submit(
                Request(prompt=prompt, max_tokens=length, sampling=GREEDY, stop_tokens=stops)
            )
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        answers: dict[int, list[int]] = {number: [] for number in numbers}
        for event in engine.follow(numbers):
            if event.token is not None:
                answers[event.request].append(event.token)
        return [answers[number] for number in numbers]
