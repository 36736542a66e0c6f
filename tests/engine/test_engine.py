"""Check the engine's tokens and log-probabilities against forward passes over the whole text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import CONFIG, following, full_logits, fused, log_softmax, prompt, weights

from lwm.core import memory
from lwm.core.errors import CapacityError, ConfigError, InputError
from lwm.core.mesh import make_mesh
from lwm.engine import runner
from lwm.engine.engine import Engine
from lwm.engine.request import Request, Token
from lwm.engine.runner import reserved_length, weights_for
from lwm.engine.sampling import History, Sampling, slot_sampling
from lwm.engine.scoring import Scorer, TokenRows
from lwm.engine.steps import compile_steps
from lwm.generation.model import Model
from lwm.models.cache import cache_capacity, make_cache
from lwm.models.forward import dequantized
from lwm.models.llama import Llama
from lwm.models.quantized import QuantizedTensor, has_quantized, lay_out
from lwm.models.sizes import cache_bytes

GREEDY = Sampling(temperature=0)


@cache
def engine() -> Engine:
    """Return one engine for all tests, since earlier contents of its cache must not matter."""
    return Engine(fused(), CONFIG, slots=3, tokens=256)


def run(engine: Engine, *requests: Request) -> list[list[Token]]:
    """Run requests together and return the tokens of each."""
    numbers = [engine.submit(request) for request in requests]
    events: dict[int, list[Token]] = {number: [] for number in numbers}
    while not engine.scheduler.idle:
        for token in engine.step():
            events[token.request].append(token)
    return [events[number] for number in numbers]


def ids(events: Sequence[Token]) -> list[int]:
    return [event.token for event in events if event.token is not None]


def greedy(tokens: Sequence[int], count: int, **more: Any) -> Request:
    return Request(prompt=tokens, max_tokens=count, sampling=GREEDY, **more)


def assert_greedy(tokens: Sequence[int], answer: list[int]) -> None:
    """Check that every token is the arg-max after the text before it."""
    assert following(tokens, answer).argmax(axis=-1).tolist() == answer


def test_prompts_of_all_lengths_continue_with_the_arg_max() -> None:
    lengths = (1, 2, 31, 32, 33, 34, 70, 150)
    prompts = [prompt(length) for length in lengths]
    counts = (9, 1, 7, 12, 3, 5, 6, 4)
    asked = [greedy(tokens, count) for tokens, count in zip(prompts, counts, strict=True)]
    for tokens, count, events in zip(prompts, counts, run(engine(), *asked), strict=True):
        assert len(ids(events)) == count
        assert [event.finish for event in events] == [None] * (count - 1) + ["length"]
        assert_greedy(tokens, ids(events))


def test_seeds_give_the_same_tokens_beside_other_requests() -> None:
    def sampled(length: int, seed: int, **how: Any) -> Request:
        sampling = Sampling(temperature=1.5, seed=seed, **how)
        return Request(prompt=prompt(length), max_tokens=10, sampling=sampling)

    asked = [sampled(5, 1), sampled(40, 2, top_k=20), sampled(5, 3, top_p=0.9), sampled(9, 4)]
    together = [ids(events) for events in run(engine(), *asked, greedy(prompt(66), 20))]
    alone = [ids(run(engine(), request)[0]) for request in asked]
    assert together[: len(asked)] == alone
    other = ids(run(engine(), sampled(5, 99))[0])
    assert other != alone[0]


def test_repetition_penalty_reads_prompt_and_answer() -> None:
    sampling = Sampling(temperature=0, repetition_penalty=1e9)
    request = Request(prompt=prompt(20), max_tokens=25, sampling=sampling)
    (events,) = run(engine(), request)
    answer = ids(events)
    assert len(set(answer)) == 25
    assert not set(answer) & set(prompt(20))
    # A penalty that divides what is positive to nothing leaves the likeliest of the others, as
    # long as one of them is positive.
    logits = following(prompt(20), answer)
    for step, token in enumerate(answer):
        unseen = np.setdiff1d(np.arange(64), [*prompt(20), *answer[:step]])
        if logits[step, unseen].max() > 1e-3:
            assert token == unseen[logits[step, unseen].argmax()]


def test_penalties_of_the_answer_count_its_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = prompt(20)
    for presence, frequency in ((0.7, 0.0), (0.0, 0.4), (-0.5, 0.3)):
        sampling = replace(GREEDY, presence_penalty=presence, frequency_penalty=frequency)
        request = Request(prompt=tokens, max_tokens=25, sampling=sampling)
        other = greedy(prompt(11), 25)  # its drafts make steps wider
        answer, beside = run(engine(), request, other)
        expected: list[int] = []
        for scores in following(tokens, ids(answer)):
            counts = np.bincount(expected, minlength=CONFIG.vocab_size)
            scores = scores - presence * (counts > 0) - frequency * counts
            expected.append(int(scores.argmax()))
        assert ids(answer) == expected
        assert ids(beside) == ids(run(engine(), other)[0])
        # An interruption computes the text again and keeps the counts.
        mine = engine()
        number = mine.submit(request)
        again: list[int] = []
        while not mine.scheduler.idle:
            if len(again) in (3, 10):
                mine.forget()
            again += ids([token for token in mine.step() if token.request == number])
        assert again == expected


def test_log_probabilities_are_those_of_the_whole_text() -> None:
    tokens = prompt(45)
    sampling = Sampling(temperature=1.2, top_k=30, seed=5)
    request = Request(prompt=tokens, max_tokens=8, sampling=sampling, logprobs=20)
    plain = greedy(prompt(3), 8)
    events, others = run(engine(), request, plain)
    answer = ids(events)
    expected = log_softmax(following(tokens, answer))
    for event, row in zip(events, expected, strict=True):
        assert event.token is not None
        assert abs(event.logprob - row[event.token]) < 1e-4
        order = np.argsort(-row)[:20]
        assert [token for token, _ in event.top] == order.tolist()
        np.testing.assert_allclose([p for _, p in event.top], row[order], atol=1e-4)
    assert all(event.top == () for event in others)


def test_stop_tokens_end_an_answer_and_are_not_part_of_it() -> None:
    tokens = prompt(12)
    whole = ids(run(engine(), greedy(tokens, 12))[0])
    stop = next(token for token in whole if whole.index(token) >= 2)
    (events,) = run(engine(), greedy(tokens, 12, stop_tokens=[stop, 63]))
    assert ids(events) == whole[: whole.index(stop)]
    assert events[-1].token is None
    assert events[-1].finish == "stop"


def test_a_conversation_reuses_its_earlier_turns() -> None:
    mine = engine()
    first = prompt(50, seed=7)
    answer = ids(run(mine, greedy(first, 6))[0])
    before = mine.scheduler.reused
    second = [*first, *answer, *prompt(20, seed=8)]
    again = ids(run(mine, greedy(second, 6))[0])
    assert mine.scheduler.reused - before == len(first) + len(answer) - 1
    assert_greedy(second, again)
    # Another turn after the same beginning: what followed it must be forgotten.
    other = [*first, *prompt(30, seed=9)]
    assert_greedy(other, ids(run(mine, greedy(other, 6))[0]))
    # The very same prompt again: all of it but the last token is there.
    before = mine.scheduler.reused
    assert_greedy(other, ids(run(mine, greedy(other, 6))[0]))
    assert mine.scheduler.reused - before == len(other) - 1


def test_streams_report_the_prompt_and_free_their_slot_when_closed() -> None:
    mine, steps_done = engine(), []

    def advance(steps: int = 1) -> None:
        steps_done.append(steps)

    tokens = prompt(90, seed=3)
    stream = mine.stream(greedy(tokens, 50), advance)
    answer = [next(stream).token for _ in range(3)]
    assert_greedy(tokens, [token for token in answer if token is not None])
    assert len(tokens) <= sum(steps_done) <= len(tokens) + 3
    stream.close()  # type: ignore[attr-defined]
    assert mine.scheduler.idle
    assert_greedy(tokens, ids(list(mine.stream(greedy(tokens, 3)))))


def test_streams_read_in_turn_lose_no_token() -> None:
    prompts = [prompt(40, seed=5), prompt(7, seed=6)]
    streams = [engine().stream(greedy(tokens, 9)) for tokens in prompts]
    answers: list[list[int]] = [[next(stream).token or 0] for stream in streams]
    for stream, answer in zip(streams, answers, strict=True):
        answer += ids(list(stream))
    for tokens, answer in zip(prompts, answers, strict=True):
        assert len(answer) == 9
        assert_greedy(tokens, answer)


def test_an_interrupted_step_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = prompt(150, seed=7)
    with interrupted(engine(), monkeypatch), pytest.raises(KeyboardInterrupt):
        list(engine().stream(greedy(tokens, 3)))
    (events,) = run(engine(), greedy(tokens, 5))
    assert_greedy(tokens, ids(events))


@contextmanager
def interrupted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Raise KeyboardInterrupt after each chunk."""
    prefill = engine._runner.prefill

    def interrupt(chunk: Any) -> None:
        prefill(chunk)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "prefill", interrupt)
        yield


