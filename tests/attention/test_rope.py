"""Check rotary embedding against transformers' own, and against the properties of rotations."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from lwm.attention.rope import apply_rotary, rotary_angles


def normal(batch: int, length: int, heads: int, dim: int) -> np.ndarray:
    shape = (batch, length, heads, dim)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def halves(x: np.ndarray) -> np.ndarray:
    """Reorder interleaved pairs as transformers does: dimension i pairs with i + dim / 2."""
    return np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


@pytest.mark.parametrize(("dim", "theta"), [(8, 10000.0), (64, 5e7)])
def test_rotation_equals_that_of_transformers(dim: int, theta: float) -> None:
    positions = np.array([[0, 1, 2, 3, 97], [1000, 7, 7, 500, 4]], np.int32)
    query, key = normal(2, 5, 4, dim), normal(2, 5, 2, dim)
    config = LlamaConfig(
        hidden_size=4 * dim,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    cosine, sine = LlamaRotaryEmbedding(config)(
        torch.zeros(2, 5, 4 * dim), torch.tensor(positions)
    )
    theirs = [torch.tensor(halves(x)).transpose(1, 2) for x in (query, key)]
    expected = apply_rotary_pos_emb(theirs[0], theirs[1], cosine, sine)
    angles = rotary_angles(jnp.asarray(positions), dim, theta)
    for x, rotated in zip((query, key), expected, strict=True):
        actual = halves(np.asarray(apply_rotary(jnp.asarray(x), angles)))
        # Angles up to 1,000 radians are exact to half of float32's spacing there, 3e-5.
        np.testing.assert_allclose(actual, rotated.transpose(1, 2).numpy(), atol=3e-4)


def test_scores_depend_only_on_distance_and_norms_are_unchanged() -> None:
    query, key = (jnp.asarray(np.repeat(normal(1, 1, 1, 16), 3, axis=1) + n) for n in (0, 1))
    query_angles = rotary_angles(jnp.array([[5, 12, 40]]), 16, 10000.0)
    key_angles = rotary_angles(jnp.array([[2, 9, 37]]), 16, 10000.0)
    rotated = apply_rotary(query, query_angles)
    scores = np.asarray((rotated * apply_rotary(key, key_angles)).sum(-1))[0, :, 0]
    np.testing.assert_allclose(scores, scores[0], rtol=1e-5)
    np.testing.assert_allclose(
        jnp.linalg.norm(rotated, axis=-1), jnp.linalg.norm(query, axis=-1), rtol=1e-6
    )


def test_position_zero_changes_nothing_and_the_type_is_preserved() -> None:
    x = jnp.asarray(normal(1, 1, 2, 8), jnp.bfloat16)
    rotated = apply_rotary(x, rotary_angles(jnp.array([[0]]), 8, 10000.0))
    assert rotated.dtype == jnp.bfloat16
    assert (rotated == x).all()


def test_angles_of_long_positions_are_accurate() -> None:
    """Check a million tokens at the theta of the longest models against float64."""
    positions, theta = np.array([[999_999, 524_288]], np.int32), 5e7
    angles = rotary_angles(jnp.asarray(positions), 128, theta)
    frequencies = theta ** (-np.arange(0, 128, 2) / 128)
    exact = positions[..., None] * frequencies
    # The spacing of float32 is 1/16 at a million; slow pairs, which distinguish far from near, are
    # much more accurate.
    assert np.abs(np.asarray(angles.cosine) - np.cos(exact)).max() < 0.2
    slow = frequencies < 1e-3
    assert np.abs(np.asarray(angles.sine) - np.sin(exact))[..., slow].max() < 1e-3
