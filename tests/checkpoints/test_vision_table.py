"""Text models that are given eyes: what they knew stays, and what is new is random and seeded."""

import json
from pathlib import Path

import flax_files
import numpy as np
import pytest

from lwm.checkpoints.checkpoint import Checkpoint
from lwm.checkpoints.resolve import open_checkpoint
from lwm.checkpoints.vision_table import (
    add_vision,
    codebook_of,
    require_codebook,
    vocabulary_for,
)
from lwm.checkpoints.write import write_checkpoint
from lwm.core.errors import CheckpointError, ConfigError
from lwm.models.world import VisionVocabulary

VISION = vocabulary_for(64, 16)


@pytest.fixture
def blind(tmp_path: Path) -> Checkpoint:
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(flax_files.SETTINGS | {"initializer_range": 0.5}), encoding="utf-8"
    )
    file = flax_files.write_stream(tmp_path / "params", flax_files.small_model())
    return open_checkpoint(f"params::{file}", config=str(config))


@pytest.fixture
def vqgan(tmp_path: Path) -> Path:
    """The two files of a VQGAN's directory, whose weights nobody reads here."""
    directory = tmp_path / "codec"
    directory.mkdir()
    settings = {"codebook_size": 64, "image_size": 32, "channel_multipliers": [1, 2, 2, 4]}
    data = {"format": "lwm-vqgan", "version": 1, "vqgan": settings}
    (directory / "config.json").write_text(json.dumps(data), encoding="utf-8")
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


def test_the_original_table_is_that_of_its_codebook() -> None:
    assert vocabulary_for(8192, 256) == VisionVocabulary()


def test_text_stays_and_vision_is_seeded(blind: Checkpoint) -> None:
    seeing = add_vision(blind, VISION, seed=1)
    seeing.verify()
    before, after = dict(blind.read()), dict(seeing.read())
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
    again, other = (dict(add_vision(blind, VISION, seed=n).read()) for n in (1, 2))
    np.testing.assert_array_equal(again["head"], after["head"])
    assert not np.array_equal(other["head"], after["head"])


def test_it_is_written_with_its_vqgan(blind: Checkpoint, vqgan: Path, tmp_path: Path) -> None:
    seeing = add_vision(blind, VISION)
    require_codebook(vqgan, seeing.config, "it")
    for form, name in (("lwm", "ours"), ("huggingface", "theirs")):
        write_checkpoint(
            seeing, tmp_path / name, form=form, dtype="float32", vqgan=vqgan,  # type: ignore[arg-type]
            save_tokenizer=lambda directory: None,
        )  # fmt: skip
        found = open_checkpoint(str(tmp_path / name))
        assert found.config == seeing.config
        assert found.vqgan == tmp_path / name / "vqgan"
        assert (tmp_path / name / "vqgan" / "model.safetensors").read_bytes() == b"weights"
        expected = dict(seeing.read())
        for tensor, array in found.read():
            np.testing.assert_array_equal(array, expected[tensor])


def test_what_does_not_belong_together_is_refused(
    blind: Checkpoint, vqgan: Path, tmp_path: Path
) -> None:
    seeing = add_vision(blind, VISION)
    with pytest.raises(ConfigError, match=r"sees already \(320 ids"):
        add_vision(seeing, VISION)
    assert codebook_of(vqgan) == (64, 16)
    with pytest.raises(ConfigError, match=r"text model.*--add-vision"):
        require_codebook(vqgan, blind.config, "it")
    for vision in (vocabulary_for(63, 16), vocabulary_for(64, 256)):
        with pytest.raises(ConfigError, match="has 64 codes, 16 a frame, and it"):
            require_codebook(vqgan, add_vision(blind, vision).config, "it")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        codebook_of(tmp_path)
    (vqgan / "config.json").write_text('{"vqgan": {"codebook_size": "many"}}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="no settings of a VQGAN"):
        codebook_of(vqgan)