def limit_memory(patch: pytest.MonkeyPatch, share: float) -> None:
    """Let `share` times the cache of the model below fit into memory."""
    shape = (1, CONFIG.num_kv_heads, CONFIG.head_dim, 2944)  # a capacity of no other test
    shapes = (shape, (*shape[:2], shape[3], shape[2]))
    budget = int(share * 2 * CONFIG.num_layers * np.prod(shape) * 4)

    def available(device: Any) -> int:
        arrays = [x for x in jax.live_arrays() if not x.is_deleted() and x.shape in shapes]
        return budget - sum(array.nbytes for array in arrays)

    patch.setattr(memory, "available_bytes", available)


def test_interruption_needs_no_memory_for_a_second_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(monkeypatch, 1.5)
    mine, tokens = Engine(fused(), CONFIG, tokens=2944), prompt(150, seed=7)
    with interrupted(mine, monkeypatch), pytest.raises(KeyboardInterrupt):
        list(mine.stream(greedy(tokens, 3)))
    assert_greedy(tokens, ids(run(mine, greedy(tokens, 5))[0]))


def test_failed_allocation_leaves_an_engine_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, tokens = Engine(fused(), CONFIG, tokens=2944), prompt(40, seed=7)
    with monkeypatch.context() as patch:
        limit_memory(patch, 0.5)
        with interrupted(mine, monkeypatch), pytest.raises(KeyboardInterrupt):
            list(mine.stream(greedy(tokens, 3)))
        for _ in range(2):
            with pytest.raises(CapacityError, match="free"):
                list(mine.stream(greedy(tokens, 3)))
    assert_greedy(tokens, ids(run(mine, greedy(tokens, 5))[0]))


