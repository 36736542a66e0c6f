"""One step: the same on every mesh and every cut of the batch, against optax and jax by hand, and
harmless where a number is not finite."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from plans import CONFIG, LENGTH, layout, packed_rows, plan, tied, trajectory

from lwm.attention.api import AttentionConfig, attention
from lwm.attention.mask import Side
from lwm.core.errors import ConfigError
from lwm.core.mesh import make_mesh
from lwm.core.sharding import TRAINING
from lwm.models.forward import hidden_states, text_logits
from lwm.models.lora import LoraConfig
from lwm.training.batches import Layout
from lwm.training.optimizer import OptimizerConfig
from lwm.training.step import Batch, ComputeConfig


@pytest.fixture(scope="module")
def alone() -> np.ndarray:
    return trajectory(plan())


@pytest.mark.parametrize(
    ("mesh", "micro"),
    [
        ("1,1,1,1", 4),
        ("1,1,1,4", 1),
        ("1,4,1,1", 1),
        ("1,1,4,1", 1),
        ("1,2,1,2", 1),
    ],
)
def test_every_mesh_and_cut_learns_alike(alone, mesh, micro):
    np.testing.assert_allclose(trajectory(plan(mesh), micro=micro), alone, rtol=1e-4)


def test_tied_heads_and_grouped_keys_learn_alike_on_a_mesh():
    one = trajectory(plan(config=tied()), steps=3)
    np.testing.assert_allclose(trajectory(plan("1,2,2,1", config=tied()), steps=3), one, rtol=1e-4)


@pytest.mark.parametrize("strategy", ["all_gather"])
def test_other_strategies_learn_alike(alone, strategy):
    compute = ComputeConfig(attention=AttentionConfig(strategy=strategy))
    found = trajectory(plan("1,1,1,4", compute=compute), steps=3)
    np.testing.assert_allclose(found, alone[:3], rtol=1e-4)


@pytest.mark.parametrize("remat", ["full"])
def test_what_is_computed_again_changes_nothing(alone, remat):
    found = trajectory(plan(compute=ComputeConfig(remat=remat)), steps=3)
    np.testing.assert_allclose(found, alone[:3], rtol=1e-5)


def dense_loss(weights, rows):
    """Mean loss by the reference attention and softmax over all logits."""
    side = Side(positions=rows["positions"], segments=rows["segments"])
    reference = AttentionConfig(implementation="reference")

    def attend(q, k, v, cache):
        return attention(q, k, v, side, side, config=reference), cache

    hidden = hidden_states(
        weights, rows["tokens"], rows["positions"], CONFIG, attend, rules=TRAINING
    )
    scores = jax.nn.log_softmax(text_logits(weights, hidden))
    nll = -jnp.take_along_axis(scores, rows["targets"][..., None], axis=-1)[..., 0]
    return (nll * rows["weights"]).sum() / rows["weights"].sum()


def test_a_step_is_what_optax_makes_of_the_dense_gradient():
    """Written out by hand: dense loss, clipping, AdamW with the first rate of the warm-up."""
    chosen = plan(optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=4, weight_decay=0.3))
    state = chosen.first_state(None, seed=3)
    rows = {name: jnp.asarray(x) for name, x in packed_rows(9).items()}
    before = jax.tree.map(jnp.copy, state.weights)
    after, figures = chosen.step()(state, None, layout(chosen).place(packed_rows(9)))

    loss, gradient = jax.jit(jax.value_and_grad(dense_loss))(before, rows)
    norm = jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(gradient)))
    gradient = jax.tree.map(lambda x: x * jnp.minimum(1.0, 1.0 / norm), gradient)
    by_hand = optax.adamw(1e-2 / 4, b1=0.9, b2=0.95, weight_decay=0.0)
    change, _ = by_hand.update(gradient, by_hand.init(before), before)
    expected: Any = optax.apply_updates(before, change)
    np.testing.assert_allclose(figures.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(figures.gradient_norm, norm, rtol=1e-4)
    # Norms and embeddings do not decay, kernels do.
    np.testing.assert_allclose(after.weights.norm, expected.norm, atol=1e-5)
    np.testing.assert_allclose(after.weights.embedding, expected.embedding, atol=2e-5)
    decayed = expected.layers.gate - 1e-2 / 4 * 0.3 * before.layers.gate
    np.testing.assert_allclose(after.weights.layers.gate, decayed, atol=2e-5)


def test_all_weights_decay_if_asked():
    rows = packed_rows(1)
    rows["weights"] = np.zeros_like(rows["weights"])  # no gradient: what changes is decay
    chosen = plan(optimizer=OptimizerConfig(learning_rate=0.5, decay="all", weight_decay=0.5))
    state = chosen.first_state(None, seed=0)
    before = jax.tree.map(np.asarray, state.weights)
    after, figures = chosen.step()(state, None, layout(chosen).place(rows))
    np.testing.assert_allclose(after.weights.norm, before.norm * 0.75, rtol=1e-6)
    np.testing.assert_allclose(after.weights.embedding, before.embedding * 0.75, rtol=1e-6)
    assert figures.loss == 0
    assert figures.skipped == 0


def test_a_step_that_is_not_finite_leaves_everything_as_it_was():
    chosen = plan()
    step, laid = chosen.step(), layout(chosen)
    state, _ = step(chosen.first_state(None, seed=0), None, laid.place(packed_rows(0)))
    before = jax.tree.map(np.array, state)
    rows = packed_rows(1)
    rows["weights"][2, 5] = np.inf
    state, figures = step(state, None, laid.place(rows))
    assert figures.skipped == 1
    jax.tree.map(np.testing.assert_array_equal, state.weights, before.weights)
    jax.tree.map(np.testing.assert_array_equal, state.optimizer, before.optimizer)
    assert state.step == 2
    _, figures = step(state, None, laid.place(packed_rows(1)))
    assert figures.skipped == 0


def test_bfloat16_products_keep_float32_weights_and_stay_near(alone):
    chosen = plan(compute=ComputeConfig(dtype="bfloat16"))
    found = trajectory(chosen, steps=3)
    np.testing.assert_allclose(found[:, 0], alone[:3, 0], rtol=2e-2)
    assert {x.dtype for x in jax.tree.leaves(chosen.first_state(None, seed=0).weights)} == {
        jnp.dtype("float32")
    }


def test_packed_rows_weigh_as_the_same_examples_alone():
    """Segments of packed rows against each example in a padded row of its own."""
    chosen = plan()
    packed = packed_rows(4)
    alone = {name: [] for name in packed}
    for row in range(len(packed["tokens"])):
        for segment in range(3):
            here = packed["segments"][row] == segment
            if not here.any():
                continue
            for name, values in packed.items():
                values = values[row][here]
                padded = np.full(LENGTH, -1 if name == "segments" else 0, values.dtype)
                padded[: len(values)] = 0 if name == "segments" else values
                alone[name].append(padded)
    padded = {name: np.stack(rows) for name, rows in alone.items()}
    evaluate = chosen.evaluate()
    state = chosen.first_state(None, seed=0)
    whole = evaluate(state, None, layout(chosen).place(packed))
    single = evaluate(
        state, None, Layout(chosen.mesh, len(padded["tokens"]), 1, LENGTH).place(padded)
    )
    np.testing.assert_allclose(whole.loss / whole.weight, single.loss / single.weight, rtol=1e-5)
    assert whole.targets == single.targets


def test_adapters_start_at_nothing_and_learn_alone():
    whole = plan()
    frozen = whole.first_state(None, seed=0).weights
    chosen = plan("1,2,2,1", lora=LoraConfig(rank=4))
    state = chosen.first_state(None, seed=1)
    laid = layout(chosen)
    kept = jax.tree.map(np.array, frozen)
    placed = jax.device_put(frozen, plan("1,2,2,1").shardings.weights)
    step, losses = chosen.step(), []
    for _ in range(5):
        state, figures = step(state, placed, laid.place(packed_rows(0)))
        losses.append(float(figures.loss))
    first = whole.evaluate()(
        whole.first_state(None, seed=0), None, layout(whole).place(packed_rows(0))
    )
    np.testing.assert_allclose(losses[0], first.loss / first.weight, rtol=1e-5)
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, kept, placed)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.weights))


@pytest.mark.parametrize(
    ("mesh", "batch", "micro", "length", "numbers"),
    [
        ("1,4,1,1", 6, 1, 64, ("6", "4")),
        ("1,1,1,1", 6, 4, 64, ("6", "4")),
        ("1,1,1,4", 4, 1, 60, ("60", "8")),
    ],
)
def test_a_batch_that_the_mesh_does_not_divide_is_refused(mesh, batch, micro, length, numbers):
    with pytest.raises(ConfigError) as refusal:
        Layout(make_mesh(mesh), batch, micro, length)
    assert all(number in str(refusal.value) for number in numbers)


def test_no_square_and_no_logits_at_length():
    """Traced with shapes alone: nothing of sequence squared, nothing of sequence times
    vocabulary."""
    length, vocab = 1 << 16, 6151
    config = replace(CONFIG, max_sequence_length=length, vocab_size=vocab)
    chosen = plan("1,1,1,4", config=config)
    laid = Layout(chosen.mesh, 1, 1, length)
    shaped = partial(jax.ShapeDtypeStruct, laid.shape, sharding=laid.sharding)
    integers = dict.fromkeys(("tokens", "targets", "positions", "segments"), shaped(jnp.int32))
    batch = Batch(**integers, weights=shaped(jnp.float32))  # type: ignore[arg-type]
    largest: dict[tuple[int, ...], int] = {}

    def walk(jaxpr) -> None:
        for equation in jaxpr.eqns:
            for variable in equation.outvars:
                largest[variable.aval.shape] = int(np.prod(variable.aval.shape))
            for value in equation.params.values():
                for part in value if isinstance(value, tuple | list) else (value,):
                    if hasattr(part, "eqns"):
                        walk(part)
                    elif hasattr(part, "jaxpr"):
                        walk(part.jaxpr)

    walk(jax.make_jaxpr(chosen.step())(chosen.template(), None, batch).jaxpr)
    assert len(largest) > 60  # the walk went inside the loops
    # The widest of all is the four shards' queries and what a layer keeps of them.
    assert max(largest.values()) <= 4 * length * config.intermediate_size
    assert not [
        shape for shape in largest if vocab in shape and int(np.prod(shape)) >= length * 64
    ]
