"""Test opening a MODEL string, and the known models."""

import json
from pathlib import Path

import flax_files
import pytest

from lwm.checkpoints.download import hub_directory
from lwm.checkpoints.formats.lwm import write_lwm_config
from lwm.checkpoints.formats.safetensors import write_safetensors
from lwm.checkpoints.open import KNOWN_MODELS, open_checkpoint
from lwm.core.errors import CheckpointError, ConfigError
from lwm.models.llama import LlamaConfig


def test_released_models_have_the_settings_of_the_paper() -> None:
    thetas = {"128k": 1e7, "256k": 1e7, "512k": 2.5e7, "1m": 5e7}
    for length, theta in thetas.items():
        for chat in ("", "chat-"):
            known = KNOWN_MODELS[f"lwm-text-{chat}{length}"]
            assert known.theta == theta
            assert known.length == (1 << 20 if length == "1m" else int(length[:-1]) << 10)
    assert {name for name, known in KNOWN_MODELS.items() if known.vision} == {
        "lwm-32k", "lwm-128k", "lwm-1m",
    }  # fmt: skip
    assert len([name for name in KNOWN_MODELS if name.startswith("lwm-")]) == 11


def test_known_vision_models_explain_how_to_load_them() -> None:
    settings = '"vision_vocab_size": 8448, "theta": 5e\\+07, "max_sequence_length": 1048576'
    with pytest.raises(CheckpointError, match=rf"params::FILE.*{settings}"):
        open_checkpoint("lwm-1m")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no-such-model", "no model 'no-such-model'"),
        ("missing.gguf", r"no model 'missing.gguf'"),
        ("params::missing", "no such file"),
        ("weights::file", "'weights::' of 'weights::file' is not known"),
        ("", "no config.json|no model"),
    ],
)
def test_missing_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(model, config="debug" if model.startswith("params") else None)


def test_unknown_files_and_directories(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"weights")
    with pytest.raises(CheckpointError, match="unknown kind"):
        open_checkpoint(str(tmp_path / "model.bin"))
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        open_checkpoint(str(tmp_path))


def test_config_is_only_for_the_originals_formats(tmp_path: Path) -> None:
    for model in (str(tmp_path), "smollm2", "model.gguf"):
        with pytest.raises(ConfigError, match=r"--config '7b' is only for the original's"):
            open_checkpoint(model, config="7b")


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME"])
def test_a_cached_released_model_gets_theta_and_length_from_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    repository = "LargeWorldModel/LWM-Text-Chat-512K"
    assert hub_directory(repository) is None
    hub = tmp_path if variable == "HF_HUB_CACHE" else tmp_path / "hub"
    directory = hub / "models--LargeWorldModel--LWM-Text-Chat-512K" / "snapshots" / "abc"
    (directory.parent / "incomplete").mkdir(parents=True)
    directory.mkdir()
    settings = flax_files.SETTINGS
    (directory / "source.json").write_text(json.dumps(settings), encoding="utf-8")
    file = flax_files.write_stream(directory / "source", flax_files.small_model())
    source = open_checkpoint(f"params::{file}", config=str(directory / "source.json"))
    write_lwm_config(directory, source.config, "float32")
    assert hub_directory(repository) is None  # the weights are missing
    write_safetensors(directory, source.read())
    checkpoint = open_checkpoint("lwm-text-chat-512k")
    assert checkpoint.source == "lwm-text-chat-512k"
    assert isinstance(checkpoint.config, LlamaConfig)
    assert (checkpoint.config.rope_theta, checkpoint.config.max_sequence_length) == (
        2.5e7,
        512 * 1024,
    )
    assert open_checkpoint(f"hf:{repository}").config.rope_theta == settings["theta"]