def test_failed_growth_leaves_an_engine_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, tokens = Engine(fused(), CONFIG, tokens=256), prompt(40, seed=7)
    run(mine, greedy(tokens, 2))

    def fail(cache: Any, *_: Any) -> None:
        cache[0].keys.delete()
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(runner, "grow_cache", fail)
        with pytest.raises(MemoryError):
            mine.require(1000, 1)
    assert_greedy(tokens, ids(run(mine, greedy(tokens, 5))[0]))


def test_repetition_penalty_survives_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(temperature=0, repetition_penalty=1e9)
    request = Request(prompt=prompt(20), max_tokens=10, sampling=sampling)
    expected = ids(run(engine(), request)[0])
    mine, answer = engine(), []
    mine.submit(request)
    while not mine.scheduler.idle:
        answer += ids(mine.step())
        mine.forget()
    assert answer == expected


def test_requests_join_and_leave_between_steps() -> None:
    mine = engine()
    staying, leaving, waiting = (mine.submit(greedy(prompt(n), 12)) for n in (6, 7, 8))
    late = mine.submit(greedy(prompt(9), 2))
    events: list[Token] = []
    for step in range(60):
        events += mine.step()
        if step == 4:
            mine.cancel(leaving)
            mine.cancel(leaving)
    assert mine.scheduler.idle
    by_request = {
        n: ids([e for e in events if e.request == n]) for n in (staying, leaving, waiting, late)
    }
    assert [len(by_request[n]) for n in (staying, waiting, late)] == [12, 12, 2]
    assert 0 < len(by_request[leaving]) < 12
    for number, length in ((staying, 6), (leaving, 7), (waiting, 8), (late, 9)):
        assert_greedy(prompt(length), by_request[number])


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_mixes_two_forward_passes_of_the_engine(scale: float) -> None:
    conditional, unconditional = prompt(40, seed=1), prompt(5, seed=2)
    request = Request(
        prompt=conditional, unconditional=unconditional, max_tokens=6, logprobs=3,
        sampling=Sampling(temperature=0, guidance=scale),
    )  # fmt: skip
    events, beside = run(engine(), request, greedy(prompt(11), 6))
    answer = ids(events)
    wanted, unwanted = (following(text, answer) for text in (conditional, unconditional))
    mixed = unwanted + scale * (wanted - unwanted)
    assert mixed.argmax(axis=-1).tolist() == answer
    expected = log_softmax(mixed)
    for event, row in zip(events, expected, strict=True):
        assert abs(event.logprob - row.max()) < 1e-4 * max(1, scale)
    alone = {0.0: unconditional, 1.0: conditional}.get(scale)
    if alone is not None:
        assert answer == ids(run(engine(), greedy(alone, 6))[0])
    assert_greedy(prompt(11), ids(beside))


