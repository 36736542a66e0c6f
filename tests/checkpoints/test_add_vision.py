"""Test adding vision ids to text models: the text stays, the added entries are random by seed."""

import json
from pathlib import Path
from typing import Any

import flax_files
import numpy as np
import pytest
from random_vqgan import save_random_vqgan

from lwm.checkpoints.add_vision import (
    add_vision,
    require_codebook,
    vocabulary_for,
)
from lwm.checkpoints.checkpoint import Checkpoint
from lwm.checkpoints.formats import vqgan as vqgan_files
from lwm.checkpoints.formats.vqgan import read_vqgan
from lwm.checkpoints.open import open_checkpoint
from lwm.checkpoints.write import write_checkpoint
from lwm.cli.convert import convert
from lwm.core.errors import ConfigError
from lwm.models.vision_tokens import VisionVocabulary
from lwm.models.vqgan import VQGANConfig

VISION = vocabulary_for(64, 16)


TINY = VQGANConfig(
    image_size=32, hidden_channels=4, channel_multipliers=(1, 1, 1, 1), residual_blocks=1,
    latent_channels=4, codebook_size=64, code_channels=4, norm_groups=2,
)  # fmt: skip


@pytest.fixture
def text_model(tmp_path: Path) -> Checkpoint:
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(flax_files.SETTINGS | {"initializer_range": 0.5}), encoding="utf-8"
    )
    file = flax_files.write_stream(tmp_path / "params", flax_files.small_model())
    return open_checkpoint(f"params::{file}", config=str(config))


@pytest.fixture
def vqgan(tmp_path: Path) -> Path:
    return save_random_vqgan(tmp_path / "codec", TINY)


def test_the_default_vocabulary_is_the_originals() -> None:
    assert vocabulary_for(8192, 256) == VisionVocabulary()


def test_text_is_unchanged_and_vision_is_seeded(text_model: Checkpoint) -> None:
    vision_model = add_vision(text_model, VISION, seed=1)
    vision_model.verify()
    before, after = dict(text_model.read()), dict(vision_model.read())
    assert after["embedding"].shape == (8 + 320, 4)
    assert after["head"].shape == (4, 8 + 320)
    np.testing.assert_array_equal(after["embedding"][:8], before["embedding"])
    np.testing.assert_array_equal(after["head"][:, :8], before["head"])
    for name in before.keys() - {"embedding", "head"}:
        np.testing.assert_array_equal(after[name], before[name])
    fresh = [after["embedding"][8:], after["head"][:, 8:].T]
    for array in fresh:
        assert array.dtype == np.float32
        assert abs(array.std() - 0.5) < 0.05
    assert not np.array_equal(fresh[0], fresh[1])
    again, other = (dict(add_vision(text_model, VISION, seed=n).read()) for n in (1, 2))
    np.testing.assert_array_equal(again["head"], after["head"])
    assert not np.array_equal(other["head"], after["head"])


def test_the_vqgan_is_written_beside_the_weights(
    text_model: Checkpoint, vqgan: Path, tmp_path: Path
) -> None:
    vision_model = add_vision(text_model, VISION)
    require_codebook(TINY, "a VQGAN", vision_model.config, "it")
    for form, name in (("lwm", "ours"), ("huggingface", "theirs")):
        write_checkpoint(
            vision_model, tmp_path / name, form=form, dtype="float32", vqgan=read_vqgan(vqgan),  # type: ignore[arg-type]
            save_tokenizer=lambda directory: None,
        )  # fmt: skip
        result = open_checkpoint(str(tmp_path / name))
        assert result.config == vision_model.config
        assert result.vqgan == tmp_path / name / "vqgan"
        copied = (tmp_path / name / "vqgan" / "model.safetensors").read_bytes()
        assert copied == (vqgan / "model.safetensors").read_bytes()
        expected = dict(vision_model.read())
        for tensor, array in result.read():
            np.testing.assert_array_equal(array, expected[tensor])


def test_convert_reads_the_vqgan_once(
    text_model: Checkpoint, vqgan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []

    def count(*arguments: Any) -> Any:
        reads.append(arguments)
        return read_vqgan(*arguments)

    monkeypatch.setattr(vqgan_files, "read_vqgan", count)
    config = str(tmp_path / "config.json")
    convert(text_model.source, tmp_path / "out", config=config, add_vision=True, vqgan=vqgan)
    assert len(reads) == 1
    assert open_checkpoint(str(tmp_path / "out")).config.vision == VISION
    convert(str(tmp_path / "out"), tmp_path / "again")  # copies the VQGAN of the checkpoint
    assert len(reads) == 2
    assert (tmp_path / "again" / "vqgan").is_dir()


def test_mismatched_models_and_vqgans_are_refused(text_model: Checkpoint) -> None:
    vision_model = add_vision(text_model, VISION)
    with pytest.raises(ConfigError, match=r"has 320 vision ids already"):
        add_vision(vision_model, VISION)
    with pytest.raises(ConfigError, match=r"text model.*--add-vision"):
        require_codebook(TINY, "a VQGAN", text_model.config, "it")
    for vision in (vocabulary_for(63, 16), vocabulary_for(65, 16), vocabulary_for(64, 256)):
        with pytest.raises(
            ConfigError, match=f"has 64 codes, 16 per frame, and it has {vision.codes}"
        ):
            require_codebook(TINY, "a VQGAN", add_vision(text_model, vision).config, "it")
