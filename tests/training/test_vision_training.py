"""Check training on text, images and videos: two heads in one table, packed rows, every mesh."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import CONFIG, LENGTH, tiny_training, unpacked

from lwm.core.mesh import make_mesh
from lwm.data.examples.examples import Example
from lwm.data.rows.packing import PADDING, LossWeights, Packing, Position, pack_rows
from lwm.models.vision_tokens import VisionVocabulary
from lwm.training.batches import Batch
from lwm.training.loss import cross_entropy, means_by_kind

VISION = VisionVocabulary(codes=16, codes_per_frame=4, size=24)
TEXT = 40
WORLD = replace(CONFIG, vocab_size=TEXT, vision=VISION, num_layers=1)


def example(random: np.random.Generator, frames: int) -> Example:
    """Make an example of text with an image, a video or nothing inside; part of it has loss."""
    words = [random.integers(0, TEXT, random.integers(3, 9)) for _ in range(2)]
    codes = random.integers(0, VISION.codes, (frames, VISION.tokens_per_frame))
    codes[:, -1] = VISION.end_of_frame
    codes[-1:, -1] = VISION.end_of_video
    tokens = np.concatenate([words[0], codes.ravel(), words[1]]).astype(np.int32)
    vision = np.zeros(len(tokens), bool)
    vision[len(words[0]) : len(words[0]) + codes.size] = True
    weights = (random.random(len(tokens)) < 0.7).astype(np.float32)
    weights[: random.integers(1, 4)] = 0
    weights[-1] = 1
    return Example(tokens=tokens, weights=weights, vision=vision)


def rows_of(packing: Packing, count: int, weights: LossWeights = "halves", seed: int = 0) -> Any:
    """Return the first rows of 12 examples, repeated."""
    random = np.random.default_rng(seed)
    examples = [example(random, frames) for frames in (0, 1, 3, 1, 0, 6, 2, 1, 0, 4, 1, 2)]
    packed = pack_rows(
        lambda number: examples[number % len(examples)],
        Position(),
        length=LENGTH,
        packing=packing,
        loss_weights=weights,
        text_vocab=TEXT,
    )
    rows = [next(packed)[0] for _ in range(count)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def dense(hidden, head, targets, weights):
    """Compute the loss of two heads over all positions, each head over its own ids."""
    scores = hidden @ head
    text, vision = (jax.nn.log_softmax(part) for part in jnp.split(scores, [TEXT], axis=-1))
    both = jnp.concatenate([text, vision], axis=-1)
    nll = -jnp.take_along_axis(both, targets[..., None], axis=-1)[..., 0]
    return (nll * weights).sum()


@pytest.mark.parametrize("mesh", [None, "1,1,4,1", "1,2,1,2"])
def test_each_target_is_scored_against_its_own_kind(mesh):
    """Check against two heads; in four parts, the first vision id lies inside the third."""
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (4, 16, 8))
    head = jax.random.normal(keys[1], (8, 64))
    targets = jax.random.randint(keys[2], (4, 16), 0, 64)
    weights = jnp.maximum(jax.random.uniform(keys[3], (4, 16), minval=-0.5), 0.0)
    devices = None if mesh is None else make_mesh(mesh)

    def chunked(hidden, head):
        sums = cross_entropy(
            hidden, head, targets, weights, chunk=5, mesh=devices, text_vocab=TEXT
        )
        return sums["loss"], sums

    (loss, sums), gradients = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(
        hidden, head
    )
    expected, expected_gradients = jax.value_and_grad(dense, (0, 1))(
        hidden, head, targets, weights
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)

    logits, weighted = np.asarray(hidden @ head), np.asarray(weights) > 0
    vision = np.asarray(targets) >= TEXT
    best = np.where(vision, TEXT + logits[..., TEXT:].argmax(-1), logits[..., :TEXT].argmax(-1))
    means = means_by_kind(sums)
    for kind, of_kind in {"text": weighted & ~vision, "vision": weighted & vision}.items():
        nll = dense(hidden, head, targets, jnp.asarray(of_kind, jnp.float32))
        correct = ((best == np.asarray(targets)) & of_kind).sum()
        assert means[f"{kind}_targets"] == of_kind.sum()
        np.testing.assert_allclose(means[f"{kind}_loss"], nll / of_kind.sum(), rtol=1e-5)
        np.testing.assert_allclose(means[f"{kind}_accuracy"], correct / of_kind.sum(), rtol=1e-5)


@cache
def compiled_mean_loss() -> tuple[Any, Any]:
    training = tiny_training(config=WORLD)

    def mean(weights, batch):
        sums = training.loss_sums(weights, batch)
        return sums["loss"] / sums["weight"], sums

    return training.first_state().weights, jax.jit(jax.value_and_grad(mean, has_aux=True))


def loss_and_gradient(rows: dict[str, np.ndarray]) -> tuple[Any, Any]:
    """Return ((mean loss, sums), gradient)."""
    weights, compiled = compiled_mean_loss()
    return compiled(weights, Batch(**{name: jnp.asarray(x) for name, x in rows.items()}))


def test_packed_rows_with_masks_train_as_unpacked_ones():
    """Check losses and gradients, and that without masks they differ."""
    padded = rows_of("pad", 12)
    packed = rows_of("pack", 8)
    used = (packed["segments"] >= 0).sum()
    packed = {name: x[:4] for name, x in packed.items()}
    assert used > (packed["segments"] >= 0).sum()
    single = unpacked(packed)
    # These are rows that padding makes as well, with the same weights.
    rows = {tuple(row) for row in np.hstack([padded["targets"], padded["weights"]]).tolist()}
    assert {tuple(r) for r in np.hstack([single["targets"], single["weights"]]).tolist()} <= rows
    (loss, sums), gradient = loss_and_gradient(packed)
    (expected, _), expected_gradient = loss_and_gradient(single)
    assert 0 < sums["vision_targets"] < sums["targets"]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, expected_gradient
    )
    unmasked = packed | {
        "segments": np.where(packed["segments"] >= 0, 0, PADDING).astype(np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (4, LENGTH)),
    }
    (other, _), other_gradient = loss_and_gradient(unmasked)
    assert abs(other - loss) > 1e-4
    assert np.abs(other_gradient.layers.value - gradient.layers.value).max() > 1e-4


def test_row_halves_are_the_originals_loss():
    """Check against half the mean over a row's text targets plus half over its vision targets."""
    rows = rows_of("pack", 4, "row_halves")
    (loss, _), _ = loss_and_gradient(rows)
    total = 0.0
    for row in range(4):
        for kind in (rows["targets"][row] < TEXT, rows["targets"][row] >= TEXT):
            weighted = kind & (rows["weights"][row] > 0)
            assert weighted.any()
            one = {name: x[row : row + 1] for name, x in rows.items()}
            (mean, _), _ = loss_and_gradient(one | {"weights": weighted[None].astype(np.float32)})
            total += 0.5 * float(mean) / 4
    np.testing.assert_allclose(loss, total, rtol=1e-5)


def metrics_of_steps(mesh: str) -> list[dict[str, float]]:
    training = tiny_training(mesh, rows=4, config=WORLD)
    state, step, values = training.first_state(), training.compiled_step(), []
    for number in range(3):
        state, metrics = step(state, None, training.place(rows_of("pack", 4, seed=number)))
        values.append({name: float(x) for name, x in metrics.items()})
    return values


@pytest.fixture(scope="module")
def one_device() -> list[dict[str, float]]:
    return metrics_of_steps("1,1,1,1")


@pytest.mark.parametrize("mesh", ["1,1,1,4", "1,1,2,2"])
def test_mixed_rows_train_alike_on_a_ring(one_device, mesh):
    assert one_device[0].keys() >= {"text_loss", "vision_loss", "text_accuracy", "vision_targets"}
    for values, expected in zip(metrics_of_steps(mesh), one_device, strict=True):
        assert values == pytest.approx(expected, rel=1e-4)