def test_a_cache_that_grows_keeps_its_contents() -> None:
    mine = Engine(fused(), CONFIG, slots=3, tokens=256)
    tokens = prompt(150)
    answer = ids(run(mine, greedy(tokens, 4))[0])
    longer = [*tokens, *answer, *prompt(120, seed=4)]
    with pytest.raises(CapacityError, match="256"):
        mine.submit(greedy(longer, 4))
    mine.require(len(longer), 4)
    assert mine.scheduler.capacity >= len(longer) + 4
    assert_greedy(longer, ids(run(mine, greedy(longer, 4))[0]))
    assert mine.scheduler.reused == len(tokens) + len(answer) - 1
    capacity = mine.scheduler.capacity
    mine.require(10, 10)
    assert mine.scheduler.capacity == capacity


def test_a_cache_beyond_memory_is_refused_before_it_exists() -> None:
    with pytest.raises(CapacityError, match=r"GB.*free"):
        Engine(fused(), CONFIG, tokens=10**12)
    mine = engine()
    cache = mine.cache
    with pytest.raises(CapacityError, match=r"GB.*free"):
        mine.require(10**12, 1)
    assert mine.cache is cache
    assert_greedy(prompt(4), ids(run(mine, greedy(prompt(4), 3))[0]))


def test_quantized_kernels_give_the_tokens_of_dequantized_ones() -> None:
    """Check layers that quantize different kernels, some with offsets, as mixed files do."""

    def quantize(kernel: Any, *, offsets: bool) -> Any:
        dense = np.asarray(kernel).reshape(len(kernel), -1, 32)
        low = dense.min(axis=-1) if offsets else np.zeros(dense.shape[:-1], np.float32)
        scales = np.abs(dense - low[..., None]).max(axis=-1) / 127
        values = np.rint((dense - low[..., None]) / scales[..., None]).astype(np.int8)
        values = values.reshape(kernel.shape)
        return jax.device_put(lay_out(QuantizedTensor(values, scales, low if offsets else None)))

    first, second = cast(Any, fused().layers)
    layers = (
        replace(
            first,
            attention_in=quantize(first.attention_in, offsets=False),
            mlp_in=quantize(first.mlp_in, offsets=True),
        ),
        replace(
            second,
            output=quantize(second.output, offsets=False),
            mlp_in=quantize(second.mlp_in, offsets=False),
        ),
        replace(first, mlp_in=quantize(first.mlp_in, offsets=False)),
    )
    config = replace(CONFIG, num_layers=len(layers))
    quantized = replace(fused(), layers=layers)
    dense = Engine(dequantized(quantized), config, slots=2, tokens=256)
    asked = (greedy(prompt(150), 6), greedy(prompt(40), 6))
    answers = [
        ids(events) for events in run(Engine(quantized, config, slots=2, tokens=256), *asked)
    ]
    assert answers == [ids(events) for events in run(dense, *asked)]
    # A layer's dequantized kernels reuse the buffers of the layer before.
    kernels = {"mlp_in": layers[0].mlp_in}
    steps = compile_steps(config, None, jnp.float32)
    room = steps.dequantize(kernels, {})
    aliased = steps.dequantize.lower(kernels, room).compile().memory_analysis().alias_size_in_bytes
    assert aliased == room["mlp_in"].nbytes
    # The weights themselves were not donated.
    again = Engine(quantized, config, slots=2, tokens=256)
    assert [ids(events) for events in run(again, *asked)] == answers


