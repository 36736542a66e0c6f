"""Moving averages and revival against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwm.core.errors import ConfigError
from lwm.training.vqgan.codebook import (
    CodebookConfig,
    Usage,
    averaged,
    counted,
    perplexity,
    revived,
    unused,
)

DECAY = 0.9


def test_entries_are_the_moving_averages_of_what_chose_them() -> None:
    draw = np.random.default_rng(0)
    start = draw.normal(size=(5, 2)).astype(np.float32)
    codebook, usage = jnp.asarray(start), unused(5, 2)
    counts, sums = np.zeros(5), np.zeros((5, 2))
    for _ in range(4):
        latents = draw.normal(size=(7, 2)).astype(np.float32)
        codes = draw.integers(0, 4, 7)  # nothing chooses the last
        usage, seen = counted(usage, jnp.asarray(latents), jnp.asarray(codes), DECAY)
        codebook = averaged(usage, codebook)
        counts, sums = counts * DECAY, sums * DECAY
        for code, latent in zip(codes, latents, strict=True):
            counts[code] += 1 - DECAY
            sums[code] += (1 - DECAY) * latent
        np.testing.assert_array_equal(seen, np.bincount(codes, minlength=5))
    np.testing.assert_allclose(usage.counts, counts, rtol=1e-5)
    np.testing.assert_allclose(codebook[:4], sums[:4] / counts[:4, None], rtol=1e-4)
    np.testing.assert_array_equal(codebook[4], start[4])


def test_dead_entries_become_latents_and_get_time() -> None:
    counts = np.array([2.0, 0.4, 0.0, 0.5], np.float32)
    codebook = np.arange(8, dtype=np.float32).reshape(4, 2)
    usage = Usage(counts=jnp.asarray(counts), sums=jnp.asarray(codebook * counts[:, None]))
    latents = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    found, after, dead = revived(
        jnp.asarray(codebook), usage, jnp.asarray(latents), jax.random.key(0), 0.5
    )
    assert dead == 2
    np.testing.assert_array_equal(np.asarray(found)[[0, 3]], codebook[[0, 3]])
    for entry in (1, 2):
        assert any(np.array_equal(found[entry], latent) for latent in latents)
    assert after.counts.tolist() == [2.0, 1.0, 1.0, 0.5]
    # The averages stand for the new values: they do not fall back in the next step.
    np.testing.assert_allclose(averaged(after, found), found, rtol=1e-6)
    same, _, none = revived(
        jnp.asarray(codebook), usage, jnp.asarray(latents), jax.random.key(0), 0.0
    )
    assert none == 0
    np.testing.assert_array_equal(same, codebook)


def test_perplexity_counts_entries_that_carry() -> None:
    assert perplexity(jnp.array([3.0, 3.0, 0.0, 3.0])) == pytest.approx(3)
    assert perplexity(jnp.array([5.0, 0.0])) == pytest.approx(1)
    shares = np.array([0.7, 0.2, 0.1])
    wanted = np.exp(-(shares * np.log(shares)).sum())
    assert perplexity(jnp.asarray(shares * 40)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("changes", [{"decay": 1.0}, {"commitment": -1}, {"dead_below": -1}])
def test_wrong_settings_are_refused(changes) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        CodebookConfig(**changes)
