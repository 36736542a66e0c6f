"""Check what steps of a tiny VQGAN change, and what leaves it as it was."""

from dataclasses import replace
from typing import Literal

import jax
import numpy as np
import pytest

from lwm.core.errors import ConfigError
from lwm.core.mesh import make_mesh
from lwm.models.vqgan import VQGANConfig
from lwm.training.optimizer import OptimizerConfig
from lwm.training.vqgan import CodebookConfig, ReconstructionConfig, VqganTraining

CONFIG = VQGANConfig(
    image_size=12, hidden_channels=4, channel_multipliers=(1, 2), residual_blocks=1,
    latent_channels=4, codebook_size=16, code_channels=3, norm_groups=2,
)  # fmt: skip


def tiny_training(
    learning: Literal["average", "gradient"] = "average",
    mesh="1,1,1,1",
    structure=0.0,
    config=CONFIG,
) -> VqganTraining:
    return VqganTraining(
        config=config, mesh=make_mesh(mesh), steps=30,
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant"),
        codebook=CodebookConfig(learning=learning, dead_below=0.1),
        reconstruction=ReconstructionConfig(structure=structure),
    )  # fmt: skip


def batch(count: int = 4) -> dict[str, np.ndarray]:
    smooth = np.random.default_rng(0).uniform(-1, 1, (count, 2, 2, 3))
    pixels = smooth.repeat(6, axis=1).repeat(6, axis=2).astype(np.float32)
    return {"pixels": pixels, "weights": np.ones(count, np.float32)}


def run(training: VqganTraining, steps: int) -> tuple:
    """Return the last state and the metrics of each step."""
    state, step, metrics = training.first_state(), training.compiled_step(), []
    for _ in range(steps):
        state, values = step(state, None, training.place(batch()))
        metrics.append(jax.device_get(values))
    return state, metrics


@pytest.mark.parametrize(("learning", "structure"), [("average", 0.0), ("gradient", 0.1)])
def test_reconstructions_improve(learning, structure) -> None:
    training = tiny_training(learning, structure=structure)
    state, metrics = run(training, 30)
    first, last = metrics[0], metrics[-1]
    assert last["reconstruction"] < 0.5 * first["reconstruction"]
    assert last["psnr"] > first["psnr"] + 3
    assert first["revived"] == 16  # the first batch fills the codebook
    assert last["used"] > 4
    # An evaluation does not count two images that only fill up the batch.
    local = batch()
    local["weights"][2:] = 0
    sums = jax.device_get(training.compiled_evaluation()(state, None, training.place(local)))
    assert sums["images"] == 2
    assert sums["counts"].sum() == 2 * 36
    assert sums["psnr"] / 2 == pytest.approx(last["psnr"], abs=3)


@pytest.mark.parametrize("learning", ["average", "gradient"])
def test_scalar_levels_are_trained_without_a_codebook(learning) -> None:
    config = replace(CONFIG, patch_size=2, local_encoder=True, scalar_levels=(4, 2, 2))
    training = tiny_training(learning, config=config)
    before = jax.device_get(training.first_state().weights.codebook)
    state, metrics = run(training, 30)
    np.testing.assert_array_equal(state.weights.codebook, before)
    assert metrics[-1]["reconstruction"] < 0.6 * metrics[0]["reconstruction"]
    assert all(values["revived"] == 0 for values in metrics)
    # Encoder and decoder both learn: the gradient passes through the rounding.
    for part in (state.weights.encoder, state.weights.decoder):
        start = training.first_state().weights
        other = start.encoder if part is state.weights.encoder else start.decoder
        assert abs(part.conv_in.kernel - other.conv_in.kernel).max() > 1e-3


def test_several_devices_train_as_one_does() -> None:
    (one, metrics), (several, others) = (
        run(tiny_training(), 2),
        run(tiny_training(mesh="2,2,1,1"), 2),
    )
    np.testing.assert_allclose(metrics[1]["loss"], others[1]["loss"], rtol=1e-3)
    np.testing.assert_allclose(
        one.weights.encoder.conv_in.kernel, several.weights.encoder.conv_in.kernel, atol=2e-3
    )


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    training = tiny_training()
    state = training.first_state()
    before = jax.device_get(state)
    local = batch()
    local["pixels"][0, 0, 0, 0] = np.nan
    state, metrics = training.compiled_step()(state, None, training.place(local))
    assert metrics["skipped"] == 1
    after = jax.device_get(state)
    assert after.step == 1
    for old, new in zip(
        jax.tree.leaves((before.weights, before.usage, before.optimizer)),
        jax.tree.leaves((after.weights, after.usage, after.optimizer)),
        strict=True,
    ):
        np.testing.assert_array_equal(old, new)


def test_products_are_exact_on_accelerators() -> None:
    """Check the precision of every product and convolution, forward and backward."""
    training = tiny_training(structure=0.1)
    arguments = (training.template(), None, training.place(batch()))
    for function in (training.compiled_step(), training.compiled_evaluation()):
        products = [
            line
            for line in function.lower(*arguments).as_text().splitlines()
            if "stablehlo.dot_general" in line or "stablehlo.convolution" in line
        ]
        assert products
        assert all(line.count("HIGHEST") == 2 for line in products)


def test_a_loss_without_terms_is_refused() -> None:
    with pytest.raises(ConfigError, match="are all 0"):
        ReconstructionConfig(absolute=0, squared=0)
