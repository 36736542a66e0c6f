"""Text, pictures and videos in one model: two heads in one table, packed as if alone, on every
mesh."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plans import CONFIG, plan

from lwm.core.mesh import make_mesh
from lwm.data.examples.examples import Example
from lwm.data.rows.packing import PADDING, LossWeights, Packing, Position, pack_rows
from lwm.models.vision_tokens import VisionVocabulary
from lwm.training.batches import Layout
from lwm.training.loss import cross_entropy
from lwm.training.readings import kinds
from lwm.training.step import Batch, by_kind, sums_of

VISION = VisionVocabulary(codes=16, codes_per_frame=4, size=24)
TEXT = 40
WORLD = replace(CONFIG, vocab_size=TEXT, vision=VISION, num_layers=1)
LENGTH = 64


def example(random: np.random.Generator, frames: int) -> Example:
    """Text with a picture, a video or nothing between, learnt in part."""
    words = [random.integers(0, TEXT, random.integers(3, 9)) for _ in range(2)]
    seen = random.integers(0, VISION.codes, (frames, VISION.tokens_per_frame))
    seen[:, -1] = VISION.end_of_frame
    seen[-1:, -1] = VISION.end_of_video
    tokens = np.concatenate([words[0], seen.ravel(), words[1]]).astype(np.int32)
    vision = np.zeros(len(tokens), bool)
    vision[len(words[0]) : len(words[0]) + seen.size] = True
    weights = (random.random(len(tokens)) < 0.7).astype(np.float32)
    weights[: random.integers(1, 4)] = 0
    weights[-1] = 1
    return Example(tokens=tokens, weights=weights, vision=vision)


def rows_of(packing: Packing, count: int, weights: LossWeights = "halves", seed: int = 0) -> Any:
    """The first rows of 12 examples of text, pictures and videos and of fillers after them."""
    random = np.random.default_rng(seed)
    given = [example(random, frames) for frames in (0, 1, 3, 1, 0, 6, 2, 1, 0, 4, 1, 2)]
    drawn = pack_rows(
        lambda number: given[number % len(given)],
        Position(),
        length=LENGTH,
        packing=packing,
        loss_weights=weights,
        text_vocab=TEXT,
    )
    rows = [next(drawn)[0] for _ in range(count)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def dense(hidden, head, targets, weights):
    """Two heads in full, each over its own ids."""
    scores = hidden @ head
    text, vision = (jax.nn.log_softmax(part) for part in jnp.split(scores, [TEXT], axis=-1))
    both = jnp.concatenate([text, vision], axis=-1)
    nll = -jnp.take_along_axis(both, targets[..., None], axis=-1)[..., 0]
    return (nll * weights).sum()


@pytest.mark.parametrize("mesh", [None, "1,1,4,1", "1,2,1,2"])
def test_each_target_is_scored_against_its_own_kind(mesh):
    """As by two heads; on four parts of the table the border lies inside the third."""
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (4, 16, 8))
    head = jax.random.normal(keys[1], (8, 64))
    targets = jax.random.randint(keys[2], (4, 16), 0, 64)
    weights = jnp.maximum(jax.random.uniform(keys[3], (4, 16), minval=-0.5), 0.0)
    laid = None if mesh is None else make_mesh(mesh)

    def ours(hidden, head):
        found = cross_entropy(hidden, head, targets, weights, chunk=5, mesh=laid, text_vocab=TEXT)
        return found.loss, found

    (value, sums), gradients = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(
        hidden, head
    )
    expected, expected_gradients = jax.value_and_grad(dense, (0, 1))(
        hidden, head, targets, weights
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)

    logits, learnt = np.asarray(hidden @ head), np.asarray(weights) > 0
    seen = np.asarray(targets) >= TEXT
    best = np.where(seen, TEXT + logits[..., TEXT:].argmax(-1), logits[..., :TEXT].argmax(-1))
    for kind, figures in by_kind(sums).items():
        own = learnt & (seen if kind == "vision" else ~seen)
        alone = dense(hidden, head, targets, jnp.asarray(own, jnp.float32))
        assert figures.targets == own.sum()
        np.testing.assert_allclose(figures.loss, alone / own.sum(), rtol=1e-5)
        right = (best == np.asarray(targets)) & own
        np.testing.assert_allclose(figures.accuracy, right.sum() / own.sum(), rtol=1e-5)


@cache
def mean_loss() -> tuple[Any, Any]:
    """Weights, and the mean of a batch's loss, its sums and its gradient, compiled."""
    chosen = plan(config=WORLD)

    def mean(weights, batch):
        found = sums_of(
            weights, batch, config=WORLD, compute=chosen.compute, lora=chosen.lora, mesh=None
        )
        return found.loss / found.weight, found

    weights = chosen.first_state(None, seed=0).weights
    return weights, jax.jit(jax.value_and_grad(mean, has_aux=True))