def test_dequantized_weights_are_made_once_and_only_where_they_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = np.zeros((64, 32), np.int8)
    table = jax.device_put(lay_out(QuantizedTensor(kernel, np.ones((64, 1), np.float32), None)))
    model = Model(
        source="tiny", config=CONFIG, weights=replace(fused(), embedding=table),
        open_tokenizer=lambda: None, dtype="float32", mesh=None,
    )  # fmt: skip
    first, second = (model.new_engine(slots, 256)._runner._weights for slots in (5, 8))
    assert not has_quantized(first)
    assert first is second
    assert has_quantized(model.new_engine(4, 256)._runner._weights)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 64 * 32 * 4 - 1)
    with pytest.raises(CapacityError, match=r"float32 copy of the quantized weights.*at most 4"):
        weights_for(model.weights, 5)


def test_reserved_length_stays_within_the_context() -> None:
    config = replace(CONFIG, max_sequence_length=550_000)
    assert reserved_length(530_000, config) == 550_000
    assert reserved_length(530_000, replace(config, max_sequence_length=1 << 20)) == 655_360
    assert reserved_length(5_000, replace(config, max_sequence_length=4_096)) == 5_000
    assert reserved_length(10, config) == 1024


def test_headroom_is_left_out_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, max_sequence_length=1 << 20)
    needed = cache_bytes(config, cache_capacity(2100, None), "float32")
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed)
    mine = Engine(fused(), config, tokens=2100, headroom=True)
    assert mine.scheduler.capacity == 2176
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10 * needed)
    assert Engine(fused(), config, tokens=2100, headroom=True).scheduler.capacity == 2560
    mine.require(2200, 1)
    assert mine.scheduler.capacity == 2560


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_products_are_exact_in_every_step(dtype: str) -> None:
    """Check the precision of all dots, which accelerators would otherwise round."""
    model = jax.tree.map(lambda x: x.astype(dtype), fused())
    steps = compile_steps(CONFIG, None, jnp.dtype(dtype))
    cache = tuple(make_cache(CONFIG, slots=1, capacity=256, dtype=dtype))
    layers: Any = model.layers
    zero, row = np.int32(0), np.zeros((1, 32), np.int32)
    settings = slot_sampling(
        [Sampling()], conditional=row[0, :1], unconditional=row[0, :1],
        logprobs=np.zeros(1, bool), answer=row[0, :1], low=row[0, :1], high=row[0, :1] + 64,
    )  # fmt: skip
    x, angles = steps.embed(model.embedding, row), steps.angles(row)
    x1, angles1 = x[:, :1], steps.angles(row[:, :1])
    history: Any = History(present=np.zeros((1, 64), bool), answered=np.zeros((1, 64), np.int32))  # type: ignore[arg-type]
    rows = TokenRows(row, row, row)  # type: ignore[arg-type]
    scorer = Scorer(model, CONFIG, None)
    lowered = {
        "prefill": steps.prefill.lower(layers[0], x, angles, cache[0], zero, zero),
        "last": steps.prefill_last.lower(layers[0], x, angles, cache[0], zero, zero),
        "decode": steps.decode.lower(layers, x1, angles1, cache, row[:, :1]),
        "sample": steps.sample.lower(model, x1, history, row[:, :1], row[:, :1], settings),
        "logits": scorer._logits.lower(model, rows),
        "scores": scorer._scores.lower(model, rows, row),
    }
    for name, step in lowered.items():
        dots = [line for line in step.as_text().splitlines() if "dot_general" in line]
        assert dots, name
        for dot in dots:
            assert ("HIGHEST" in dot) == (dtype == "float32"), (name, dot)


