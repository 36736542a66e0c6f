"""Test writing and reading VQGANs, and refusing other files."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from random_vqgan import save_random_vqgan
from safetensors.numpy import load_file, save_file

import lwm
from lwm.checkpoints.formats.vqgan import named_leaves, original_name, read_vqgan, write_vqgan
from lwm.core import params
from lwm.core.errors import CheckpointError, ConfigError, InputError
from lwm.models.vqgan import VQGANConfig, vqgan_params

SCAN = Path(__file__).parents[2] / "fixtures" / "original" / "scan"
PICKLE, SETTINGS = SCAN / "vqgan.pickle", SCAN / "vqgan_config.json"
CONFIG = VQGANConfig(
    image_size=8, hidden_channels=4, channel_multipliers=(1, 2, 2), residual_blocks=2,
    latent_channels=4, codebook_size=16, code_channels=3, norm_groups=2,
)  # fmt: skip


@pytest.fixture
def directory(tmp_path):
    return save_random_vqgan(tmp_path / "ours", CONFIG)


def test_round_trips_are_exact(directory, tmp_path) -> None:
    config, weights = read_vqgan(directory)
    assert config == CONFIG
    write_vqgan(tmp_path / "again", config, weights)
    for name in ("config.json", "model.safetensors"):
        assert (directory / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    with pytest.raises(InputError, match="exists"):
        write_vqgan(directory, config, weights)


def test_every_tensor_of_a_pickle_is_read() -> None:
    _, weights = read_vqgan(PICKLE, SETTINGS)
    theirs: dict[str, np.ndarray] = {}

    def flatten(tree, path) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                flatten(value, [*path, key])
            else:
                theirs["/".join([*path, key])] = value

    flatten(pickle.loads(PICKLE.read_bytes()), [])
    ours = {original_name(name): leaf for name, leaf in named_leaves(weights).items()}
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)


def test_pickles_of_other_settings_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"Conv_0/kernel' has shape"):
        lwm.load_vqgan(PICKLE)


def test_missing_and_odd_tensors_are_named(directory) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = "decoder.levels.0.blocks.2.conv_in.kernel"
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != name}, f"the tensor '{name}' is missing"),
        ({**tensors, name: tensors[name][:2]}, rf"'{name}' has shape \[2, 3, 8, 8\]"),
        ({**tensors, "more": np.zeros(1, np.float32)}, "'more' has no place"),
        ({**tensors, name: tensors[name] * np.nan}, f"'{name}' contains .* not finite"),
    ):
        save_file(changed, file)
        with pytest.raises(CheckpointError, match=message):
            read_vqgan(directory)


def test_broken_directories_are_refused(directory, tmp_path) -> None:
    settings = json.loads((directory / "config.json").read_text())
    for changed, error, message in (
        ({**settings, "version": 2}, CheckpointError, "version 2"),
        ({"format": "lwm", "version": 1, "model": {}}, CheckpointError, "no settings of a vqgan"),
        (
            {**settings, "vqgan": {**settings["vqgan"], "image_size": "x"}},
            ConfigError,
            "image_size",
        ),
        ({**settings, "vqgan": {"residual_blocks": 10**9}}, ConfigError, "residual_blocks"),
    ):
        (directory / "config.json").write_text(json.dumps(changed))
        with pytest.raises(error, match=message):
            read_vqgan(directory)
    (directory / "config.json").write_text(json.dumps(settings))
    whole = (directory / "model.safetensors").read_bytes()
    for broken in (whole[:-4], whole[:100], b"", (1 << 60).to_bytes(8, "little") + whole[8:]):
        (directory / "model.safetensors").write_bytes(broken)
        with pytest.raises(CheckpointError, match="broken or cut short"):
            read_vqgan(directory)
    with pytest.raises(CheckpointError, match=r"no config.json"):
        read_vqgan(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        read_vqgan(tmp_path / "absent")
    with pytest.raises(ConfigError, match="contains its configuration"):
        read_vqgan(directory, SETTINGS)


def test_names_are_complete() -> None:
    names = named_leaves(vqgan_params(VQGANConfig()))
    assert len(set(names)) == len(names)
    assert params.count(vqgan_params(VQGANConfig())) > 80e6
