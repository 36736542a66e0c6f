"""Check moving averages and revival of a codebook against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwm.core.errors import ConfigError
from lwm.training.vqgan import (
    CodebookConfig,
    Usage,
    average_entries,
    codebook_perplexity,
    revive_entries,
    update_usage,
)

DECAY = 0.9


def test_entries_are_moving_averages_of_the_latents_that_choose_them() -> None:
    random = np.random.default_rng(0)
    start = random.normal(size=(5, 2)).astype(np.float32)
    codebook, usage = jnp.asarray(start), Usage(counts=jnp.zeros(5), sums=jnp.zeros((5, 2)))
    counts, sums = np.zeros(5), np.zeros((5, 2))
    for _ in range(4):
        latents = random.normal(size=(7, 2)).astype(np.float32)
        codes = random.integers(0, 4, 7)  # nothing chooses the last
        usage, chosen = update_usage(usage, jnp.asarray(latents), jnp.asarray(codes), DECAY)
        codebook = average_entries(usage, codebook)
        counts, sums = counts * DECAY, sums * DECAY
        for code, latent in zip(codes, latents, strict=True):
            counts[code] += 1 - DECAY
            sums[code] += (1 - DECAY) * latent
        np.testing.assert_array_equal(chosen, np.bincount(codes, minlength=5))
    np.testing.assert_allclose(usage.counts, counts, rtol=1e-5)
    np.testing.assert_allclose(codebook[:4], sums[:4] / counts[:4, None], rtol=1e-4)
    np.testing.assert_array_equal(codebook[4], start[4])


def test_dead_entries_take_the_values_of_latents() -> None:
    counts = np.array([2.0, 0.4, 0.0, 0.5], np.float32)
    codebook = np.arange(8, dtype=np.float32).reshape(4, 2)
    usage = Usage(counts=jnp.asarray(counts), sums=jnp.asarray(codebook * counts[:, None]))
    latents = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    revived, after, dead = revive_entries(
        jnp.asarray(codebook), usage, jnp.asarray(latents), jax.random.key(0), 0.5
    )
    assert dead == 2
    np.testing.assert_array_equal(np.asarray(revived)[[0, 3]], codebook[[0, 3]])
    for entry in (1, 2):
        assert any(np.array_equal(revived[entry], latent) for latent in latents)
    assert after.counts.tolist() == [2.0, 1.0, 1.0, 0.5]
    # The averages stand for the new values: they do not fall back in the next step.
    np.testing.assert_allclose(average_entries(after, revived), revived, rtol=1e-6)
    same, _, none = revive_entries(
        jnp.asarray(codebook), usage, jnp.asarray(latents), jax.random.key(0), 0.0
    )
    assert none == 0
    np.testing.assert_array_equal(same, codebook)


def test_perplexity_is_the_effective_number_of_entries() -> None:
    assert codebook_perplexity(jnp.array([3.0, 3.0, 0.0, 3.0])) == pytest.approx(3)
    assert codebook_perplexity(jnp.array([5.0, 0.0])) == pytest.approx(1)
    shares = np.array([0.7, 0.2, 0.1])
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert codebook_perplexity(jnp.asarray(shares * 40)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("changes", [{"decay": 1.0}, {"commitment": -1}, {"dead_below": -1}])
def test_wrong_settings_are_refused(changes) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        CodebookConfig(**changes)
