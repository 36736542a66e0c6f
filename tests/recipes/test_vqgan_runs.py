"""Check `lwm train vqgan` on tiny images: metrics, a grid, exact resumption."""

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lwm
from lwm.checkpoints.formats.vqgan import named_leaves, read_vqgan
from lwm.core.errors import ConfigError, InputError, LwmError
from lwm.data.images import ImageDataConfig
from lwm.media.images import read_image, write_image
from lwm.models.vqgan import VQGANConfig
from lwm.recipes import assemble_vqgan
from lwm.recipes.assemble_vqgan import train_vqgan
from lwm.recipes.catalogue.index import recipe, summaries, vqgan_recipe
from lwm.recipes.settings import VqganRun
from lwm.training.checkpointing import CheckpointConfig
from lwm.training.loop import Interrupted, LoopConfig
from lwm.training.metrics import read_metrics


@pytest.fixture
def tiny(tmp_path) -> VqganRun:
    random = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a", "b", "held"):
        write_image(folder / f"{name}.png", random.integers(0, 256, (16, 16, 3), np.uint8))
    return VqganRun(
        out=tmp_path / "run",
        model=VQGANConfig(
            image_size=12, hidden_channels=4, channel_multipliers=(1,), residual_blocks=1,
            latent_channels=4, codebook_size=16, code_channels=3, norm_groups=2,
        ),
        batch_size=2,
        mesh="1,1,1,1",
        loop=LoopConfig(steps=6, evaluate_every=3),
        data=ImageDataConfig(path=str(folder), held_out=("held.png",), source_size=16),
        checkpoint=CheckpointConfig(every=2),
    )  # fmt: skip


def weights(run: Path) -> dict[str, np.ndarray]:
    return named_leaves(read_vqgan(run)[1])


def test_a_stopped_run_resumes_exactly(tiny, tmp_path, monkeypatch) -> None:
    train_vqgan(tiny)
    whole = read_metrics(tiny.out / "metrics.jsonl")
    assert [row["step"] for row in whole if row["split"] == "evaluation"] == [3, 6]
    assert {"psnr", "ssim", "used", "perplexity"} <= set(whole[-1]) & set(whole[0])
    assert read_image(tiny.out / assemble_vqgan.GRID, None).shape == (16, 4 * 28, 3)

    stopped = replace(tiny, out=tmp_path / "stopped")

    def stop(*written) -> None:  # at the first evaluation, at step 3
        write_image(*written)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(assemble_vqgan, "write_image", stop)
    with pytest.raises(Interrupted):
        train_vqgan(stopped)
    monkeypatch.undo()
    train_vqgan(stopped)
    expected, resumed = weights(tiny.out), weights(stopped.out)
    assert expected.keys() == resumed.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(resumed[name], array)
    again = read_metrics(stopped.out / "metrics.jsonl")
    assert [row["loss"] for row in again] == [row["loss"] for row in whole]

    codec = lwm.load_vqgan(tiny.out)
    assert codec.config == tiny.model
    assert codec.encode(np.zeros((1, 12, 12, 3), np.float32)).shape == (1, 12, 12)
    step = lwm.load_vqgan(tiny.out / "checkpoints" / "6")
    assert step.config == tiny.model
    # Another model cannot resume the run, nor start from its weights.
    other = replace(tiny.model, codebook_size=8)
    with pytest.raises(ConfigError, match="codebook_size is 16, not 8"):
        train_vqgan(replace(tiny, model=other))
    with pytest.raises(ConfigError, match="has codebook_size 16, but this run has 8"):
        train_vqgan(replace(tiny, model=other, init=str(tiny.out), out=tmp_path / "other"))
    with pytest.raises(LwmError, match="does not describe the model"):
        lwm.load(str(tiny.out))


def test_wrong_settings_are_refused_before_anything_is_written(tiny) -> None:
    for changes, error, words in (
        ({"mesh": "1,4,1,1"}, ConfigError, "multiple of 4"),
        ({"data": replace(tiny.data, held_out=("x",))}, InputError, "'x'"),
    ):
        with pytest.raises(error, match=words):
            train_vqgan(replace(tiny, **changes))
    assert not tiny.out.exists()
    tiny = replace(tiny, model=replace(tiny.model, channel_multipliers=(1, 2)))
    for changes, words in (
        ({"example_size": 13}, "multiple of 2"),
        ({"example_size": 10}, "at least 11"),
        ({"example_size": 18}, "source_size"),
        ({"data": replace(tiny.data, held_out=())}, "nothing is held out"),
    ):
        with pytest.raises(ConfigError, match=words):
            replace(tiny, **changes)


def test_the_recipes_are_complete() -> None:
    assert vqgan_recipe("vqgan").model.codes_per_frame == 256
    assert vqgan_recipe("vqgan-256").model == VQGANConfig()
    assert {"book", "vqgan"} <= set(summaries())
    with pytest.raises(ConfigError, match="trains a VQGAN"):
        recipe("vqgan")
