"""Check Muon against singular values, and its state on a mesh."""

from typing import Any

import jax
import numpy as np
import optax
from tiny_training import TIED, tiny_training, trajectory

from lwm.core import params
from lwm.core.mesh import make_mesh
from lwm.core.sharding import TRAINING
from lwm.models.llama import llama_params
from lwm.training.optimizer import OptimizerConfig

MUON = OptimizerConfig(method="muon", learning_rate=0.5, weight_decay=0.1, clip_norm=1e6)


def test_muon_equalizes_the_singular_values_of_each_kernel_and_spares_the_rest() -> None:
    specs = llama_params(TIED, stacked=True)
    mesh = make_mesh("1,1,1,1")
    weights: Any
    gradient: Any
    weights, gradient = (
        params.initialize(specs, jax.random.key(seed), "float32", mesh=mesh, rules=TRAINING)
        for seed in range(2)
    )
    muon = MUON.transformation(specs, 10)
    change: Any = muon.update(gradient, muon.init(weights), weights)[0]
    for name in ("query", "key", "output", "gate", "down"):
        for layer in range(TIED.num_layers):
            trees = (weights, gradient, change)
            kernel, slope, step = (np.asarray(getattr(x.layers, name))[layer] for x in trees)
            left, _, right = np.linalg.svd(slope, full_matrices=False)
            turned = left.T @ (step / -0.5 - 0.1 * kernel) @ right.T
            values = np.diag(turned)
            np.testing.assert_allclose(turned, np.diag(values), atol=0.02)
            # Five steps of Newton and Schulz bring singular values near 1, not to it.
            values = values / (0.2 * max(kernel.shape) ** 0.5)
            assert values.min() > 0.6
            assert values.max() < 1.3
    adamw = optax.adamw(0.5, b1=0.9, b2=0.95, weight_decay=0.0)
    expected: Any = adamw.update(gradient, adamw.init(weights), weights)[0]
    np.testing.assert_allclose(change.embedding, expected.embedding, rtol=1e-5)
    np.testing.assert_allclose(change.norm, expected.norm, rtol=1e-5)
    np.testing.assert_allclose(change.layers.mlp_norm, expected.layers.mlp_norm, rtol=1e-5)


def test_muon_trains_alike_on_a_mesh() -> None:
    optimizer = OptimizerConfig(method="muon", learning_rate=1e-2)
    expected = trajectory(tiny_training(config=TIED, optimizer=optimizer), steps=3)
    values = trajectory(tiny_training("1,2,2,1", config=TIED, optimizer=optimizer), steps=3)
    np.testing.assert_allclose(values, expected, rtol=1e-4)
