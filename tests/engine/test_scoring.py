"""Check logits and likelihoods on every mesh against one device's dense forward pass."""

from dataclasses import replace
from functools import partial
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from tiny_model import CONFIG, full_logits, fused, log_softmax, prompt, weights

from lwm.core.errors import CapacityError, ConfigError, InputError
from lwm.core.mesh import make_mesh
from lwm.core.params import abstract
from lwm.engine import scoring
from lwm.engine.scoring import Scorer, TokenRows, forward_scores, padded_length
from lwm.generation.model import Model
from lwm.generation.text_generation import Timings
from lwm.models.llama import llama_params
from lwm.models.vision_tokens import VisionVocabulary

ROWS = np.array([prompt(37, seed=n) for n in range(3)], np.int32)


@pytest.mark.parametrize("mesh", [None, "1,1,1,4", "1,2,2,1", "1,1,2,2"])
def test_logits_equal_a_dense_forward_pass(mesh: str | None) -> None:
    laid = None if mesh is None else make_mesh(mesh)
    scorer = Scorer(fused() if mesh is None else weights(mesh), CONFIG, laid)
    expected = np.stack([full_logits(row) for row in ROWS])
    np.testing.assert_allclose(scorer.logits(ROWS), expected, atol=1e-4)


@pytest.mark.parametrize("mesh", [None, "1,1,1,4", "1,2,2,1", "1,1,2,2"])
def test_log_likelihoods_equal_a_dense_forward_pass(
    mesh: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check chunks of 5 positions, the last of them not full, and rows of several lengths."""
    monkeypatch.setattr(scoring, "_CHUNK", 15)
    laid = None if mesh is None else make_mesh(mesh)
    scorer = Scorer(fused() if mesh is None else weights(mesh), CONFIG, laid)
    lengths = [37, 2, 20]
    rows = ROWS.copy()
    logits = [full_logits(row[:length]) for row, length in zip(rows, lengths, strict=True)]
    for row, scores in zip(rows, logits, strict=True):
        row[1] = scores[0].argmax()  # some target is the likeliest
    logits = [full_logits(row[:length]) for row, length in zip(rows, lengths, strict=True)]
    likelihood, likeliest, top_tokens, top_values = scorer.log_likelihoods(rows, lengths, top=3)
    assert scorer.log_likelihoods(rows, lengths).top_tokens.shape == (3, 36, 0)
    assert likelihood.shape == likeliest.shape == (3, 36)
    for row, length, scores, values, hits, ids, top in zip(
        rows, lengths, logits, likelihood, likeliest, top_tokens, top_values, strict=True
    ):
        best = np.sort(log_softmax(scores[:-1]), axis=-1)[:, :-4:-1]
        np.testing.assert_allclose(top[: length - 1], best, atol=1e-4)
        chosen = np.take_along_axis(log_softmax(scores[:-1]), ids[: length - 1], axis=-1)
        np.testing.assert_allclose(chosen, best, atol=1e-4)
        targets = row[1:length]
        expected = log_softmax(scores[:-1])[range(length - 1), targets]
        np.testing.assert_allclose(values[: length - 1], expected, atol=1e-4)
        np.testing.assert_array_equal(hits[: length - 1], scores[:-1].argmax(-1) == targets)
        assert hits[0]


def test_a_target_is_scored_among_ids_of_its_kind() -> None:
    config = replace(CONFIG, vocab_size=40, vision=VisionVocabulary(size=24, codes=20))
    row = np.array([3, 7, 41, 60, 5], np.int32)  # two ids of vision
    logits = full_logits(row)
    expected = [
        log_softmax(scores[kind])[target - kind.start]
        for scores, target in zip(logits, row[1:], strict=False)
        for kind in [slice(40, 64) if target >= 40 else slice(0, 40)]
    ]
    likelihood = Scorer(fused(), config, None).log_likelihoods(row[None]).log_likelihood
    np.testing.assert_allclose(likelihood[0], expected, atol=1e-4)


def test_logits_exist_one_chunk_at_a_time() -> None:
    wide = replace(CONFIG, vocab_size=32000, tie_embeddings=True)
    specs = abstract(llama_params(wide, stacked=False), jnp.float32)
    row = jnp.zeros((1, 4096), jnp.int32)
    score = jax.jit(partial(forward_scores, config=wide)).lower(
        specs, TokenRows(row, row, row), row
    )
    memory: Any = score.compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4096 * 32000 * 4 / 2


@given(st.integers(1, 1_000_000))
def test_padding_costs_at_most_a_quarter(length: int) -> None:
    padded = padded_length(length)
    assert length <= padded <= max(length * 5 / 4, length + 15)
    assert padded_length(padded) == padded


def test_few_lengths_are_compiled() -> None:
    assert len({padded_length(length) for length in range(1, 100_001)}) < 64


def model() -> Model:
    return Model(
        source="tiny",
        config=CONFIG,
        weights=fused(),
        open_tokenizer=lambda: None,
        dtype="float32",
        mesh=None,
    )


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2, 3], r"shape \[3\]"),
        ([[]], r"shape \[1, 0\]"),
        ([[1.5, 2.0]], "float64"),
        ([[1, 64]], "1 to 64"),
        ([[-1, 3]], "-1 to 3"),
    ],
)
def test_tokens_that_are_not_a_rectangle_of_ids_are_refused(tokens: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model().logits(tokens)


def test_requests_beyond_the_model_are_refused() -> None:
    with pytest.raises(InputError, match="vision_mask"):
        model().logits([[1]], vision_mask=[[True]])
    with pytest.raises(ConfigError, match=r"tiny has no tokenizer.*--tokenizer"):
        model().generate("Once")
    with pytest.raises(InputError, match="empty"):
        model().generate("  ")
    with pytest.raises(CapacityError, match=r"5,000 tokens.*4,096"):
        model().logits(np.zeros((1, 5000), np.int32))


def test_logits_have_one_row_per_position_and_no_vision() -> None:
    logits = model().logits(ROWS.tolist())
    assert logits.vision is None
    assert logits.text.shape == (3, 37, 64)
    assert logits.text.dtype == np.float32
    np.testing.assert_allclose(logits.text[1], full_logits(ROWS[1]), atol=1e-4)


def test_timings_exclude_reused_tokens() -> None:
    timings = Timings(prompt=3000, reused=1000, prefill_seconds=4.0, answer=11, answer_seconds=0.5)
    text = str(timings)
    assert "3,000" in text
    assert "1,000 of them reused" in text
    assert "500 tokens/s" in text  # 2,000 computed in 4 s
    assert "20.0 tokens/s" in text  # ten after the first
