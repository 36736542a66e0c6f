"""Check that a step is the same on every mesh and for every cut of the batch, that it agrees with
optax and jax by hand, and that a number that is not finite changes nothing."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_training import (
    CONFIG,
    TIED,
    abstract_batch,
    packed_rows,
    tiny_training,
    trajectory,
    unpacked,
)

from lwm.attention.api import AttentionConfig, attention
from lwm.attention.mask import Side
from lwm.core.errors import ConfigError
from lwm.core.mesh import make_mesh
from lwm.core.sharding import TRAINING
from lwm.models.forward import hidden_states, text_logits
from lwm.models.lora import LoraConfig
from lwm.training.batches import BatchLayout, causal_pairs
from lwm.training.optimizer import OptimizerConfig
from lwm.training.text import ComputeConfig


@pytest.fixture(scope="module")
def one_device() -> np.ndarray:
    return trajectory(tiny_training())


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
def test_every_mesh_and_cut_trains_alike(one_device, mesh, micro):
    values = trajectory(tiny_training(mesh, micro=micro))
    np.testing.assert_allclose(values, one_device, rtol=1e-4)


def test_tied_heads_and_grouped_keys_train_alike_on_a_mesh():
    expected = trajectory(tiny_training(config=TIED), steps=3)
    values = trajectory(tiny_training("1,2,2,1", config=TIED), steps=3)
    np.testing.assert_allclose(values, expected, rtol=1e-4)


def test_gathered_keys_train_alike(one_device):
    compute = ComputeConfig(attention=AttentionConfig(strategy="all_gather"))
    values = trajectory(tiny_training("1,1,1,4", compute=compute), steps=3)
    np.testing.assert_allclose(values, one_device[:3], rtol=1e-4)


def test_recomputation_changes_nothing(one_device):
    values = trajectory(tiny_training(compute=ComputeConfig(remat="full")), steps=3)
    np.testing.assert_allclose(values, one_device[:3], rtol=1e-5)


def dense_loss(weights, rows):
    """Compute the mean loss by reference attention and softmax over all logits."""
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


def test_a_step_equals_optax_on_the_dense_gradient():
    """Check against dense loss, clipping, and AdamW with the first rate of the warm-up."""
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=4, weight_decay=0.3)
    training = tiny_training(optimizer=optimizer, seed=3)
    state = training.first_state()
    rows = {name: jnp.asarray(x) for name, x in packed_rows(9).items()}
    before = jax.tree.map(jnp.copy, state.weights)
    after, metrics = training.compiled_step()(state, None, training.place(packed_rows(9)))

    loss, gradient = jax.jit(jax.value_and_grad(dense_loss))(before, rows)
    norm = jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(gradient)))
    gradient = jax.tree.map(lambda x: x * jnp.minimum(1.0, 1.0 / norm), gradient)
    by_hand = optax.adamw(1e-2 / 4, b1=0.9, b2=0.95, weight_decay=0.0)
    change, _ = by_hand.update(gradient, by_hand.init(before), before)
    expected: Any = optax.apply_updates(before, change)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-4)
    # Norms and embeddings do not decay, kernels do.
    np.testing.assert_allclose(after.weights.norm, expected.norm, atol=1e-5)
    np.testing.assert_allclose(after.weights.embedding, expected.embedding, atol=2e-5)
    decayed = expected.layers.gate - 1e-2 / 4 * 0.3 * before.layers.gate
    np.testing.assert_allclose(after.weights.layers.gate, decayed, atol=2e-5)


def test_all_weights_decay_if_set():
    rows = packed_rows(1)
    rows["weights"] = np.zeros_like(rows["weights"])  # no gradient: only decay changes weights
    optimizer = OptimizerConfig(learning_rate=0.5, decay="all", weight_decay=0.5)
    training = tiny_training(optimizer=optimizer)
    state = training.first_state()
    before = jax.tree.map(np.asarray, state.weights)
    after, metrics = training.compiled_step()(state, None, training.place(rows))
    np.testing.assert_allclose(after.weights.norm, before.norm * 0.75, rtol=1e-6)
    np.testing.assert_allclose(after.weights.embedding, before.embedding * 0.75, rtol=1e-6)
    assert metrics["loss"] == 0
    assert metrics["skipped"] == 0


def test_a_step_that_is_not_finite_changes_nothing():
    training = tiny_training()
    step = training.compiled_step()
    state, _ = step(training.first_state(), None, training.place(packed_rows(0)))
    before = jax.tree.map(np.array, state)
    rows = packed_rows(1)
    rows["weights"][2, 5] = np.inf
    state, metrics = step(state, None, training.place(rows))
    assert metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, state.weights, before.weights)
    jax.tree.map(np.testing.assert_array_equal, state.optimizer, before.optimizer)
    assert state.step == 2
    _, metrics = step(state, None, training.place(packed_rows(1)))
    assert metrics["skipped"] == 0


def test_bfloat16_products_keep_float32_weights_and_stay_near(one_device):
    training = tiny_training(compute=ComputeConfig(dtype="bfloat16"))
    values = trajectory(training, steps=3)
    np.testing.assert_allclose(values[:, 0], one_device[:3, 0], rtol=2e-2)
    types = {x.dtype for x in jax.tree.leaves(training.first_state().weights)}
    assert types == {jnp.dtype("float32")}


@pytest.mark.parametrize(("dtype", "least"), [("float32", 1.0), ("bfloat16", 0.0)])
def test_float32_products_are_exact_on_accelerators(dtype, least):
    """Check the precision of every product, in the step's forward and backward pass."""
    training = tiny_training(compute=ComputeConfig(dtype=dtype))
    arguments = (training.template(), None, abstract_batch(training.layout))
    for function in (training.compiled_step(), training.compiled_evaluation()):
        products = [
            line
            for line in function.lower(*arguments).as_text().splitlines()
            if "stablehlo.dot_general" in line
        ]
        exact = [line for line in products if "precision = [HIGHEST, HIGHEST]" in line]
        assert products
        assert len(exact) == least * len(products)


