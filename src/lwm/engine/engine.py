"""The engine: requests in, tokens out, continuous batching over fixed slots.

On a mesh over several processes, all of them run an engine of their own with the same requests in
the same order; each sees all tokens.

Compiles two prefill steps for each chunk size (the last layer's is short), one decode step, and
one for each width of drafts (see `drafting`), whatever the prompts' lengths and settings; requests
join and leave between steps.
Knows token ids; knows nothing of text, files or HTTP. A server drives `submit`, `step` and
`cancel`; `stream` drives them for one request.
"""

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from lwm.attention.order import striped
from lwm.core.errors import InputError
from lwm.core.mesh import DATA, SEQUENCE, pace
from lwm.core.progress import Advance
from lwm.engine.drafting import SHORTEST, Drafter
from lwm.engine.request import Request, Token
from lwm.engine.sampling import Sampled, Sampling, SlotSampling
from lwm.engine.scheduler import Chunk, Feed, Scheduler
from lwm.engine.steps import compile_steps
from lwm.models.cache import Cache, cache_capacity, grow_cache, make_cache, require_cache_memory
from lwm.models.llama import Llama, LlamaConfig, dequantized
from lwm.models.quantized import QUANTIZED_ROWS, has_quantized

CHUNKS = (32, 128, 512, 1024)
"""Positions on each device of the `sequence` axis that one prefill step takes."""

LONGEST_RUN = 5
"""Layers that one dispatch of a decode step computes at most."""

WIDTHS = (4, 8)
"""Tokens that a decode step with drafts takes in each slot, the certain one included."""

QUANTIZED_WIDTHS = (2, 4)
"""The same with quantized weights, which make a step of one token cheap, so that drafts must save
more."""

QUANTIZED_SHORTEST = 4
"""Tokens that such a draft's place must share with the text's end: with fewer it is wrong so often
that short answers come later than without drafts (docs/log.md)."""

MOST_ROWS = {"cpu": 16}
"""Tokens that such a step may take in all slots together. Up to there it costs little more than a
step of one token, because both wait for weights."""

MOST_ROWS_ELSEWHERE = 128


