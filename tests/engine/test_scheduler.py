"""Drive the scheduler at random with a cache of tokens instead of keys, and check that each token
is decoded after exactly the text of its request."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import given

from lwm.core.errors import CapacityError, InputError
from lwm.engine.scheduler import Scheduler

UNWRITTEN = -7


@dataclass
class Job:
    """Hold a request and its results."""

    prompts: list[list[int]]
    max_tokens: int
    stop_after: int | None = None  # number of tokens before a stop token
    answer: list[int] = field(default_factory=list)
    reused: list[int] = field(default_factory=list)  # cached tokens of each row
    computed: list[list[int]] = field(default_factory=list)  # prompt positions, in order
    copied: list[list[int]] = field(default_factory=list)  # likewise, after the first chunk
    done: bool = False

    def next_token(self) -> int:
        """Return the next token of a deterministic stand-in for a model."""
        return random.Random(len(self.answer) + sum(self.prompts[0])).randrange(3)


class Simulation:
    """Step a scheduler as the engine does, and check every step."""

    def __init__(self, slots: int, capacity: int, chunks: Sequence[int], alignment: int) -> None:
        self.scheduler = Scheduler(
            slots=slots, capacity=capacity, chunks=chunks, alignment=alignment
        )
        self.rows = [[UNWRITTEN] * capacity for _ in range(slots)]
        self.chunks, self.alignment = set(chunks), alignment
        self.jobs: dict[int, Job] = {}
        self.owner: dict[int, tuple[int, int]] = {}  # slot -> request and row
        self.luck = random.Random(slots)  # number of drafted tokens, and of right ones
        self.steps = self.accepted = self.copies = 0

    def submit(self, job: Job) -> int:
        number = self.scheduler.submit(job.prompts, job.max_tokens)
        assert number not in self.jobs
        self.jobs[number] = job
        return number

    def release(self, number: int) -> None:
        self.scheduler.release(number)
        self.jobs[number].done = True
        self.owner = {s: who for s, who in self.owner.items() if who[0] != number}

    def draft(self, request: int, limit: int) -> list[int]:
        """Return some right tokens, then perhaps wrong ones."""
        job = self.jobs[request]
        assert len(job.prompts) == 1
        assert 0 < limit == job.max_tokens - len(job.answer) - 1
        count, right = self.luck.randint(0, min(5, limit)), self.luck.randint(0, 5)
        ahead = Job(job.prompts, job.max_tokens, answer=list(job.answer))
        for i in range(count):
            ahead.answer.append((ahead.next_token() + (i >= right)) % 3)
        return ahead.answer[len(job.answer) :]

    def step(self) -> None:
        self.steps += 1
        for number in self.scheduler.admit():
            job = self.jobs[number]
            slots = self.scheduler.active[number].slots
            assert len(slots) == len(set(slots)) == len(job.prompts)
            for row, slot in enumerate(slots):
                assert slot not in self.owner, "two owners of a slot"
                self.owner[slot] = (number, row)
            job.computed, job.copied = ([[] for _ in job.prompts] for _ in range(2))
            job.reused = [-1 for _ in job.prompts]
        plan = self.scheduler.plan(self.draft)
        if plan.copy is not None:
            source, slot = plan.copy.source, plan.copy.destination
            self.rows[slot] = list(self.rows[source])
            number, row = self.owner[slot]
            job, computed = self.jobs[number], self.jobs[number].computed[row]
            end = len(job.prompts[row]) - 1 if plan.chunk is None else plan.chunk.first
            assert plan.chunk is None or plan.chunk.slot == slot
            assert self.rows[slot][:end] == job.prompts[row][:end], "another text is copied"
            if computed:
                job.copied[row].extend(range(computed[-1] + 1, end))
            self.copies += 1
        if plan.chunk is not None:
            self.run_chunk(plan.chunk.slot, plan.chunk.first, plan.chunk.tokens, plan.chunk.size)
        fed: dict[int, list[tuple[int, ...]]] = {}
        for feed in plan.feeds:
            number, row = self.owner[feed.slot]
            text = self.jobs[number].prompts[row] + self.jobs[number].answer
            if self.jobs[number].reused[row] < 0:  # no chunk was needed
                self.jobs[number].reused[row] = feed.position
            assert (feed.tokens[0], feed.position) == (text[-1], len(text) - 1)
            assert self.rows[feed.slot][: feed.position] == text[:-1], "another text in the cache"
            end = feed.position + len(feed.tokens)
            assert end <= self.scheduler.capacity
            self.rows[feed.slot][feed.position : end] = feed.tokens
            fed.setdefault(number, []).append(feed.tokens)
        for number, rows in fed.items():
            job = self.jobs[number]
            assert len(rows) == len(job.prompts), "a row is missing"
            drafts = [*rows[0][1:], None]
            for draft in drafts:
                token = job.next_token()
                if len(job.answer) == job.stop_after:  # a stop token, which is not recorded
                    self.release(number)
                    break
                job.answer.append(token)
                full = self.scheduler.record(number, token)
                assert full == (len(job.answer) == job.max_tokens)
                if full:
                    self.release(number)
                if full or token != draft:
                    break
                self.accepted += 1

    def run_chunk(self, slot: int, first: int, tokens: Sequence[int], size: int) -> None:
        number, row = self.owner[slot]
        job = self.jobs[number]
        assert size in self.chunks
        assert 0 < len(tokens) <= size
        assert first % self.alignment == 0
        assert first + size <= self.scheduler.capacity, "a chunk ends beyond the cache"
        if job.reused[row] < 0:
            job.reused[row] = first
        job.computed[row].extend(range(first, first + len(tokens)))
        prompt = job.prompts[row]
        assert self.rows[slot][:first] == prompt[:first]
        assert list(tokens) == prompt[first : first + len(tokens)]
        assert first + len(tokens) < len(prompt), "the last token is fed, not prefilled"
        padding = [UNWRITTEN] * (size - len(tokens))
        self.rows[slot][first : first + size] = [*tokens, *padding]

    def run(self) -> None:
        while not self.scheduler.idle:
            self.step()

    def check_prompts(self) -> None:
        """Check that each position of a prompt, except the last, was reused or computed once."""
        for job in self.jobs.values():
            for row, prompt in enumerate(job.prompts if job.answer else []):
                expected = list(range(job.reused[row], len(prompt) - 1))
                assert sorted(job.computed[row] + job.copied[row]) == expected


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=40)


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    return Job(
        prompts=draw(st.lists(prompts, min_size=1, max_size=2)),
        max_tokens=draw(st.integers(1, 12)),
        stop_after=draw(st.none() | st.integers(1, 6)),
    )


@given(
    st.integers(2, 4),
    st.sampled_from([([4, 8], 1), ([4, 16], 2), ([8], 4), ([16, 4, 32], 4), ([5, 7], 1)]),
    st.lists(st.one_of(jobs(), st.integers(0, 30), st.just("step")), max_size=40),
)
def test_each_request_decodes_after_its_text(
    slots: int, sizes: tuple[list[int], int], events: list[Job | int | str]
) -> None:
    simulation = Simulation(slots, 64, *sizes)
    for event in events:
        if isinstance(event, Job):
            simulation.submit(event)
        elif isinstance(event, int):
            if event in simulation.jobs and not simulation.jobs[event].done:
                simulation.release(event)
        else:
            simulation.step()
    simulation.run()
    simulation.check_prompts()
    for job in simulation.jobs.values():
        assert job.done
    assert simulation.scheduler.active == {}


@given(prompts, prompts, st.integers(1, 6), st.sampled_from([1, 2, 4]))
def test_the_next_request_reuses_the_longest_shared_prefix(
    first: list[int], more: list[int], answer: int, alignment: int
) -> None:
    simulation = Simulation(2, 128, [4, 8], alignment)
    number = simulation.submit(Job([first], answer))
    simulation.run()
    text = first + simulation.jobs[number].answer
    # A conversation goes on: the last token of the answer was never fed.
    again = simulation.submit(Job([text + more], 1))
    simulation.run()
    simulation.check_prompts()
    aligned = (len(text) - 1) // alignment * alignment
    assert simulation.jobs[again].reused == [aligned]
    assert simulation.scheduler.reused == aligned


def test_a_request_gets_the_slot_that_shares_most_or_else_the_oldest() -> None:
    simulation = Simulation(3, 64, [4], 1)
    texts = ([1] * 9, [2] * 9, [0] * 9)
    numbers = [simulation.submit(Job([text], 1)) for text in texts]
    simulation.step()
    slots = [simulation.scheduler.active[number].slots[0] for number in numbers]
    simulation.run()
    fourth = simulation.submit(Job([[2] * 9 + [0]], 1))
    simulation.scheduler.admit()
    assert simulation.scheduler.active[fourth].slots == [slots[1]]
    assert simulation.scheduler.prefilled(fourth) == 9
    fifth = simulation.scheduler.submit([[5, 6]], 1)
    simulation.scheduler.admit()
    assert simulation.scheduler.active[fifth].slots == [slots[0]]


@pytest.mark.parametrize("waiting", [0, 1, 20])
def test_a_prefix_in_another_slot_is_copied_and_computed_once(waiting: int) -> None:
    document = [0, 1, 2] * 30
    simulation = Simulation(3, 128, [4, 16], 1)
    first = simulation.submit(Job([[*document, 1]], 12))
    for _ in range(waiting):  # the first request waits, is prefilled, or is done
        simulation.step()
    others = [simulation.submit(Job([[*document, 2, token]], 5)) for token in (0, 2)]
    simulation.run()
    simulation.check_prompts()
    computed = [len(simulation.jobs[number].computed[0]) for number in (first, *others)]
    assert computed[0] == len(document)
    assert max(computed[1:]) <= 1 + 4
    assert simulation.copies >= 1
    copied_or_shared = len(document) - 4
    assert simulation.scheduler.reused >= 2 * copied_or_shared


def test_requests_are_admitted_in_order_and_pairs_wait_for_two_slots() -> None:
    scheduler = Scheduler(slots=2, capacity=32, chunks=[4])
    one = scheduler.submit([[1, 2]], 3)
    two = scheduler.submit([[1, 2], [3]], 3)
    late = scheduler.submit([[4]], 3)
    assert scheduler.admit() == [one]
    assert scheduler.admit() == []  # the pair waits, and no later request overtakes it
    scheduler.release(one)
    assert scheduler.admit() == [two]
    assert sorted(scheduler.active[two].slots) == [0, 1]
    scheduler.release(late)  # while it waits
    scheduler.release(two)
    assert scheduler.admit() == []
    assert scheduler.idle


def test_rows_of_a_pair_decode_together() -> None:
    scheduler = Scheduler(slots=2, capacity=64, chunks=[4])
    scheduler.submit([[1], list(range(9))], 3)
    scheduler.admit()
    assert [len(scheduler.plan().feeds) for _ in range(2)] == [0, 2]


def test_right_drafts_save_steps_and_wrong_ones_are_discarded() -> None:
    scheduler = Scheduler(slots=1, capacity=64, chunks=[4])
    number = scheduler.submit([[1, 2]], 10)
    scheduler.admit()
    (feed,) = scheduler.plan(lambda request, limit: [5, 6, 7]).feeds
    assert (feed.tokens, feed.position) == ((2, 5, 6, 7), 1)
    for token in (5, 6, 8):  # two drafts were right
        scheduler.record(number, token)
    (feed,) = scheduler.plan(lambda request, limit: [0] * limit).feeds
    assert (feed.tokens, feed.position) == ((8, 0, 0, 0, 0, 0, 0), 4)
    scheduler.record(number, 0)
    scheduler.release(number)  # the first draft was right, and then a stop token came
    again = scheduler.submit([[1, 2, 5, 6, 8, 0, 0, 0]], 1)
    scheduler.admit()
    assert scheduler.prefilled(again) == 6


def test_requests_that_can_never_run_are_refused() -> None:
    scheduler = Scheduler(slots=1, capacity=32, chunks=[8])
    with pytest.raises(InputError, match="empty"):
        scheduler.submit([[]], 3)
    with pytest.raises(InputError, match="max_tokens is 0"):
        scheduler.submit([[1]], 0)
    with pytest.raises(CapacityError, match=r"20 tokens and 13 more.*33 positions.*32"):
        scheduler.submit([[1] * 20], 13)
    with pytest.raises(CapacityError, match="2 slots"):
        scheduler.submit([[1], [2]], 1)
    scheduler.submit([[1] * 20], 12)
    scheduler.capacity = 64
    scheduler.submit([[1] * 20], 13)


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([[4], [8, 16], [4, 32]]))
def test_needed_capacity_is_enough_for_every_chunk(
    prompt: int, max_tokens: int, chunks: list[int]
) -> None:
    probe = Scheduler(slots=1, capacity=1, chunks=chunks)
    simulation = Simulation(1, probe.needed_capacity(prompt, max_tokens), chunks, 1)
    job = Job([[i % 3 for i in range(prompt)]], max_tokens)
    simulation.submit(job)
    simulation.run()
    assert len(job.answer) == max_tokens