def test_packed_rows_weigh_as_the_same_examples_unpacked():
    """Check segments of packed rows against each example in a padded row of its own."""
    training = tiny_training()
    packed = packed_rows(4)
    padded = unpacked(packed)
    evaluate, state = training.compiled_evaluation(), training.first_state()
    whole = evaluate(state, None, training.place(packed))
    wider = tiny_training(rows=len(padded["tokens"]))
    single = evaluate(state, None, wider.place(padded))
    np.testing.assert_allclose(
        whole["loss"] / whole["weight"], single["loss"] / single["weight"], rtol=1e-5
    )
    assert whole["targets"] == single["targets"]
    # Attention costs the same, since it is counted within segments.
    assert causal_pairs(packed["segments"]) == causal_pairs(padded["segments"])


def test_operations_count_the_segments_that_are_packed():
    """Check against one query-key pair after another."""
    segments = np.array([[0, 0, 0, 1, 1, -1, -1, -1], [0, 0, 0, 0, 0, 0, 0, 0]], np.int32)
    assert causal_pairs(segments) == (6 + 3) + 36
    # The first token of a row may have the segment of the last token of the row before.
    assert causal_pairs(np.zeros((3, 2), np.int32)) == 3 * 3
    training = tiny_training(rows=2, length=8)
    tokens, pairs, layers = 5 + 8, 45, CONFIG.num_layers
    kernels = layers * (4 * 32 * 32 + 3 * 32 * 48) + 32 * 64
    attention_flops = layers * 4 * 4 * 8 * pairs  # scores and mixture of 4 heads of 8
    expected = 3 * (2 * kernels * tokens + attention_flops)
    assert training.measure({"segments": segments}) == expected
    # A process with one row of two assumes that the other is alike.
    one = 3 * (2 * kernels * 8 + layers * 4 * 4 * 8 * 36)
    assert training.measure({"segments": segments[1:]}) == 2 * one
    adapted = tiny_training(rows=2, length=8, lora=LoraConfig(rank=2, targets=("query",)))
    adapters = layers * 2 * (32 + 32)
    expected = 2 * 2 * kernels * tokens + 3 * (2 * adapters * tokens + attention_flops)
    assert adapted.measure({"segments": segments}) == expected


def test_adapters_start_at_zero_and_train_alone():
    whole = tiny_training()
    frozen = whole.first_state().weights
    training = tiny_training("1,2,2,1", lora=LoraConfig(rank=4), seed=1)
    state, rows = training.first_state(), packed_rows(0)
    before = jax.tree.map(np.array, frozen)
    placed = jax.device_put(frozen, tiny_training("1,2,2,1").shardings.weights)
    step, losses = training.compiled_step(), []
    for _ in range(5):
        state, metrics = step(state, placed, training.place(rows))
        losses.append(float(metrics["loss"]))
    first = whole.compiled_evaluation()(whole.first_state(), None, whole.place(rows))
    np.testing.assert_allclose(losses[0], first["loss"] / first["weight"], rtol=1e-5)
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, placed)
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
        BatchLayout(make_mesh(mesh), batch, micro, length)
    assert all(number in str(refusal.value) for number in numbers)


def test_no_square_and_no_logits_at_length():
    """Check, by shapes only, that nothing grows as sequence squared or as all logits."""
    length, vocab = 1 << 16, 6151
    config = replace(CONFIG, max_sequence_length=length, vocab_size=vocab)
    training = tiny_training("1,1,1,4", rows=1, length=length, config=config)
    sizes: dict[tuple[int, ...], int] = {}

    def walk(jaxpr) -> None:
        for equation in jaxpr.eqns:
            for variable in equation.outvars:
                sizes[variable.aval.shape] = int(np.prod(variable.aval.shape))
            for value in equation.params.values():
                for part in value if isinstance(value, tuple | list) else (value,):
                    if hasattr(part, "eqns"):
                        walk(part)
                    elif hasattr(part, "jaxpr"):
                        walk(part.jaxpr)

    arguments = (training.template(), None, abstract_batch(training.layout))
    walk(jax.make_jaxpr(training.compiled_step())(*arguments).jaxpr)
    assert len(sizes) > 60  # the walk went inside the loops
    # The largest is the hidden activation of all four shards.
    assert max(sizes.values()) <= 4 * length * config.intermediate_size
    assert not [shape for shape in sizes if vocab in shape and sizes[shape] >= length * 64]
