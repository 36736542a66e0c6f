"""Rotary embedding against transformers' own, up to the order of the dimensions, and against what
rotations must do."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from lwm.attention.rope import rotate, rotation


def draw(batch: int, length: int, heads: int, dim: int) -> np.ndarray:
    shape = (batch, length, heads, dim)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def halves(x: np.ndarray) -> np.ndarray:
    """Interleaved pairs -> transformers' order, where dimension i turns with i + dim / 2."""
    return np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


@pytest.mark.parametrize(("dim", "theta"), [(8, 10000.0), (64, 5e7)])
def test_rotation_is_that_of_transformers(dim: int, theta: float) -> None:
    positions = np.array([[0, 1, 2, 3, 97], [1000, 7, 7, 500, 4]], np.int32)
    query, key = draw(2, 5, 4, dim), draw(2, 5, 2, dim)
    config = LlamaConfig(
        hidden_size=4 * dim,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    angles = LlamaRotaryEmbedding(config)(torch.zeros(2, 5, 4 * dim), torch.tensor(positions))
    theirs = [torch.tensor(halves(x)).transpose(1, 2) for x in (query, key)]
    expected = apply_rotary_pos_emb(theirs[0], theirs[1], angles[0], angles[1])
    turn = rotation(jnp.asarray(positions), dim, theta)
    for x, wanted in zip((query, key), expected, strict=True):
        actual = halves(np.asarray(rotate(jnp.asarray(x), turn)))
        # Angles up to 1,000 radians are good to half of float32's spacing there, 3e-5.
        np.testing.assert_allclose(actual, wanted.transpose(1, 2).numpy(), atol=3e-4)


def test_scores_depend_on_distance_alone_and_lengths_stay() -> None:
    query, key = (jnp.asarray(np.repeat(draw(1, 1, 1, 16), 3, axis=1) + n) for n in (0, 1))
    here = rotation(jnp.array([[5, 12, 40]]), 16, 10000.0)
    there = rotation(jnp.array([[2, 9, 37]]), 16, 10000.0)
    turned_query, turned_key = rotate(query, here), rotate(key, there)
    scores = np.asarray((turned_query * turned_key).sum(-1))[0, :, 0]
    np.testing.assert_allclose(scores, scores[0], rtol=1e-5)
    np.testing.assert_allclose(
        jnp.linalg.norm(turned_query, axis=-1), jnp.linalg.norm(query, axis=-1), rtol=1e-6
    )


def test_position_zero_is_left_alone_and_the_type_kept() -> None:
    x = jnp.asarray(draw(1, 1, 2, 8), jnp.bfloat16)
    turned = rotate(x, rotation(jnp.array([[0]]), 8, 10000.0))
    assert turned.dtype == jnp.bfloat16
    assert (turned == x).all()


def test_long_positions_keep_their_angles() -> None:
    """A million tokens at the theta of the longest models, against float64."""
    positions, theta = np.array([[999_999, 524_288]], np.int32), 5e7
    turn = rotation(jnp.asarray(positions), 128, theta)
    frequencies = theta ** (-np.arange(0, 128, 2) / 128)
    angles = positions[..., None] * frequencies
    # The angle's float32 spacing is 1/16 at a million; slow pairs, which tell far from near, are
    # exact to far less.
    assert np.abs(np.asarray(turn.cosine) - np.cos(angles)).max() < 0.2
    slow = frequencies < 1e-3
    assert np.abs(np.asarray(turn.sine) - np.sin(angles))[..., slow].max() < 1e-3