def loss_and_gradient(rows: dict[str, np.ndarray]) -> tuple[Any, Any]:
    weights, compiled = mean_loss()
    return compiled(weights, Batch(**{name: jnp.asarray(x) for name, x in rows.items()}))


def test_packed_with_masks_is_unpacked_and_padded_and_without_masks_it_is_not():
    """Losses and gradients, on examples of text, pictures and videos."""
    padded = rows_of("pad", 12)
    packed = rows_of("pack", 8)
    used = (packed["segments"] >= 0).sum()
    packed = {name: x[:4] for name, x in packed.items()}
    assert used > (packed["segments"] >= 0).sum()
    # The packed rows' own examples, each in a row of its own.
    pieces = {name: [] for name in packed}
    for row in range(4):
        for segment in sorted(set(packed["segments"][row].tolist()) - {PADDING}):
            here = packed["segments"][row] == segment
            for name, values in packed.items():
                alone = np.full(LENGTH, PADDING if name == "segments" else 0, values.dtype)
                alone[: here.sum()] = 0 if name == "segments" else values[row][here]
                pieces[name].append(alone)
    single = {name: np.stack(rows) for name, rows in pieces.items()}
    # They are rows that padding gives, weights and all.
    own = {tuple(row) for row in np.hstack([padded["targets"], padded["weights"]]).tolist()}
    assert {tuple(r) for r in np.hstack([single["targets"], single["weights"]]).tolist()} <= own
    (loss, sums), gradient = loss_and_gradient(packed)
    (expected, _), expected_gradient = loss_and_gradient(single)
    assert sums.vision is not None
    assert 0 < sums.vision.targets < sums.targets
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, expected_gradient
    )
    naive = packed | {
        "segments": np.where(packed["segments"] >= 0, 0, PADDING).astype(np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (4, LENGTH)),
    }
    (other, _), other_gradient = loss_and_gradient(naive)
    assert abs(other - loss) > 1e-4
    assert np.abs(other_gradient.layers.value - gradient.layers.value).max() > 1e-4


def test_halves_are_the_originals_loss_of_rows_that_have_bothkinds():
    """Written out: half the mean over a row's text targets, half that over its vision targets."""
    rows = rows_of("pack", 4, "row_halves")
    (loss, _), _ = loss_and_gradient(rows)
    total = 0.0
    for row in range(4):
        for kind in (rows["targets"][row] < TEXT, rows["targets"][row] >= TEXT):
            learnt = kind & (rows["weights"][row] > 0)
            assert learnt.any()
            one = {name: x[row : row + 1] for name, x in rows.items()}
            (mean, _), _ = loss_and_gradient(one | {"weights": learnt[None].astype(np.float32)})
            total += 0.5 * float(mean) / 4
    np.testing.assert_allclose(loss, total, rtol=1e-5)


def trajectory(mesh: str) -> list[dict[str, float]]:
    chosen = plan(mesh, config=WORLD)
    state, step, found = chosen.first_state(None, seed=0), chosen.step(), []
    for number in range(3):
        rows = rows_of("pack", 4, seed=number)
        state, figures = step(state, None, Layout(chosen.mesh, 4, 1, LENGTH).place(rows))
        figures_of_kinds = kinds({"text": figures.text, "vision": figures.vision})
        norm = float(figures.gradient_norm)
        found.append({"loss": float(figures.loss), "gradient_norm": norm, **figures_of_kinds})
    return found


@pytest.fixture(scope="module")
def alone() -> list[dict[str, float]]:
    return trajectory("1,1,1,1")


@pytest.mark.parametrize("mesh", ["1,1,1,4", "1,1,2,2"])
def test_mixed_rows_learn_alike_round_the_ring(alone, mesh):
    assert alone[0].keys() >= {"text_loss", "vision_loss", "text_accuracy", "vision_targets"}
    for found, expected in zip(trajectory(mesh), alone, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
