"""Run requests with continuous batching over the slots of one cache.

On a mesh over several processes, each process runs an engine of its own with the same requests in
the same order, and receives all tokens. The engine compiles a few steps, whatever the prompts'
lengths and settings; requests join and leave between steps.
"""

from collections.abc import Generator, Sequence
from dataclasses import replace
from itertools import chain

import jax
import numpy as np
from jax.sharding import Mesh

from lwm.attention.cached import LayerCache
from lwm.core.errors import InputError
from lwm.core.hardware import traits
from lwm.core.interrupts import deferred
from lwm.core.mesh import DATA, SEQUENCE
from lwm.core.progress import Advance
from lwm.engine.drafting import NO_DRAFTS, QUANTIZED_DRAFTS, Drafter, DraftSettings
from lwm.engine.request import Request, Token
from lwm.engine.runner import Runner, weights_for
from lwm.engine.sampling import GREEDY, Sampled, SlotSampling, slot_sampling
from lwm.engine.scheduler import Feed, ScheduledRequest, Scheduler
from lwm.models.llama import Llama, LlamaConfig
from lwm.models.quantized import QUANTIZED_ROWS, has_quantized


class Engine:
    """Generate tokens for several requests at a time.

    Args:
        slots: rows of the cache, rounded up to a multiple of the `data` axis; a guided request
            takes two.
        tokens: positions that a request may take, rounded up to whole units of the cache.
        headroom: reserve more positions, for longer requests later, if they fit into memory.
        dtype: of the cache.
        drafts: whether steps may check several drafted tokens (see `drafting`). The tokens are the
            same with and without, except for the rounding of sums.
        alone: the same weights for steps of a single request, if those of `weights` were
            dequantized for more rows.
    """

    def __init__(
        self,
        weights: Llama,
        config: LlamaConfig,
        *,
        slots: int = 1,
        tokens: int = 2048,
        headroom: bool = False,
        dtype: str = "float32",
        mesh: Mesh | None = None,
        drafts: bool = True,
        alone: Llama | None = None,
    ) -> None:
        self._config, self._mesh = config, mesh
        self.slots = self.rounded(slots)
        alone, weights = weights if alone is None else alone, weights_for(weights, self.slots)
        self._runner = Runner(
            weights,
            config,
            alone=alone,
            slots=self.slots,
            tokens=tokens,
            headroom=headroom,
            dtype=dtype,
            mesh=mesh,
        )
        self.scheduler = Scheduler(
            slots=self.slots,
            capacity=self._runner.capacity,
            chunks=self._runner.chunks,
            alignment=1 if mesh is None else mesh.shape[SEQUENCE],
        )
        # Idle rows cost little among few, and each kind of step is compiled.
        self._has_alone = mesh is None and self.slots > QUANTIZED_ROWS
        self._together = self._drafts_for(weights, self.slots) if drafts else NO_DRAFTS
        self._single = self._drafts_for(alone, 1) if drafts and self._has_alone else self._together
        self._drafters: dict[int, Drafter] = {}
        self._requests: dict[int, Request] = {}
        self._undelivered: dict[int, list[Token]] = {}  # tokens of streams that did not run a step

    def _drafts_for(self, weights: Llama, rows: int) -> DraftSettings:
        """Return the settings of drafts for steps of so many rows, with the widths that pay."""
        settings, limit = DraftSettings(), traits(self._mesh).draft_tokens
        if has_quantized(weights):
            settings, limit = QUANTIZED_DRAFTS, QUANTIZED_ROWS
        return replace(settings, widths=[w for w in settings.widths if w * rows <= limit])

    def rounded(self, slots: int) -> int:
        """Return how many slots an engine on this mesh has when `slots` are requested."""
        groups = 1 if self._mesh is None else self._mesh.shape[DATA]
        return -(-slots // groups) * groups

    @property
    def cache(self) -> list[LayerCache]:
        """Return the cache of each layer, which a caller may replace between two steps."""
        return self._runner.cache

    def require(self, prompt: int, max_tokens: int) -> None:
        """Make the cache long enough for a request, keeping its contents."""
        needed = self.scheduler.needed_capacity(prompt, max_tokens)
        if needed <= self.scheduler.capacity:
            return
        capacity = self._runner.affordable(needed, headroom=True)
        try:
            self._runner.grow(capacity)
        except BaseException:  # some layers are freed already
            self.forget()
            raise
        self.scheduler.capacity = capacity

    def submit(self, request: Request) -> int:
        """Queue a request, and return the number that its tokens have."""
        size = self._config.table_size
        for token in chain.from_iterable(request.prompts):
            if not 0 <= token < size:
                raise InputError(
                    f"the prompt contains token {token}, outside the model's vocabulary of "
                    f"{size:,}; check that the tokenizer is the model's"
                )
        number = self.scheduler.submit(request.prompts, request.max_tokens)
        self._requests[number] = request
        drafted = request.allowed is None and not request.sampling.counts_answer
        if self._single.widths and drafted:
            self._drafters[number] = Drafter(request.prompt, request.max_tokens, self._single)
        return number

    def cancel(self, request: int) -> None:
        """End a request between two steps; do nothing for an unknown or finished one."""
        self._undelivered.pop(request, None)
        if request in self._requests:
            self._end(request)

    def _end(self, request: int) -> None:
        del self._requests[request]
        self._drafters.pop(request, None)
        self.scheduler.release(request)

    def step(self) -> list[Token]:
        """Prefill at most one chunk, and generate tokens for every request that is prefilled.

        An exception discards the cache; requests that remain are prefilled again.
        """
        try:
            starting = self.scheduler.admit()
            if self._runner.allocate():
                starting = list(self.scheduler.active)
            for number in starting:
                prompts = self._requests[number].prompts
                rows = self.scheduler.active[number].rows
                for (slot, text), prompt in zip(rows, prompts, strict=True):
                    self._runner.set_text(slot, text, len(prompt))
            plan = self.scheduler.plan(self._draft)
            if plan.copy is not None:
                self._runner.copy(plan.copy)
            if plan.chunk is not None:
                self._runner.prefill(plan.chunk)
            return self._decode(plan.feeds) if plan.feeds else []
        except BaseException:
            # Buffers were donated to steps that may not have run, or not to their end.
            self.forget()
            raise

    def forget(self) -> None:
        """Discard the cache and free its memory; active requests are prefilled again."""
        self.scheduler.forget()
        self._runner.release()

    def _draft(self, request: int, limit: int) -> Sequence[int]:
        drafter = self._drafters.get(request)
        alone = len(self.scheduler.active) == 1
        widths = (self._single if alone else self._together).widths
        if drafter is None or not widths:
            return ()
        return drafter.draft(min(limit, widths[-1] - 1))

    def stream(
        self, request: Request, advance: Advance | None = None
    ) -> Generator[Token, None, None]:
        """Iterate over the tokens of one request; closing the iterator ends the request."""
        yield from self.follow([self.submit(request)], advance)

    def follow(
        self, requests: Sequence[int], advance: Advance | None = None
    ) -> Generator[Token, None, None]:
        """Iterate over the tokens of submitted requests; closing the iterator ends them.

        Args:
            advance: called after each step with the number of prompt tokens it added to the cache.
        """
        reported = 0
        try:
            while True:
                for number in requests:
                    yield from self._undelivered.pop(number, ())
                running = [number for number in requests if number in self._requests]
                if not running:
                    return
                with deferred():
                    tokens = self.step()
                if advance is not None:
                    done = sum(map(self.scheduler.prefilled, running))
                    advance(max(0, done - reported))
                    reported = max(reported, done)
                for token in tokens:
                    if token.request not in requests:  # it belongs to another stream
                        self._undelivered.setdefault(token.request, []).append(token)
                yield from (token for token in tokens if token.request in requests)
        finally:
            for number in requests:
                self.cancel(number)

    def _decode(self, feeds: Sequence[Feed]) -> list[Token]:
        fed = {feed.slot: feed.tokens for feed in feeds}
        decoding = [one for one in self.scheduler.active.values() if one.slots[0] in fed]
        longest = max(map(len, fed.values()))
        alone = self._has_alone and len(feeds) == 1
        widths = (self._single if alone else self._together).widths
        width = min(w for w in (1, *widths) if w >= longest)
        settings = self._slot_sampling(decoding)
        first_slot = 0
        if alone:
            first_slot = feeds[0].slot
            row = slice(first_slot, first_slot + 1)
            settings = jax.tree.map(lambda x: x[row], settings)
            itself = np.zeros(1, np.int32)
            settings = replace(settings, conditional=itself, unconditional=itself)
        sampled = self._runner.decode(feeds, width, settings, alone=alone)
        tokens = []
        for one in decoding:
            slot = one.slots[0]
            tokens += self._accept(one.number, slot - first_slot, fed[slot][1:], sampled)
        return tokens

    def _accept(
        self, number: int, row: int, drafts: Sequence[int], sampled: Sampled
    ) -> list[Token]:
        """Record a request's next token, and one more for each draft that was sampled."""
        tokens: list[Token] = []
        ids: list[int] = []
        for column in range(len(drafts) + 1):
            token = self._token(number, row, column, sampled)
            tokens.append(token)
            if token.finish is not None:
                self._end(number)
                return tokens
            ids.append(int(sampled.tokens[row, column]))
            if ids != list(drafts[: column + 1]):
                break
        if number in self._drafters:
            self._drafters[number].record(ids, len(drafts))
        return tokens

    def _token(self, number: int, row: int, column: int, sampled: Sampled) -> Token:
        request = self._requests[number]
        token = int(sampled.tokens[row, column])
        if token in request.stop_tokens:
            return Token(request=number, token=None, finish="stop")
        full = self.scheduler.record(number, token)
        place = (row, column, slice(request.logprobs))
        top = zip(sampled.top_tokens[place], sampled.top_logprobs[place], strict=True)
        return Token(
            request=number,
            token=token,
            logprob=float(sampled.logprobs[row, column]),
            top=tuple((int(t), float(p)) for t, p in top if p > -np.inf),
            finish="length" if full else None,
        )

    def _slot_sampling(self, decoding: Sequence[ScheduledRequest]) -> SlotSampling:
        """Collect the settings of the slots that decode; nothing reads the tokens of others."""
        rows = [GREEDY] * self.slots
        conditional = np.arange(self.slots, dtype=np.int32)
        unconditional = conditional.copy()
        logprobs = np.zeros(self.slots, bool)
        answer = np.zeros(self.slots, np.int32)
        bounds = np.array([(0, self._config.vocab_size)] * self.slots, np.int32)
        for one in decoding:
            request, slot = self._requests[one.number], one.slots[0]
            rows[slot] = request.sampling
            if request.allowed is not None:
                ids = request.allowed(len(one.texts[0]) - len(request.prompt))
                bounds[slot] = ids.start, ids.stop
            logprobs[slot] = request.logprobs > 0
            answer[slot] = len(request.prompt)
            for second in one.slots[1:]:
                unconditional[slot], conditional[second] = second, slot
        return slot_sampling(
            rows,
            conditional=conditional,
            unconditional=unconditional,
            logprobs=logprobs,
            answer=answer,
            low=bounds[:, 0],
            high=bounds[:, 1],
        )
