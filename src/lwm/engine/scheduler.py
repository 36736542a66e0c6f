"""Which request runs in which slot, and what the next step computes. Plain Python over token ids:
no arrays, no devices.

A slot is one row of the cache. A request owns one slot, or two when it is guided by a second
prompt; it joins when enough slots are free and leaves when it is done, between any two steps. A
slot keeps the tokens whose keys it holds after its request has left, and a later request that
starts with the same tokens starts behind them.

Prefill covers all of a prompt but its last token; that one is fed by the first decode step, which
so is the only place where tokens are sampled. Behind a request's last token drafts may be fed, see
`drafting`; those that come true are in the cache already, and what others left there is forgotten.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lwm.core.errors import CapacityError, InputError

_WELL_FILLED = 0.75
"""Share of a chunk that must be real tokens: padding less than a quarter beats two smaller
chunks."""


@dataclass(frozen=True)
class Chunk:
    """Part of a prompt to prefill: `tokens` at `first` and following positions of `slot`, padded
    to `size`."""

    slot: int
    first: int
    tokens: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Feed:
    """One slot's part of a decode step: tokens at `position` and on, the first of them certain
    and the others drafts; behind each the next one is sampled."""

    slot: int
    tokens: tuple[int, ...]
    position: int


@dataclass(frozen=True)
class Plan:
    """One step: at most one chunk, then one decode of every row that is ready."""

    chunk: Chunk | None
    feeds: tuple[Feed, ...]


@dataclass
class _Slot:
    cached: list[int] = field(
        default_factory=list
    )  # tokens whose keys and values are in the cache
    owner: int | None = None
    released: int = 0  # when it was last given back, to reuse the oldest


@dataclass
class _Active:
    request: int
    slots: list[int]
    texts: list[list[int]]  # prompt and answer of each row
    remaining: int


def _no_draft(request: int, most: int) -> Sequence[int]:
    return ()


class Scheduler:
    """Slots, the queue before them, and what each slot's cache holds.

    Args:
        slots: rows of the cache.
        capacity: positions of a row.
        chunks: sizes in which prompts are prefilled, any order.
        alignment: chunks start at multiples of this, the size of the `sequence` axis.
    """

    def __init__(self, *, slots: int, capacity: int, chunks: Sequence[int], alignment: int = 1):
        assert slots > 0
        assert chunks
        assert all(size % alignment == 0 for size in chunks)
        self.capacity = capacity
        self.reused = 0  # prompt tokens that were not computed again, ever
        self._chunks = sorted(chunks)
        self._alignment = alignment
        self._slots = [_Slot() for _ in range(slots)]
        self._waiting: deque[tuple[int, tuple[tuple[int, ...], ...], int]] = deque()
        self._active: dict[int, _Active] = {}
        self._clock = 0
        self._next_request = 0

    def needed_capacity(self, prompt: int, max_tokens: int) -> int:
        """Positions of a slot that a prompt and its answer may touch, the last chunk's padding
        included."""
        return max(prompt + max_tokens, prompt - 1 + self._chunks[0])

    def submit(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> int:
        """Queues a request of one row or two; returns its number.

        Raises:
            InputError: a prompt is empty, or nothing is to be generated.
            CapacityError: it cannot fit however long it waits.
        """
        if any(len(prompt) == 0 for prompt in prompts):
            raise InputError("the prompt is empty; give at least one token")
        if max_tokens < 1:
            raise InputError(f"max_tokens is {max_tokens}; it must be at least 1")
        longest = max(len(prompt) for prompt in prompts)
        if self.needed_capacity(longest, max_tokens) > self.capacity:
            raise CapacityError(
                f"the prompt of {longest:,} tokens and {max_tokens:,} more need a cache of "
                f"{self.needed_capacity(longest, max_tokens):,} positions and this one has "
                f"{self.capacity:,}; "
                "shorten the prompt or max_tokens"
            )
        if len(prompts) > len(self._slots):
            raise CapacityError(
                f"the request needs {len(prompts)} slots and there are {len(self._slots)}; "
                "make the engine with more"
            )
        request = self._next_request
        self._next_request += 1
        self._waiting.append((request, tuple(tuple(p) for p in prompts), max_tokens))
        return request

    @property
    def idle(self) -> bool:
        return not self._active and not self._waiting

    @property
    def active(self) -> tuple[int, ...]:
        return tuple(self._active)

    def slots_of(self, request: int) -> tuple[int, ...]:
        return tuple(self._active[request].slots)

    def text_of(self, request: int, row: int = 0) -> tuple[int, ...]:
        """Prompt and answer so far."""
        return tuple(self._active[request].texts[row])

    def length_of(self, request: int) -> int:
        """Tokens of the first row's prompt and answer so far."""
        return len(self._active[request].texts[0])

    def prefilled(self, request: int) -> int:
        """Tokens of the first row's prompt whose keys are in the cache; 0 while it waits."""
        active = self._active.get(request)
        return len(self._slots[active.slots[0]].cached) if active else 0

    def longest(self) -> tuple[int, tuple[int, ...]]:
        """The slot that holds most, and the tokens whose keys it holds."""
        slot = max(range(len(self._slots)), key=lambda i: len(self._slots[i].cached))
        return slot, tuple(self._slots[slot].cached)

    def hold(self, tokens: Sequence[int]) -> int:
        """Notes that a free slot will hold these tokens, which the caller writes; returns it."""
        assert len(tokens) <= self.capacity
        free = [i for i, slot in enumerate(self._slots) if slot.owner is None]
        slot = min(free, key=lambda i: self._slots[i].released)
        self._slots[slot].cached = list(tokens)
        return slot

    def admit(self) -> list[int]:
        """Gives free slots to waiting requests, first come first served; returns those that
        joined."""
        joined = []
        while self._waiting:
            request, prompts, max_tokens = self._waiting[0]
            free = [i for i, slot in enumerate(self._slots) if slot.owner is None]
            if len(free) < len(prompts):
                break
            self._waiting.popleft()
            chosen = []
            for prompt in prompts:
                slot = max(free, key=lambda i: (self._shared(i, prompt), -self._slots[i].released))
                free.remove(slot)
                chosen.append(slot)
                shared = self._shared(slot, prompt)
                self.reused += shared
                del self._slots[slot].cached[shared:]
                self._slots[slot].owner = request
            self._active[request] = _Active(
                request, chosen, [list(prompt) for prompt in prompts], max_tokens
            )
            joined.append(request)
        return joined

    def _shared(self, slot: int, prompt: Sequence[int]) -> int:
        """How many of a prompt's tokens, but for its last, a slot already holds, down to where a
        chunk may start."""
        count = 0
        for held, wanted in zip(self._slots[slot].cached, prompt[:-1], strict=False):
            if held != wanted:
                break
            count += 1
        return count // self._alignment * self._alignment if count < len(prompt) - 1 else count

    def plan(self, draft: Callable[[int, int], Sequence[int]] = _no_draft) -> Plan:
        """What the next step computes. The cache is taken to hold it once this returns.

        Args:
            draft: guesses at a request's next tokens, at most so many; asked once for each request
                of one row that is past its prompt and has more than one token to go.
        """
        chunk = self._next_chunk()
        feeds = []
        for active in self._active.values():
            ready = all(
                len(self._slots[slot].cached) == len(text) - 1
                for slot, text in zip(active.slots, active.texts, strict=True)
            )
            if not ready:
                continue
            most = active.remaining - 1
            drafts = draft(active.request, most) if most and len(active.slots) == 1 else ()
            assert len(drafts) <= most
            for slot, text in zip(active.slots, active.texts, strict=True):
                tokens = (text[-1], *drafts)
                feeds.append(Feed(slot, tokens, len(text) - 1))
                self._slots[slot].cached.extend(tokens)
        return Plan(chunk, tuple(feeds))

    def _next_chunk(self) -> Chunk | None:
        for active in self._active.values():
            for slot, text in zip(active.slots, active.texts, strict=True):
                cached = self._slots[slot].cached
                left = len(text) - 1 - len(cached)
                if left <= 0:
                    continue
                size = self._chunk_size(left, self.capacity - len(cached))
                tokens = tuple(text[len(cached) : len(cached) + min(size, left)])
                chunk = Chunk(slot, len(cached), tokens, size)
                cached.extend(tokens)
                return chunk
        return None

    def _chunk_size(self, left: int, room: int) -> int:
        """The largest chunk that the tokens left fill, or one they fill nearly; else the least."""
        fitting = [
            size
            for size in self._chunks
            if size <= room and min(left, size) >= _WELL_FILLED * size
        ]
        return max(fitting, default=self._chunks[0])

    def record(self, request: int, token: int) -> bool:
        """Appends a sampled token to every row of a request; tells whether its allowance is used
        up."""
        active = self._active[request]
        for slot, text in zip(active.slots, active.texts, strict=True):
            cached = self._slots[slot].cached
            if cached[len(text) : len(text) + 1] != [token]:  # the draft was wrong
                del cached[len(text) :]
            text.append(token)
        active.remaining -= 1
        return active.remaining == 0

    def release(self, request: int) -> None:
        """Ends a request, active or waiting; its slots keep what they hold."""
        active = self._active.pop(request, None)
        if active is None:
            self._waiting = deque(entry for entry in self._waiting if entry[0] != request)
            return
        self._clock += 1
        for slot, text in zip(active.slots, active.texts, strict=True):
            del self._slots[slot].cached[len(text) :]  # drafts that nobody confirmed
            self._slots[slot].owner = None
            self._slots[slot].released = self._clock

    def forget(self) -> None:
        """The cache is lost: what active requests need of it is prefilled again."""
        for slot in self._slots:
            slot.cached.clear()

    def grow(self, capacity: int) -> None:
        assert capacity >= self.capacity
        self.capacity = capacity