def roomy(tokens: int) -> int:
    """A length of cache with room to grow: one of a few, because each compiles a decode step."""
    unit = max(256, 1 << max(0, tokens.bit_length() - 3))
    return max(1024, -(-tokens // unit) * unit)


class Engine:
    """A model with a cache of fixed slots.

    Args:
        slots: requests that run at once; rounded up to a multiple of the `data` axis.
        tokens: positions a request may take, rounded up to whole slabs of the cache.
        dtype: of the cache.
        drafts: whether steps may take several tokens that are guessed from the text (see
            `drafting`). The tokens are the same with and without, but for the rounding of sums.
    """

    def __init__(
        self,
        weights: Llama,
        config: LlamaConfig,
        *,
        slots: int = 1,
        tokens: int = 2048,
        dtype: str = "float32",
        mesh: Mesh | None = None,
        drafts: bool = True,
    ) -> None:
        self._config, self._mesh, self._dtype = config, mesh, dtype
        self._shards = shards = 1 if mesh is None else mesh.shape[SEQUENCE]
        self._count = self.rounded(slots)
        if self._count > QUANTIZED_ROWS:
            weights = dequantized(weights)
        self._weights = weights
        capacity = cache_capacity(tokens, mesh)
        self.cache = self._make_cache(capacity)
        self.scheduler = Scheduler(
            slots=self._count,
            capacity=capacity,
            chunks=[size * shards for size in CHUNKS],
            alignment=shards,
        )
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        widths, rows = WIDTHS, MOST_ROWS.get(platform, MOST_ROWS_ELSEWHERE)
        self._shortest = SHORTEST
        if has_quantized(weights):
            widths, rows = QUANTIZED_WIDTHS, QUANTIZED_ROWS
            self._shortest = QUANTIZED_SHORTEST
        self._widths = [width for width in widths if drafts and width * self._count <= rows]
        self._requests: dict[int, Request] = {}
        self._drafters: dict[int, Drafter] = {}
        self._missed: dict[int, list[Token]] = {}
        self._seen = self._make_seen()
        # One compiled layer, or a run of a few, used for all: what a chunk size or a width of
        # drafts costs to compile does not grow with the model's depth.
        self._run = max(n for n in range(1, LONGEST_RUN + 1) if config.num_layers % n == 0)
        self._steps = compile_steps(config, mesh)
        self._ends = replace(weights, layers=())

    @property
    def slots(self) -> int:
        """Requests that run at once; a guided one counts twice."""
        return self._count

    def rounded(self, slots: int) -> int:
        """How many slots an engine on this mesh has where so many are asked for."""
        groups = 1 if self._mesh is None else self._mesh.shape[DATA]
        return -(-slots // groups) * groups

    def _make_cache(self, capacity: int) -> Cache:
        return make_cache(
            self._config, slots=self._count, capacity=capacity, dtype=self._dtype, mesh=self._mesh
        )

    def _make_seen(self) -> Array:
        """Tokens of each slot's text, for the repetition penalty."""
        whole = NamedSharding(self._mesh, PartitionSpec()) if self._mesh else jax.devices()[0]
        return jnp.zeros((self._count, self._config.table_size), bool, device=whole)

    def require(self, prompt: int, max_tokens: int) -> None:
        """Makes the cache long enough for a request, keeping what it holds.

        Raises:
            CapacityError: a longer one does not fit into memory.
        """
        wanted = cache_capacity(self.scheduler.needed_capacity(prompt, max_tokens), self._mesh)
        held = self.scheduler.capacity
        if wanted <= held:
            return
        wanted = cache_capacity(roomy(wanted), self._mesh)
        # The old cache goes as the new one comes, but for one layer.
        more = wanted - held + wanted // self._config.num_layers
        settings = {"slots": self._count, "capacity": more, "dtype": self._dtype}
        require_cache_memory(self._config, **settings, mesh=self._mesh)
        self.cache = grow_cache(self.cache, wanted, self._mesh)
        self.scheduler.grow(wanted)

    def submit(self, request: Request) -> int:
        """Queues a request; returns the number its tokens will bear.

        Raises:
            InputError: the prompt is empty or names tokens outside the vocabulary.
            CapacityError: it cannot fit the cache.
        """
        prompts = [request.prompt]
        if request.unconditional is not None:
            prompts.append(request.unconditional)
        for prompt in prompts:
            for token in prompt:
                if not 0 <= token < self._config.table_size:
                    raise InputError(
                        f"the prompt holds token {token}, outside the model's vocabulary of "
                        f"{self._config.table_size:,}; check that the tokenizer is the model's"
                    )
        number = self.scheduler.submit(prompts, request.max_tokens)
        self._requests[number] = request
        return number

    def cancel(self, request: int) -> None:
        """Ends a request between two steps; an unknown or finished one is no fault."""
        self._missed.pop(request, None)
        if request in self._requests:
            self._end(request)

    def _end(self, request: int) -> None:
        del self._requests[request]
        self._drafters.pop(request, None)
        self.scheduler.release(request)

    def step(self) -> list[Token]:
        """Computes one chunk of prefill at most and one token for every request that is past its
        prompt, or several where a draft came true. Interrupted, it forgets the cache; the requests
        that remain are read anew."""
        try:
            return self._step()
        except BaseException:
            # Buffers were given away to steps that may not have run, or not to the end.
            self.forget()
            raise

    def forget(self) -> None:
        """Empties the cache; requests that run are read anew."""
        self.scheduler.forget()
        self.cache = self._make_cache(self.scheduler.capacity)
        self._seen = self._make_seen()

    def _step(self) -> list[Token]:
        for number in self.scheduler.admit():
            for row, slot in enumerate(self.scheduler.slots_of(number)):
                mask = np.zeros(self._config.table_size, bool)
                mask[list(self.scheduler.text_of(number, row))] = True
                self._seen = self._steps.mark_seen(self._seen, slot, mask)
            request = self._requests[number]
            if self._widths and request.allowed is None:
                self._drafters[number] = Drafter(
                    request.prompt, request.max_tokens, self._shortest
                )
        plan = self.scheduler.plan(self._draft)
        if plan.chunk is not None:
            self._run_chunk(plan.chunk)
        return self._run_decode(plan.feeds) if plan.feeds else []

    def stream(
        self, request: Request, advance: Advance | None = None
    ) -> Generator[Token, None, None]:
        """The tokens of one request as they come. Closing the iterator ends the request.

        Args:
            advance: told of prompt tokens as they are done with, reused ones included.
        """
        yield from self.follow([self.submit(request)], advance)

    def follow(
        self, requests: Sequence[int], advance: Advance | None = None
    ) -> Generator[Token, None, None]:
        """The tokens of submitted requests as they come, until all are done. Closing the iterator
        ends those that are not."""
        told = 0
        try:
            while True:
                for number in requests:
                    yield from self._missed.pop(number, ())
                running = [number for number in requests if number in self._requests]
                if not running:
                    return
                events = self.step()
                if advance is not None:
                    done = sum(map(self.scheduler.prefilled, running))
                    advance(max(0, done - told))
                    told = max(told, done)
                for token in events:
                    if token.request not in requests:  # of another stream, which will ask for it
                        self._missed.setdefault(token.request, []).append(token)
                yield from (token for token in events if token.request in requests)
        finally:
            for number in requests:
                self.cancel(number)

    def _run_chunk(self, chunk: Chunk) -> None:
        tokens = np.zeros(chunk.size, np.int32)
        tokens[: len(chunk.tokens)] = chunk.tokens
        order = striped(chunk.size, self._shards)
        positions = (chunk.first + np.arange(chunk.size, dtype=np.int32))[order]
        x = self._steps.embed(self._weights.embedding, tokens[order][None])
        turn = self._steps.turn(positions[None])
        where = (np.int32(chunk.slot), np.int32(chunk.first))
        layers, cache = self._weights.layers, []
        assert isinstance(layers, tuple)
        dense = self._steps.dequantized_layers(layers)
        for number, (layer, held) in enumerate(zip(dense, self.cache, strict=True), 1):
            if number == len(layers):
                held = self._steps.prefill_last(layer, x, turn, held, *where)
            else:
                x, held = self._steps.prefill(layer, x, turn, held, *where)
            pace(held)
            cache.append(held)
        self.cache = tuple(cache)

    def _draft(self, request: int, most: int) -> Sequence[int]:
        drafter = self._drafters.get(request)
        if drafter is None:
            return ()
        first, further = self._widths[0] - 1, self._widths[-1] - 1
        return drafter.draft(min(first, most), min(further, most))

    def _run_decode(self, feeds: Sequence[Feed]) -> list[Token]:
        longest = max(len(feed.tokens) for feed in feeds)
        width = 1 if longest == 1 else min(w for w in self._widths if w >= longest)
        tokens = np.zeros((self._count, width), np.int32)
        positions = np.full((self._count, width), -1, np.int32)
        for feed in feeds:
            count = len(feed.tokens)
            tokens[feed.slot, :count] = feed.tokens
            positions[feed.slot, :count] = feed.position + np.arange(count)
        fed = {feed.slot: feed.tokens for feed in feeds}
        ready = [
            number for number in self.scheduler.active if self.scheduler.slots_of(number)[0] in fed
        ]
        how = self._slot_sampling(ready)
        x = self._steps.embed_next(self._weights.embedding, tokens)
        turn = self._steps.turn(np.maximum(positions, 0))
        layers, cache = self._weights.layers, []
        assert isinstance(layers, tuple)
        for first in range(0, len(layers), self._run):
            run = slice(first, first + self._run)
            x, held = self._steps.decode(layers[run], x, turn, self.cache[run], positions)
            pace(held)
            cache += held
        self.cache = tuple(cache)
        sampled, self._seen = self._steps.draw(self._ends, x, self._seen, tokens, positions, how)
        drawn: Any = jax.device_get(sampled)
        events = []
        for number in ready:
            slot = self.scheduler.slots_of(number)[0]
            events += self._events(number, slot, fed[slot][1:], drawn)
        return events

    def _events(
        self, number: int, slot: int, drafts: Sequence[int], drawn: Sampled
    ) -> list[Token]:
        """The request's next token, and one more for each draft that is what was drawn."""
        events = []
        while True:
            accepted = len(events)
            event = self._event(number, slot, accepted, drawn)
            events.append(event)
            if event.finish is not None:
                self._end(number)
                return events
            if accepted == len(drafts) or event.token != drafts[accepted]:
                break
        drafter = self._drafters.get(number)
        if drafter is not None:
            drafter.extend([event.token for event in events])
            if drafts:
                drafter.judge(len(drafts), accepted)
        return events

    def _event(self, number: int, slot: int, column: int, drawn: Sampled) -> Token:
        request = self._requests[number]
        token = int(drawn.tokens[slot, column])
        if token in request.stop_tokens:
            return Token(request=number, token=None, finish="stop")
        full = self.scheduler.record(number, token)
        count = request.logprobs
        top = zip(
            drawn.top_tokens[slot, column, :count],
            drawn.top_logprobs[slot, column, :count],
            strict=True,
        )
        return Token(
            request=number,
            token=token,
            logprob=float(drawn.logprobs[slot, column]),
            top=tuple((int(t), float(p)) for t, p in top if p > -np.inf),
            finish="length" if full else None,
        )

    def _slot_sampling(self, ready: Sequence[int]) -> SlotSampling:
        """Settings of the rows that decode; the others take the likeliest token, which nobody
        reads."""
        rows = [Sampling(temperature=0.0)] * self._count
        own = np.arange(self._count, dtype=np.int32)
        conditional, unconditional = own.copy(), own.copy()
        logprobs = np.zeros(self._count, bool)
        allowed = [range(self._config.vocab_size)] * self._count
        for number in ready:
            request, slots = self._requests[number], self.scheduler.slots_of(number)
            rows[slots[0]] = request.sampling
            if request.allowed is not None:
                answered = self.scheduler.length_of(number) - len(request.prompt)
                allowed[slots[0]] = request.allowed(answered)
            logprobs[slots[0]] = request.logprobs > 0
            if len(slots) == 2:
                unconditional[slots[0]], conditional[slots[1]] = slots[1], slots[0]

        def column(name: str, dtype: Any) -> np.ndarray:
            return np.array([getattr(row, name) for row in rows], dtype)

        return SlotSampling(
            temperature=column("temperature", np.float32),  # type: ignore[arg-type]
            top_k=column("top_k", np.int32),  # type: ignore[arg-type]
            top_p=column("top_p", np.float32),  # type: ignore[arg-type]
            min_p=column("min_p", np.float32),  # type: ignore[arg-type]
            repetition_penalty=column("repetition_penalty", np.float32),  # type: ignore[arg-type]
            guidance=column("guidance", np.float32),  # type: ignore[arg-type]
            seed=column("seed", np.uint32),  # type: ignore[arg-type]
            conditional=conditional,  # type: ignore[arg-type]
            unconditional=unconditional,  # type: ignore[arg-type]
            logprobs=logprobs,  # type: ignore[arg-type]
            low=np.array([ids.start for ids in allowed], np.int32),  # type: ignore[arg-type]
            high=np.array([ids.stop for ids in allowed], np.int32),  # type: ignore[arg-type]
        )
