"""Decide which request runs in which slot, and what the next step computes.

A slot is one row of the cache. A request takes one slot, or two when a second prompt guides it. A
slot keeps its cached tokens after its request has left, and a later request with the same prefix
starts after that prefix. Where another slot has more of the prefix, running or not, its row is
copied instead of computed again.

Prefill covers all of a prompt except its last token. The first decode step takes that one, so
tokens are sampled in decode steps only. A decode step may also take drafts after a request's last
token (see `drafting`); the right ones are cached already, and the wrong ones are discarded.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

from lwm.core.errors import CapacityError, InputError

_WELL_FILLED = 0.75
"""Share of a chunk that must be real tokens: padding of less than a quarter costs less than two
smaller chunks."""


@dataclass(frozen=True)
class Chunk:
    """Represent a part of a prompt to prefill, padded to `size`, at `first` of a slot."""

    slot: int
    first: int
    tokens: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Copy:
    """Represent a copy of one slot's cached keys and values to another slot."""

    source: int
    destination: int


@dataclass(frozen=True)
class Feed:
    """Represent one slot's part of a decode step: its last token, at `position`, and drafts."""

    slot: int
    tokens: tuple[int, ...]
    position: int


@dataclass(frozen=True)
class StepPlan:
    """Represent one step: at most one copy and one chunk, then a decode of all ready slots."""

    copy: Copy | None
    chunk: Chunk | None
    feeds: tuple[Feed, ...]


@dataclass
class _Slot:
    cached: list[int] = field(default_factory=list)  # tokens whose keys and values are cached
    request: int | None = None
    released: int = 0  # when its last request left; the oldest is reused first


@dataclass
class ScheduledRequest:
    """Hold the state of a request."""

    number: int
    texts: list[list[int]]  # prompt and answer so far, for each of its prompts
    remaining: int  # tokens that may still be generated
    slots: list[int] = field(default_factory=list)  # one for each prompt; none while it waits

    @property
    def rows(self) -> Iterable[tuple[int, list[int]]]:
        """Iterate over slots and their texts."""
        return zip(self.slots, self.texts, strict=True)


