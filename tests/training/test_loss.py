"""Check the chunked loss against a softmax over all logits, on one device and on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwm.core.mesh import make_mesh
from lwm.training.loss import cross_entropy

BATCH, SEQ, EMBED, VOCAB = 4, 16, 8, 24


def inputs(seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(keys[0], (BATCH, SEQ, EMBED))
    head = jax.random.normal(keys[1], (EMBED, VOCAB))
    targets = jax.random.randint(keys[2], (BATCH, SEQ), 0, VOCAB)
    weights = jnp.maximum(jax.random.uniform(keys[3], (BATCH, SEQ), minval=-0.5), 0.0)
    return hidden, head, targets, weights


def dense(hidden, head, targets, weights):
    """Compute the loss by log_softmax over all logits."""
    scores = jax.nn.log_softmax(hidden @ head)
    nll = -jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    return (nll * weights).sum()


@pytest.mark.parametrize(
    ("mesh", "chunk"),
    [(None, 5), (None, 1000), ("1,1,1,4", 5), ("1,1,4,1", 5), ("1,2,2,1", 5), ("2,1,1,2", 1000)],
)
def test_values_and_gradients_equal_the_dense_loss(mesh, chunk):
    hidden, head, targets, weights = inputs()
    devices = None if mesh is None else make_mesh(mesh)

    def chunked(hidden, head):
        return cross_entropy(hidden, head, targets, weights, chunk=chunk, mesh=devices)["loss"]

    value, (by_hidden, by_head) = jax.jit(jax.value_and_grad(chunked, (0, 1)))(hidden, head)
    expected, (expected_hidden, expected_head) = jax.value_and_grad(dense, (0, 1))(
        hidden, head, targets, weights
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(by_hidden, expected_hidden, atol=1e-5)
    np.testing.assert_allclose(by_head, expected_head, atol=1e-5)


def test_sums_count_only_weighted_targets():
    hidden, head, targets, weights = inputs(1)
    logits = np.asarray(hidden @ head)
    sums = cross_entropy(hidden, head, targets, weights, chunk=7)
    counted = np.asarray(weights) > 0
    right = logits.argmax(-1) == np.asarray(targets)
    scores = jax.nn.log_softmax(logits)
    nll = -np.take_along_axis(np.asarray(scores), np.asarray(targets)[..., None], -1)[..., 0]
    assert sums["targets"] == counted.sum()
    assert sums["correct"] == (right & counted).sum()
    np.testing.assert_allclose(sums["weight"], np.asarray(weights).sum(), rtol=1e-6)
    np.testing.assert_allclose(sums["nll"], nll[counted].sum(), rtol=1e-5)


def test_the_gradient_scales_with_the_cotangent():
    hidden, head, targets, weights = inputs(2)

    def half(hidden):
        return 0.5 * cross_entropy(hidden, head, targets, weights, chunk=9)["loss"]

    whole = jax.grad(lambda h: dense(h, head, targets, weights))(hidden)
    np.testing.assert_allclose(jax.grad(half)(hidden), 0.5 * whole, atol=1e-6)


def test_a_target_without_weight_may_be_anything():
    hidden, head, targets, _ = inputs(3)
    weights = jnp.ones((BATCH, SEQ)).at[:, 3].set(0.0)
    broken = hidden.at[:, 3].set(jnp.nan)
    sums = cross_entropy(hidden, head, targets.at[:, 3].set(VOCAB + 5), weights, chunk=16)
    same = cross_entropy(hidden, head, targets, weights, chunk=16)
    assert sums["loss"] == same["loss"]
    assert jnp.isfinite(cross_entropy(broken, head, targets, weights, chunk=16)["loss"])


def test_bfloat16_stays_near_and_gives_the_head_a_float32_gradient():
    hidden, head, targets, weights = inputs(4)

    def chunked(hidden, head):
        return cross_entropy(hidden, head, targets, weights, chunk=8)["loss"]

    half = hidden.astype(jnp.bfloat16)
    value, (by_hidden, by_head) = jax.value_and_grad(chunked, (0, 1))(half, head)
    np.testing.assert_allclose(value, dense(hidden, head, targets, weights), rtol=2e-2)
    assert by_hidden.dtype == jnp.bfloat16
    assert by_head.dtype == jnp.float32


@settings(max_examples=8)
@given(chunk=st.integers(1, 70))
def test_the_chunk_changes_nothing(chunk):
    hidden, head, targets, weights = inputs(5)
    sums = cross_entropy(hidden, head, targets, weights, chunk=chunk)
    np.testing.assert_allclose(sums["loss"], dense(hidden, head, targets, weights), rtol=1e-5)


def test_no_array_is_as_large_as_all_logits():
    """Check that neither pass makes an array [sequence, vocabulary]."""
    seq, vocab = 4096, 1000
    shapes = (
        jax.ShapeDtypeStruct((1, seq, EMBED), jnp.float32),
        jax.ShapeDtypeStruct((EMBED, vocab), jnp.float32),
    )
    targets, weights = jnp.zeros((1, seq), jnp.int32), jnp.ones((1, seq))

    def chunked(hidden, head):
        return cross_entropy(hidden, head, targets, weights, chunk=64)["loss"]

    text = str(jax.make_jaxpr(jax.value_and_grad(chunked, (0, 1)))(*shapes))
    assert f"{seq},{vocab}" not in text
    assert f"64,{vocab}" in text
