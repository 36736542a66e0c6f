"""Check sampling against transformers' processors in their order, and sampled tokens against their
probabilities."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lwm.core.errors import ConfigError
from lwm.engine import sampling
from lwm.engine.sampling import (
    MAX_ALTERNATIVES,
    History,
    Sampled,
    Sampling,
    SlotSampling,
    filter_min_p,
    filter_top,
    penalize,
    sample,
    slot_sampling,
)

VOCAB = 50
compiled_sample = jax.jit(sample)


@jax.jit
def keep(logits: Any, top_k: Any, top_p: Any, min_p: Any) -> Any:
    return filter_min_p(filter_top(logits, top_k, top_p), min_p)


def random_logits(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, VOCAB), scale=2.0).astype(np.float32)


def settings(rows: list[Sampling], **changes: Any) -> SlotSampling:
    """Make a slot for each row, without guidance; `changes` replace fields."""
    index = np.arange(len(rows), dtype=np.int32)
    slots: dict[str, Any] = {
        "conditional": index,
        "unconditional": index,
        "logprobs": np.zeros(len(rows), bool),
        "answer": np.zeros_like(index),
        "low": np.zeros_like(index),
        "high": np.full_like(index, VOCAB),
    }
    return slot_sampling(rows, **{**slots, **changes})


def run(logits: np.ndarray, how: SlotSampling, present: Any = None, step: Any = None) -> Sampled:
    rows = len(logits)
    present = np.zeros(logits.shape, bool) if present is None else present
    step = np.zeros(rows, np.int32) if step is None else step
    history = History(present=present, answered=np.zeros(logits.shape, np.int32))  # type: ignore[arg-type]
    return jax.tree.map(np.asarray, compiled_sample(logits, history, step, how))


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (0, 1.0, 0.0), (7, 1.0, 0.0), (1, 1.0, 0.0), (0, 0.6, 0.0), (0, 0.05, 0.0), (0, 1.0, 0.1),
        (0, 1.0, 1.0), (9, 0.8, 0.0), (20, 0.9, 0.05), (5, 1.0, 0.3), (200, 0.99, 0.01),
    ],
)  # fmt: skip
def test_filters_keep_the_tokens_that_transformers_keeps(
    top_k: int, top_p: float, min_p: float
) -> None:
    logits = random_logits(40)
    warpers: list[Any] = [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    text: Any = torch.zeros(40, 1, dtype=torch.long)
    expected: Any = LogitsProcessorList(warpers)(text, torch.tensor(logits))  # type: ignore[arg-type]
    full = [jnp.full(40, x) for x in (top_k, top_p, min_p)]
    np.testing.assert_array_equal(keep(jnp.asarray(logits), *full), expected.numpy())


def test_each_row_has_its_own_settings() -> None:
    logits = jnp.asarray(random_logits(3))
    filtered = keep(
        logits, jnp.array([3, 0, 0]), jnp.array([1.0, 1e-6, 1.0]), jnp.array([0.0, 0.0, 0.0])
    )
    assert np.isfinite(filtered).sum(axis=1).tolist() == [3, 1, VOCAB]


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = random_logits(4)
    text = np.random.default_rng(1).integers(0, VOCAB, (4, 12))
    present = np.zeros((4, VOCAB), bool)
    np.put_along_axis(present, text, True, axis=1)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(text), torch.tensor(logits))  # type: ignore[arg-type]
    actual = penalize(jnp.asarray(logits), jnp.asarray(present), jnp.full(4, penalty))
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-6)


def test_zero_temperature_takes_the_likeliest_token_after_the_penalty() -> None:
    logits = random_logits(4)
    first = run(logits, settings([Sampling(temperature=0)] * 4)).tokens
    np.testing.assert_array_equal(first, logits.argmax(axis=1))
    present = np.zeros(logits.shape, bool)
    present[np.arange(4), first] = True
    how = settings([Sampling(temperature=0, repetition_penalty=1e6)] * 4)
    assert not (run(logits, how, present).tokens == first).any()
    # A slot that samples beside it changes nothing.
    mixed = settings([Sampling(temperature=0)] * 3 + [Sampling(top_k=5)])
    np.testing.assert_array_equal(run(logits, mixed).tokens[:3], first[:3])


def test_frequencies_are_the_probabilities_of_transformers() -> None:
    rows, one = 8192, random_logits(1, seed=5)
    how = {"temperature": 0.7, "top_k": 12, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.4}
    text = np.argsort(-one[0])[:2]
    present = np.zeros((rows, VOCAB), bool)
    present[:, text] = True
    slots = settings([Sampling(**how, seed=i) for i in range(rows)])
    tokens = run(np.repeat(one, rows, axis=0), slots, present).tokens
    processors: list[Any] = [
        RepetitionPenaltyLogitsProcessor(1.4), TemperatureLogitsWarper(0.7), TopKLogitsWarper(12),
        TopPLogitsWarper(0.9), MinPLogitsWarper(0.02),
    ]  # fmt: skip
    scores = LogitsProcessorList(processors)(torch.tensor(text)[None], torch.tensor(one))  # type: ignore[arg-type]
    probabilities = torch.softmax(scores, -1)[0].numpy().astype(np.float64)
    counts = np.bincount(tokens, minlength=VOCAB)
    assert (counts[probabilities == 0] == 0).all()
    likely = probabilities > 0
    expected = rows * probabilities[likely] / probabilities.sum()
    # Chi-square over a dozen tokens: 40 is beyond the 99.9th percentile of 12 degrees of freedom.
    assert 2 < likely.sum() <= 12
    assert ((counts[likely] - expected) ** 2 / expected).sum() < 40


def test_a_seed_gives_the_same_token_at_a_step_and_others_at_the_next() -> None:
    logits = np.repeat(random_logits(1) / 4, 64, axis=0)
    slots = settings([Sampling(seed=3)] * 64)
    same = run(logits, slots, step=np.full(64, 5, np.int32)).tokens
    assert len(set(same)) == 1
    steps = run(logits, slots, step=np.arange(64, dtype=np.int32)).tokens
    assert len(set(steps)) > 10
    assert steps[5] == same[0]
    assert len(set(run(logits, settings([Sampling(seed=i) for i in range(64)])).tokens)) > 10


def test_log_probabilities_are_of_the_unfiltered_distribution() -> None:
    logits = random_logits(3)
    how = settings(
        [Sampling(temperature=0.3, top_k=4)] * 3, logprobs=np.array([True, False, True])
    )
    out = run(logits, how)
    expected = torch.log_softmax(torch.tensor(logits), -1).numpy()
    np.testing.assert_allclose(out.logprobs, expected[np.arange(3), out.tokens], rtol=1e-5)
    order = np.argsort(-logits, axis=1)[:, :MAX_ALTERNATIVES]
    np.testing.assert_array_equal(out.top_tokens, order)
    np.testing.assert_allclose(out.top_logprobs, np.take_along_axis(expected, order, 1), rtol=1e-5)


def test_guidance_mixes_two_rows_and_gives_both_the_same_token() -> None:
    logits = random_logits(4)
    # Slots 1 and 3 are a request; 0 and 2 are not guided.
    conditional, unconditional = np.array([0, 1, 2, 1]), np.array([0, 3, 2, 3])
    for scale in (0.0, 1.0, 2.5):
        how = settings(
            [Sampling(temperature=0, guidance=scale)] * 4,
            conditional=conditional.astype(np.int32), unconditional=unconditional.astype(np.int32),
        )  # fmt: skip
        out = run(logits, how)
        mixed = logits[3] + scale * (logits[1] - logits[3])
        assert out.tokens[1] == out.tokens[3] == mixed.argmax()
        assert out.tokens[0] == logits[0].argmax()
        assert out.tokens[2] == logits[2].argmax()


def test_ids_outside_the_range_do_not_exist() -> None:
    """Check that samples equal those from logits of the range only."""
    logits, low, high = random_logits(64), 11, 29
    rows = [
        Sampling(seed=i, temperature=i % 3, top_k=i % 5 * 4, top_p=1 - i % 2 * 0.2,
                 min_p=i % 4 * 0.02)
        for i in range(64)
    ]  # fmt: skip
    ends = {"low": np.full(64, low, np.int32), "high": np.full(64, high, np.int32)}
    out = run(logits, settings(rows, **ends, logprobs=np.ones(64, bool)))
    assert ((out.tokens >= low) & (out.tokens < high)).all()
    greedy = np.arange(64) % 3 == 0
    np.testing.assert_array_equal(out.tokens[greedy], low + logits[greedy, low:high].argmax(1))
    expected = torch.log_softmax(torch.tensor(logits[:, low:high]), -1).numpy()
    np.testing.assert_allclose(
        out.logprobs, expected[np.arange(64), out.tokens - low], rtol=1e-5, atol=1e-6
    )
    order = np.argsort(-expected, axis=1)
    np.testing.assert_array_equal(out.top_tokens[:, : high - low], low + order)
    for i, row in enumerate(rows):
        filtered = keep(
            jnp.asarray(logits[i : i + 1, low:high]) / max(row.temperature, 1e-5),
            *(jnp.array([x]) for x in (row.top_k, row.top_p, row.min_p)),
        )
        assert np.isfinite(filtered[0, out.tokens[i] - low])


def test_each_slot_has_its_own_range_and_one_id_is_forced() -> None:
    logits = random_logits(4)
    low, high = np.array([0, 7, 40, 3]), np.array([VOCAB, 8, 50, 5])
    how = settings(
        [Sampling(temperature=1.5, seed=i) for i in range(4)],
        low=low.astype(np.int32), high=high.astype(np.int32),
    )  # fmt: skip
    for step in range(20):
        out = run(logits, how, step=np.full(4, step, np.int32))
        assert ((out.tokens >= low) & (out.tokens < high)).all()
        assert (out.tokens[1], out.logprobs[1]) == (7, 0)


@pytest.mark.parametrize(
    ("rows", "sorts"),
    [
        ([Sampling(top_k=VOCAB)], 0),
        ([Sampling(top_k=18), Sampling(top_p=1.0, min_p=0.1)], 0),
        ([Sampling(top_k=5, top_p=0.5, temperature=0)], 0),
        ([Sampling(top_k=17)], 1),
        ([Sampling(), Sampling(top_p=0.9)], 1),
    ],
)
def test_vocabulary_is_sorted_only_where_that_rules_something_out(
    rows: list[Sampling], sorts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check slots with 18 ids allowed, by counting sorts while the step runs."""
    count: list[int] = []

    def counted(*arguments: Any) -> Any:
        jax.debug.callback(lambda: count.append(1))
        return filter_top(*arguments)

    monkeypatch.setattr(sampling, "filter_top", counted)
    bounds = {"low": np.full(len(rows), 11, np.int32), "high": np.full(len(rows), 29, np.int32)}
    logits = random_logits(len(rows))
    present, answered = np.zeros(logits.shape, bool), np.zeros(logits.shape, np.int32)
    history = History(present=present, answered=answered)  # type: ignore[arg-type]
    sampled = jax.jit(lambda *x: sample(*x))(
        logits, history, np.zeros(len(rows), np.int32), settings(rows, **bounds)
    )
    jax.block_until_ready(sampled)
    jax.effects_barrier()
    assert len(count) == sorts


def test_top_p_of_one_keeps_every_id_beside_a_slot_that_sorts() -> None:
    logits = np.full((2, 4096), -30.0, np.float32)
    logits[:, 0] = 0.0
    filtered = filter_top(jnp.asarray(logits), jnp.array([0, 3]), jnp.array([1.0, 1.0]))
    assert np.isfinite(filtered[0]).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0},
        {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 2.0}, {"repetition_penalty": 0.0},
        {"guidance": float("nan")}, {"seed": -1}, {"seed": 2**32},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=name):
        Sampling(**wrong)  # type: ignore[arg-type]