class Scheduler:
    """Manage the slots, the queue of waiting requests, and the record of cached tokens.

    Args:
        capacity: positions of a slot.
        chunks: sizes in which prompts are prefilled.
        alignment: chunks start at multiples of this, the size of the `sequence` axis.

    Attributes:
        active: the requests that have slots, by number.
        reused: prompt tokens that were cached already, over all requests.
    """

    def __init__(self, *, slots: int, capacity: int, chunks: Sequence[int], alignment: int = 1):
        assert all(size % alignment == 0 for size in chunks)
        self.capacity = capacity
        self.reused = 0
        self._chunks = sorted(chunks)
        self._alignment = alignment
        self._slots = [_Slot() for _ in range(slots)]
        self.active: dict[int, ScheduledRequest] = {}
        self._waiting: deque[ScheduledRequest] = deque()
        self._clock = 0
        self._numbers = count()

    def needed_capacity(self, prompt: int, max_tokens: int) -> int:
        """Return the positions of a prompt and its answer, the last chunk's padding included."""
        return max(prompt + max_tokens, prompt - 1 + self._chunks[0])

    def submit(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> int:
        """Queue a request of one prompt or two, and return its number."""
        lengths = [len(prompt) for prompt in prompts]
        if min(lengths) == 0:
            raise InputError("the prompt is empty; give at least one token")
        if max_tokens < 1:
            raise InputError(f"max_tokens is {max_tokens}; it must be at least 1")
        needed = self.needed_capacity(max(lengths), max_tokens)
        if needed > self.capacity:
            raise CapacityError(
                f"the prompt of {max(lengths):,} tokens and {max_tokens:,} more need {needed:,} "
                f"positions and the cache has {self.capacity:,}; shorten the prompt or max_tokens"
            )
        if len(prompts) > len(self._slots):
            raise CapacityError(
                f"the request needs {len(prompts)} slots; make an engine with more"
            )
        request = next(self._numbers)
        texts = [list(prompt) for prompt in prompts]
        self._waiting.append(ScheduledRequest(request, texts, max_tokens))
        return request

    @property
    def idle(self) -> bool:
        """Return whether no request is active or waiting."""
        return not self.active and not self._waiting

    @property
    def waiting(self) -> int:
        """Return how many requests wait for slots."""
        return len(self._waiting)

    def prefilled(self, request: int) -> int:
        """Return how many tokens of the first prompt are cached; 0 while the request waits."""
        active = self.active.get(request)
        return len(self._slots[active.slots[0]].cached) if active else 0

    def longest_slot(self) -> tuple[int, tuple[int, ...]]:
        """Return the slot with the most cached tokens, and these tokens."""
        slot = max(range(len(self._slots)), key=lambda i: len(self._slots[i].cached))
        return slot, tuple(self._slots[slot].cached)

    def fill_slot(self, tokens: Sequence[int]) -> int:
        """Record tokens as cached in a free slot and return it; the caller fills the cache."""
        assert len(tokens) <= self.capacity
        slot = min(self._free(), key=lambda i: self._slots[i].released)
        self._slots[slot].cached = list(tokens)
        return slot

    def _free(self) -> list[int]:
        return [i for i, slot in enumerate(self._slots) if slot.request is None]

    def admit(self) -> list[int]:
        """Give free slots to waiting requests in their order; return those that got slots."""
        admitted = []
        while self._waiting:
            request, free = self._waiting[0], self._free()
            if len(free) < len(request.texts):
                break
            self._waiting.popleft()
            for prompt in request.texts:
                slot = max(free, key=lambda i: (self._shared(i, prompt), -self._slots[i].released))
                free.remove(slot)
                request.slots.append(slot)
                shared = self._shared(slot, prompt)
                self.reused += shared
                del self._slots[slot].cached[shared:]
                self._slots[slot].request = request.number
            self.active[request.number] = request
            admitted.append(request.number)
        return admitted

    def _shared(self, slot: int, prompt: Sequence[int]) -> int:
        """Count a prompt's cached tokens, rounded down to where a chunk may start."""
        shared = 0
        for cached, token in zip(self._slots[slot].cached, prompt[:-1], strict=False):
            if cached != token:
                break
            shared += 1
        return shared if shared == len(prompt) - 1 else shared - shared % self._alignment

    def plan(
        self, draft: Callable[[int, int], Sequence[int]] = lambda request, limit: ()
    ) -> StepPlan:
        """Plan the next step, and record its tokens as cached.

        Args:
            draft: return a draft of a request's next tokens, at most as many as its second
                argument; called once for each request of one prompt that decodes.
        """
        copy, chunk = self._next_prefill()
        feeds = []
        for request in self.active.values():
            if any(len(self._slots[slot].cached) != len(text) - 1 for slot, text in request.rows):
                continue
            limit = request.remaining - 1
            drafts = draft(request.number, limit) if limit and len(request.slots) == 1 else ()
            assert len(drafts) <= limit
            for slot, text in request.rows:
                tokens = (text[-1], *drafts)
                feeds.append(Feed(slot, tokens, len(text) - 1))
                self._slots[slot].cached.extend(tokens)
        return StepPlan(copy, chunk, tuple(feeds))

    def _next_prefill(self) -> tuple[Copy | None, Chunk | None]:
        for request in self.active.values():
            for slot, text in request.rows:
                if len(self._slots[slot].cached) >= len(text) - 1:
                    continue
                copy = self._copy_prefix(slot, text)
                cached = self._slots[slot].cached
                remaining = len(text) - 1 - len(cached)
                if remaining <= 0:
                    return copy, None
                size = self._chunk_size(remaining, self.capacity - len(cached))
                tokens = tuple(text[len(cached) : len(cached) + min(size, remaining)])
                chunk = Chunk(slot, len(cached), tokens, size)
                cached.extend(tokens)
                return copy, chunk
        return None, None

    def _copy_prefix(self, slot: int, text: Sequence[int]) -> Copy | None:
        """Plan a copy from the slot that shares the most with a text, if it saves a chunk."""
        shared = {other: self._shared(other, text) for other in range(len(self._slots))}
        source = max(shared, key=lambda other: shared[other])
        saved = shared[source] - len(self._slots[slot].cached)
        if saved < self._chunks[0]:
            return None
        self._slots[slot].cached = list(text[: shared[source]])
        self.reused += saved
        return Copy(source, slot)

    def _chunk_size(self, remaining: int, room: int) -> int:
        fitting = (x for x in self._chunks if x <= room and remaining >= _WELL_FILLED * x)
        return max(fitting, default=self._chunks[0])

    def record(self, request: int, token: int) -> bool:
        """Append a sampled token to a request; return whether it was the last one allowed."""
        active = self.active[request]
        for slot, text in active.rows:
            cached = self._slots[slot].cached
            if cached[len(text) : len(text) + 1] != [token]:  # the draft was wrong
                del cached[len(text) :]
            text.append(token)
        active.remaining -= 1
        return active.remaining == 0

    def release(self, request: int) -> None:
        """End a request, active or waiting; its slots keep their cached tokens."""
        active = self.active.pop(request, None)
        if active is None:
            self._waiting = deque(entry for entry in self._waiting if entry.number != request)
            return
        self._clock += 1
        for index, text in active.rows:
            slot = self._slots[index]
            del slot.cached[len(text) :]  # drafts that were never confirmed
            slot.request, slot.released = None, self._clock

    def forget(self) -> None:
        """Record that nothing is cached; active requests are prefilled again."""
        for slot in self._slots:
            slot.cached.clear()
