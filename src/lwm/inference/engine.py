"""The engine: requests in, tokens out, continuous batching over fixed slots.

Compiles a prefill step for each chunk size and one decode step, whatever the prompts' lengths and
settings; requests join and leave between steps. Knows token ids; knows nothing of text, files or
HTTP. A server drives `submit`, `step` and `cancel`; `stream` drives them for one request.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from lwm.attention.cached import LayerCache, decode_attention, prefill_attention
from lwm.attention.order import striped
from lwm.attention.rope import Rotation, rotation
from lwm.core.errors import ConfigError, InputError
from lwm.core.mesh import DATA, SEQUENCE
from lwm.core.progress import Advance
from lwm.core.sharding import DECODE, PREFILL
from lwm.inference.sampling import MAX_TOP_LOGPROBS, Sampled, Sampling, SlotSampling, sample
from lwm.inference.scheduler import Chunk, Feed, Scheduler
from lwm.models.cache import Cache, cache_capacity, grow_cache, make_cache, require_cache_memory
from lwm.models.llama import (
    FusedLayer,
    Layer,
    Llama,
    LlamaConfig,
    apply_layer,
    embed_tokens,
    hidden_states,
    text_logits,
)

CHUNKS = (32, 128, 512, 1024)
"""Positions on each device of the `sequence` axis that one prefill step takes."""


def roomy(tokens: int) -> int:
    """A length of cache with room to grow: one of a few, because each compiles a decode step."""
    unit = max(256, 1 << max(0, tokens.bit_length() - 3))
    return max(1024, -(-tokens // unit) * unit)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue.

    Args:
        prompt: token ids.
        unconditional: a second prompt that guides the first (`Sampling.guidance`); both rows get
            the same tokens.
        stop_tokens: ids that end the answer; the one that did is not part of it.
        logprobs: how many likeliest alternatives to report with each token.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    unconditional: Sequence[int] | None = None
    stop_tokens: Sequence[int] = ()
    logprobs: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
            raise ConfigError(
                f"logprobs is {self.logprobs}; it must be from 0 to {MAX_TOP_LOGPROBS} "
                "alternatives"
            )


@dataclass(frozen=True, kw_only=True)
class Token:
    """One step of one request.

    Args:
        token: the id; None in a last event that brings no token, because a stop token came.
        logprob: of the token under the model's own distribution, before temperature and the like.
        top: the likeliest alternatives and their log-probabilities, as many as asked for.
        finish: why this is the last token, if it is.
    """

    request: int
    token: int | None
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    finish: Literal["stop", "length"] | None = None


def prefill_layer(
    layer: Layer | FusedLayer,
    x: Array,
    turn: Rotation,
    cache: LayerCache,
    slot: Array,
    first: Array,
    *,
    config: LlamaConfig,
    mesh: Mesh | None,
) -> tuple[Array, LayerCache]:
    """Runs a chunk [1, size], laid out in the mesh's striped order, through one layer, which keeps
    its keys and values."""
    attend = partial(prefill_attention, slot=slot, first=first, mesh=mesh)
    return apply_layer(layer, x, turn, cache, config, attend, mesh=mesh, rules=PREFILL)


def decode_logits(
    weights: Llama,
    cache: Cache,
    tokens: Array,
    positions: Array,
    *,
    config: LlamaConfig,
    mesh: Mesh | None,
) -> tuple[Array, Cache]:
    """Feeds one token to every slot: logits [slots, vocab] and the cache after it."""
    attend = partial(decode_attention, positions=positions, mesh=mesh)
    hidden, after = hidden_states(
        weights, tokens[:, None], jnp.maximum(positions, 0)[:, None], config,
        attend,
        caches=cache, mesh=mesh, rules=DECODE,
    )  # fmt: skip
    assert after is not None
    return text_logits(weights, hidden)[:, 0], after


def decode_step(
    weights: Llama,
    cache: Cache,
    seen: Array,
    tokens: Array,
    positions: Array,
    how: SlotSampling,
    *,
    config: LlamaConfig,
    mesh: Mesh | None,
) -> tuple[Sampled, Cache, Array]:
    """Feeds one token to every slot and samples the next."""
    logits, after = decode_logits(weights, cache, tokens, positions, config=config, mesh=mesh)
    if mesh is not None:  # the vocabulary may be sharded, and sorting wants it whole
        whole = NamedSharding(mesh, PartitionSpec())
        logits = jax.lax.with_sharding_constraint(logits, whole)
    fed = jnp.where(positions >= 0, tokens, seen.shape[1])
    seen = seen.at[jnp.arange(len(tokens)), fed].set(True, mode="drop")
    return sample(logits, seen, positions + 1, how), after, seen


def _mark_seen(seen: Array, slot: Array, row: Array) -> Array:
    return seen.at[slot].set(row)


class Engine:
    """A model with a cache of fixed slots.

    Args:
        slots: requests that run at once; rounded up to a multiple of the `data` axis.
        tokens: positions a request may take, rounded up to whole slabs of the cache.
        dtype: of the cache.
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
    ) -> None:
        self._weights, self._config, self._mesh, self._dtype = weights, config, mesh, dtype
        shards, groups = (1, 1) if mesh is None else (mesh.shape[SEQUENCE], mesh.shape[DATA])
        self._shards = shards
        self._count = -(-slots // groups) * groups
        capacity = cache_capacity(tokens, mesh)
        self.cache = self._make_cache(capacity)
        self.scheduler = Scheduler(
            slots=self._count,
            capacity=capacity,
            chunks=[size * shards for size in CHUNKS],
            alignment=shards,
        )
        self._requests: dict[int, Request] = {}
        self._missed: dict[int, list[Token]] = {}
        self._seen = self._make_seen()
        static = {"config": config, "mesh": mesh}
        # One compiled layer, run for each: what a chunk size costs to compile does not grow with
        # the model's depth.
        self._embed = jax.jit(partial(embed_tokens, mesh=mesh, rules=PREFILL))
        self._turn = jax.jit(partial(rotation, head_dim=config.head_dim, theta=config.rope_theta))
        self._prefill = jax.jit(partial(prefill_layer, **static), donate_argnums=(1, 3))
        self._decode = jax.jit(partial(decode_step, **static), donate_argnums=(1, 2))
        self._mark_seen = jax.jit(_mark_seen, donate_argnums=0)

    def _make_cache(self, capacity: int) -> Cache:
        return make_cache(
            self._config, slots=self._count, capacity=capacity, dtype=self._dtype, mesh=self._mesh
        )

    def _make_seen(self) -> Array:
        """Tokens of each slot's text, for the repetition penalty."""
        whole = NamedSharding(self._mesh, PartitionSpec()) if self._mesh else jax.devices()[0]
        return jnp.zeros((self._count, self._config.vocab_size), bool, device=whole)

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
                if not 0 <= token < self._config.vocab_size:
                    raise InputError(
                        f"the prompt holds token {token}, outside the model's vocabulary of "
                        f"{self._config.vocab_size:,}; check that the tokenizer is the model's"
                    )
        number = self.scheduler.submit(prompts, request.max_tokens)
        self._requests[number] = request
        return number

    def cancel(self, request: int) -> None:
        """Ends a request between two steps; an unknown or finished one is no fault."""
        self._missed.pop(request, None)
        if self._requests.pop(request, None) is not None:
            self.scheduler.release(request)

    def step(self) -> list[Token]:
        """Computes one chunk of prefill at most and one token for every request that is past its
        prompt. Interrupted, it forgets the cache; the requests that remain are read anew."""
        try:
            return self._step()
        except BaseException:
            # Buffers were given away to steps that may not have run, or not to the end.
            self.scheduler.forget()
            self.cache = self._make_cache(self.scheduler.capacity)
            self._seen = self._make_seen()
            raise

    def _step(self) -> list[Token]:
        for number in self.scheduler.admit():
            for row, slot in enumerate(self.scheduler.slots_of(number)):
                mask = np.zeros(self._config.vocab_size, bool)
                mask[list(self.scheduler.text_of(number, row))] = True
                self._seen = self._mark_seen(self._seen, slot, mask)
        plan = self.scheduler.plan()
        if plan.chunk is not None:
            self._run_chunk(plan.chunk)
        return self._run_decode(plan.feeds) if plan.feeds else []

    def stream(self, request: Request, advance: Advance | None = None) -> Iterator[Token]:
        """The tokens of one request as they come. Closing the iterator ends the request.

        Args:
            advance: told of prompt tokens as they are done with, reused ones included.
        """
        number = self.submit(request)
        told = 0
        try:
            while True:
                yield from self._missed.pop(number, ())
                if number not in self._requests:
                    return
                events = self.step()
                if advance is not None and number in self._requests:
                    done = self.scheduler.prefilled(number)
                    advance(done - told)
                    told = done
                for token in events:
                    if token.request == number:
                        yield token
                    else:  # of another stream, which will ask for it
                        self._missed.setdefault(token.request, []).append(token)
        finally:
            self.cancel(number)

    def _run_chunk(self, chunk: Chunk) -> None:
        tokens = np.zeros(chunk.size, np.int32)
        tokens[: len(chunk.tokens)] = chunk.tokens
        order = striped(chunk.size, self._shards)
        positions = (chunk.first + np.arange(chunk.size, dtype=np.int32))[order]
        x = self._embed(self._weights.embedding, tokens[order][None])
        turn = self._turn(positions[None])
        where = (np.int32(chunk.slot), np.int32(chunk.first))
        layers, cache = self._weights.layers, []
        assert isinstance(layers, tuple)
        for layer, held in zip(layers, self.cache, strict=True):
            x, held = self._prefill(layer, x, turn, held, *where)
            cache.append(held)
        self.cache = tuple(cache)

    def _run_decode(self, feeds: Sequence[Feed]) -> list[Token]:
        tokens = np.zeros(self._count, np.int32)
        positions = np.full(self._count, -1, np.int32)
        for feed in feeds:
            tokens[feed.slot], positions[feed.slot] = feed.token, feed.position
        ready = [
            number
            for number in self.scheduler.active
            if positions[self.scheduler.slots_of(number)[0]] >= 0
        ]
        sampled, self.cache, self._seen = self._decode(
            self._weights, self.cache, self._seen, tokens, positions, self._slot_sampling(ready)
        )
        drawn: Any = jax.device_get(sampled)
        events = []
        for number in ready:
            slot = self.scheduler.slots_of(number)[0]
            event = self._event(number, slot, drawn)
            events.append(event)
            if event.finish is not None:
                del self._requests[number]
                self.scheduler.release(number)
        return events

    def _event(self, number: int, slot: int, drawn: Sampled) -> Token:
        request = self._requests[number]
        token = int(drawn.tokens[slot])
        if token in request.stop_tokens:
            return Token(request=number, token=None, finish="stop")
        full = self.scheduler.record(number, token)
        count = request.logprobs
        top = zip(drawn.top_tokens[slot, :count], drawn.top_logprobs[slot, :count], strict=True)
        return Token(
            request=number,
            token=token,
            logprob=float(drawn.logprobs[slot]),
            top=tuple((int(t), float(p)) for t, p in top),
            finish="length" if full else None,
        )

    def _slot_sampling(self, ready: Sequence[int]) -> SlotSampling:
        """Settings of the rows that decode; the others take the likeliest token, which nobody
        reads."""
        rows = [Sampling(temperature=0.0)] * self._count
        own = np.arange(self._count, dtype=np.int32)
        conditional, unconditional = own.copy(), own.copy()
        logprobs = np.zeros(self._count, bool)
        for number in ready:
            request, slots = self._requests[number], self.scheduler.slots_of(number)
            rows[slots[0]] = request.sampling
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
        )
