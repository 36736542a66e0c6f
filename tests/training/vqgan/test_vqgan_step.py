"""A step of a tiny VQGAN: what it learns, and what leaves it as it was."""

from typing import Literal

import jax
import numpy as np
import pytest

from lwm.core.errors import ConfigError
from lwm.core.mesh import make_mesh
from lwm.models.vqgan import VQGANConfig
from lwm.training.optimizer import OptimizerConfig
from lwm.training.vqgan.codebook import CodebookConfig
from lwm.training.vqgan.step import ReconstructionConfig, VqganPlan

CONFIG = VQGANConfig(
    image_size=12, hidden_channels=4, channel_multipliers=(1, 2), residual_blocks=1,
    latent_channels=4, codebook_size=16, code_channels=3, norm_groups=2,
)  # fmt: skip


def plan(
    learning: Literal["average", "gradient"] = "average", mesh="1,1,1,1", structure=0.0
) -> VqganPlan:
    return VqganPlan(
        config=CONFIG, mesh=make_mesh(mesh), steps=30, seed=0,
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant"),
        codebook=CodebookConfig(learning=learning, dead_below=0.1),
        reconstruction=ReconstructionConfig(structure=structure),
    )  # fmt: skip


def batch(count: int = 4) -> dict[str, np.ndarray]:
    smooth = np.random.default_rng(0).uniform(-1, 1, (count, 2, 2, 3))
    pixels = smooth.repeat(6, axis=1).repeat(6, axis=2).astype(np.float32)
    return {"pixels": pixels, "weights": np.ones(count, np.float32)}


def run(planned: VqganPlan, steps: int) -> tuple:
    state, step, found = planned.first_state(), planned.step(), []
    for _ in range(steps):
        state, metrics = step(state, None, planned.place(batch()))
        found.append(jax.device_get(metrics))
    return state, found


@pytest.mark.parametrize(("learning", "structure"), [("average", 0.0), ("gradient", 0.1)])
def test_learning_reconstructs(learning, structure) -> None:
    planned = plan(learning, structure=structure)
    state, found = run(planned, 30)
    assert found[-1].reconstruction < 0.5 * found[0].reconstruction
    assert found[-1].psnr > found[0].psnr + 3
    assert found[0].revived == 16  # the first batch fills the codebook
    assert found[-1].used > 4
    # Measured apart from learning, two pictures that only fill up do not count.
    local = batch()
    local["weights"][2:] = 0
    sums = jax.device_get(planned.evaluate()(state, None, planned.place(local)))
    assert sums.pictures == 2
    assert sums.counts.sum() == 2 * 36
    assert sums.psnr / 2 == pytest.approx(found[-1].psnr, abs=3)


def test_devices_together_learn_what_one_does() -> None:
    (alone, figures), (spread, others) = run(plan(), 2), run(plan(mesh="2,2,1,1"), 2)
    np.testing.assert_allclose(figures[1].loss, others[1].loss, rtol=1e-3)
    np.testing.assert_allclose(
        alone.weights.encoder.conv_in.kernel, spread.weights.encoder.conv_in.kernel, atol=2e-3
    )


def test_what_is_not_finite_changes_nothing() -> None:
    planned = plan()
    state = planned.first_state()
    before = jax.device_get(state)
    local = batch()
    local["pixels"][0, 0, 0, 0] = np.nan
    state, metrics = planned.step()(state, None, planned.place(local))
    assert metrics.skipped == 1
    after = jax.device_get(state)
    assert after.step == 1
    for old, new in zip(
        jax.tree.leaves((before.weights, before.usage, before.optimizer)),
        jax.tree.leaves((after.weights, after.usage, after.optimizer)),
        strict=True,
    ):
        np.testing.assert_array_equal(old, new)


def test_a_sum_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="one must be above"):
        ReconstructionConfig(absolute=0, squared=0)