def test_requests_that_cannot_run_are_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        engine().submit(greedy([], 3))
    with pytest.raises(InputError, match=r"token 64.*vocabulary of 64"):
        engine().submit(greedy([1, 64], 3))
    with pytest.raises(InputError, match="token -1"):
        engine().submit(greedy([1], 3, unconditional=[-1]))
    with pytest.raises(CapacityError, match="256"):
        engine().submit(greedy(prompt(250), 7))
    with pytest.raises(ConfigError, match="logprobs is 21"):
        greedy([1], 1, logprobs=21)
    assert engine().scheduler.idle


@pytest.mark.parametrize("mesh", ["1,1,1,4", "1,1,2,2", "1,2,2,1", "2,1,1,2"])
def test_sharded_engines_give_the_same_tokens(mesh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    laid = make_mesh(mesh)
    mine = Engine(weights(mesh), CONFIG, slots=2, tokens=256, mesh=laid)
    tokens = prompt(70)
    sampled = Request(
        prompt=prompt(23), max_tokens=6, sampling=Sampling(temperature=1.2, top_k=30, seed=11)
    )
    asked = (greedy(tokens, 7, logprobs=2), sampled)
    prompts = [list(request.prompt) for request in asked]
    guesses = Guesses(mine, monkeypatch, prompts, [ids(x) for x in run(plain(), *asked)])
    first, second = run(mine, *asked)
    assert len(guesses.fed) < 13 < sum(guesses.fed)
    monkeypatch.undo()
    assert_greedy(tokens, ids(first))
    expected = log_softmax(following(tokens, ids(first))).max(axis=-1)
    np.testing.assert_allclose([event.logprob for event in first], expected, atol=1e-4)
    assert ids(second) == ids(run(plain(), sampled)[0])
    # A turn that goes on where the first ended, from a multiple of the sequence axis.
    shards = laid.shape["sequence"]
    longer = [*tokens, *ids(first), *prompt(9)]
    assert_greedy(longer, ids(run(mine, greedy(longer, 5))[0]))
    assert mine.scheduler.reused == (len(tokens) + 6) // shards * shards
    # Two requests that begin alike: the second copies the cache of the first.
    before = mine.scheduler.reused
    alike = [[*prompt(140, seed=5), *prompt(count, seed=count)] for count in (3, 7)]
    for tokens, events in zip(alike, run(mine, *(greedy(x, 4) for x in alike)), strict=True):
        assert_greedy(tokens, ids(events))
    assert mine.scheduler.reused - before >= 140 // shards * shards


def test_a_deep_model_on_simulated_devices_does_not_run_out_of_threads() -> None:
    """Check that launches are paced: with too many in flight, XLA aborts the process."""
    depth = 67  # a prime, so that decode runs layers one by one too
    config = replace(CONFIG, num_layers=depth)

    def deep(model: Llama) -> Llama:
        layers: Any = model.layers
        return replace(model, layers=(layers * depth)[:depth])

    alone = Engine(deep(fused()), config, tokens=256, drafts=False)
    ring = Engine(
        deep(weights("1,1,1,4")), config, tokens=256, drafts=False, mesh=make_mesh("1,1,1,4")
    )
    asked = greedy(prompt(200), 4)
    assert ids(run(ring, asked)[0]) == ids(run(alone, asked)[0])


def test_a_chunk_computes_no_attention_in_the_last_layer() -> None:
    """Check that the compiler drops attention, with its collectives."""
    mesh, size = make_mesh("1,1,1,4"), 128
    steps, model = compile_steps(CONFIG, mesh, jnp.float32), weights("1,1,1,4")
    layers: Any = model.layers
    cache = make_cache(CONFIG, slots=1, capacity=512, dtype="float32", mesh=mesh)
    x = steps.embed(model.embedding, np.zeros((1, size), np.int32))
    turn = steps.angles(np.arange(size, dtype=np.int32)[None])
    arguments = (layers[0], x, turn, cache[0], np.int32(0), np.int32(0))
    for step, whole in ((steps.prefill, True), (steps.prefill_last, False)):
        program = step.lower(*arguments).compile().as_text()
        assert ("exponential(" in program) == ("collective-permute(" in program) == whole


@cache
def plain() -> Engine:
    return Engine(fused(), CONFIG, slots=3, tokens=256, drafts=False)


class Guesses:
    """Draft the answers of an engine without drafts, with one wrong token in every third draft,
    and count the tokens that each step takes."""

    def __init__(
        self, engine: Engine, patch: pytest.MonkeyPatch, prompts: Sequence[Any], answers: Any
    ) -> None:
        self.texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        self.scheduler, self.asked = engine.scheduler, 0
        self.fed: list[int] = []
        decode = engine._runner.decode

        def count(feeds: Sequence[Any], *arguments: Any, **options: Any) -> Any:
            self.fed += [len(one.tokens) for one in feeds]
            return decode(feeds, *arguments, **options)

        patch.setattr(engine, "_draft", self.draft)
        patch.setattr(engine._runner, "decode", count)

    def draft(self, request: int, most: int) -> list[int]:
        text = self.scheduler.active[request].texts[0]
        known = next(whole for whole in self.texts if whole[: len(text)] == text)
        self.asked += 1
        guess = known[len(text) : len(text) + min(most, 1 + self.asked % 3)]
        if guess and self.asked % 3 == 0:
            wrong = self.asked // 3 % len(guess)
            guess[wrong] = (guess[wrong] + 1) % CONFIG.vocab_size
        return guess


def assert_same(with_drafts: Sequence[Token], without: Sequence[Token]) -> None:
    assert ids(with_drafts) == ids(without)
    assert [event.finish for event in with_drafts] == [event.finish for event in without]
    for one, other in zip(with_drafts, without, strict=True):
        assert abs(one.logprob - other.logprob) < 1e-4
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
        np.testing.assert_allclose(
            [p for _, p in one.top], [p for _, p in other.top], rtol=0, atol=1e-4
        )


def test_drafts_change_no_token_of_any_kind_of_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def sampled(length: int, seed: int, **how: Any) -> Request:
        sampling = Sampling(temperature=1.4, seed=seed, **how)
        return Request(prompt=prompt(length), max_tokens=17, sampling=sampling, logprobs=seed % 3)

    stop = ids(run(plain(), greedy(prompt(12), 12))[0])[7]
    penalized = Sampling(temperature=0, repetition_penalty=1e9)
    asked = [
        greedy(prompt(33), 21, logprobs=4),
        greedy(prompt(12), 20, stop_tokens=[stop]),
        sampled(5, 1),
        Request(prompt=prompt(20), max_tokens=25, sampling=penalized),
        sampled(40, 2, top_k=20),
        sampled(9, 3, repetition_penalty=1.3, top_p=0.9),
        greedy(prompt(7), 2),
        greedy(prompt(70), 1),
    ]
    without = run(plain(), *asked)
    assert without[1][-1].finish == "stop"
    with monkeypatch.context() as patch:
        answers = [[*ids(events), stop] for events in without]
        guesses = Guesses(engine(), patch, [list(request.prompt) for request in asked], answers)
        for one, other in zip(run(engine(), *asked), without, strict=True):
            assert_same(one, other)
        # Fewer feeds than tokens, and more drafts than came true.
        assert len(guesses.fed) < 0.8 * sum(map(len, without)) < sum(guesses.fed)
    # Wrong drafts leave nothing in the cache: the texts can be continued.
    for request, events in zip(asked[:3], without, strict=False):
        longer = [*request.prompt, *ids(events), *prompt(8, seed=4)]
        assert_greedy(longer, ids(run(engine(), greedy(longer, 6))[0]))
    assert engine().scheduler.idle


def test_a_request_alone_among_many_slots_is_computed_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    many = Engine(fused(), CONFIG, slots=6, tokens=256)
    rows: list[int] = []
    decode = many._runner.decode

    def note(feeds: Any, width: int, settings: Any, **options: Any) -> Any:
        sampled = decode(feeds, width, settings, **options)
        rows.append(len(sampled.tokens))
        return sampled

    monkeypatch.setattr(many._runner, "decode", note)
    counted = replace(GREEDY, presence_penalty=0.7, frequency_penalty=0.4)
    drawn = Sampling(temperature=1.3, seed=4, repetition_penalty=0.5, top_k=20)
    guided = Sampling(temperature=0.8, seed=2, guidance=2.0)
    asked = [
        greedy(prompt(33), 12, logprobs=3),
        Request(prompt=prompt(20), max_tokens=12, sampling=counted),
        Request(prompt=prompt(9), max_tokens=30, sampling=drawn, logprobs=2),
        Request(prompt=prompt(6), max_tokens=5, sampling=guided, unconditional=prompt(4)),
    ]
    expected = [run(plain(), request)[0] for request in asked]
    for _ in range(2):  # in other slots, whose contents remain, and then in their own again
        for request, events in zip(asked, expected, strict=True):
            rows.clear()
            assert_same(run(many, request)[0], events)
            assert set(rows) == ({6} if request is asked[-1] else {1})
    rows.clear()
    for one, events in zip(run(many, *asked), expected, strict=True):
        assert_same(one, events)
    assert set(rows) == {1, 6}  # the longest answer ends alone


def test_repetitive_text_takes_fewer_steps() -> None:
    """Check the real drafter on an answer that a penalty below 1 makes repeat itself."""
    sampling = Sampling(temperature=0, repetition_penalty=0.01)
    request = Request(prompt=prompt(5, seed=3), max_tokens=60, sampling=sampling)
    mine, steps, answer = engine(), 0, []
    mine.submit(request)
    while not mine.scheduler.idle:
        steps += 1
        answer += ids(mine.step())
    assert answer == ids(run(plain(), request)[0])
    assert steps < 50


def test_streams_of_several_tokens_a_step_lose_none(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [prompt(40, seed=5), prompt(7, seed=6), prompt(21, seed=6)]
    expected = [ids(run(plain(), greedy(tokens, 12))[0]) for tokens in prompts]
    with monkeypatch.context() as patch:
        Guesses(engine(), patch, prompts, expected)
        streams = [engine().stream(greedy(tokens, 12)) for tokens in prompts]
        answers = [[next(stream).token] for stream in streams]
        answers[0] += [next(streams[0]).token for _ in range(3)]
        streams[0].close()  # type: ignore[attr-defined]
        for stream, answer in zip(streams[1:], answers[1:], strict=True):
            answer += ids(list(stream))
    assert answers == [expected[0][:4], *expected[1:]]
    assert engine().scheduler.idle


def test_the_reference_is_causal() -> None:
    """Check that the reference forward pass is causal."""
    tokens = prompt(30)
    changed = [*tokens[:20], *prompt(10, seed=5)]
    whole, other = full_logits(tokens), full_logits(changed)
    np.testing.assert_array_equal(whole[:20], other[:20])
    assert np.abs(whole[20:] - other[20:]).max() > 0.1
