"""Read and write VQGANs: our directory, a training run, the original's pickle.

Every name and shape is compared with the model's before a tensor is used.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lwm.checkpoints.checkpoint import require_shapes
from lwm.checkpoints.formats.lwm import read_own_settings, write_own_settings
from lwm.checkpoints.formats.pickle_arrays import read_pickle
from lwm.checkpoints.formats.run import StackedTensors, is_run, latest
from lwm.checkpoints.formats.safetensors import SafetensorsDirectory, write_safetensors
from lwm.core.config import from_dict, read_json, to_dict
from lwm.core.errors import CheckpointError, ConfigError
from lwm.core.files import new_directory
from lwm.models.vqgan import VQGAN, VQGANConfig, vqgan_params

_Stored = tuple[VQGANConfig, dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]

_SETTINGS = {
    "resolution": "image_size",
    "hidden_channels": "hidden_channels",
    "channel_mult": "channel_multipliers",
    "num_res_blocks": "residual_blocks",
    "z_channels": "latent_channels",
    "num_embeddings": "codebook_size",
    "quantized_embed_dim": "code_channels",
}
"""The original's settings and ours; those omitted concern only the original's training."""

_BLOCK = {
    "norm_in": "GroupNorm_0",
    "conv_in": "Conv_0",
    "norm_out": "GroupNorm_1",
    "conv_out": "Conv_1",
    "skip": "Conv_2",
}
_NETWORK = {"conv_in": "Conv_0", "norm": "GroupNorm_0", "conv_out": "Conv_1"}
_ROOT = {
    "codebook": "quantize/embeddings",
    "to_codes": "quant_conv",
    "from_codes": "post_quant_conv",
}
_LEVEL = {"encoder": "DownsamplingBlock", "decoder": "UpsamplingBlock"}
_RESAMPLE = {"encoder": "Downsample_0/Conv_0", "decoder": "Upsample_0/Conv_0"}


def original_name(name: str) -> str:
    """Return the original's name of a tensor, such as `encoder.levels.0.blocks.1.conv_in.kernel`
    in ours."""
    match name.split("."):
        case [part, "levels", level, "blocks", block, field, leaf]:
            where = f"{part}/{_LEVEL[part]}_{level}/ResnetBlock_{block}"
            return f"{where}/{_BLOCK[field]}/{leaf}"
        case [part, "levels", level, "resample", leaf]:
            return f"{part}/{_LEVEL[part]}_{level}/{_RESAMPLE[part]}/{leaf}"
        case [part, "middle", block, field, leaf]:
            return f"{part}/MidBlock_0/ResnetBlock_{block}/{_BLOCK[field]}/{leaf}"
        case [part, field, leaf]:
            return f"{part}/{_NETWORK[field]}/{leaf}"
        case [field, *leaf]:
            return "/".join([_ROOT[field], *leaf])
    raise AssertionError(name)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return weights, or their specs, by our names: the path in the tree, joined by dots."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def read_vqgan(path: Path, config: Path | None = None) -> tuple[VQGANConfig, VQGAN]:
    """Read configuration and weights (numpy, float32) of our directory, a run or one of its
    checkpoints, or the original's pickle, for which `config` is a JSON file of settings."""
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or directory; check the path")
    if path.is_dir() and config is not None:
        raise ConfigError(
            f"{path} contains its configuration; omit {config}, which is only for a pickle"
        )
    settings, shapes, read = _open_directory(path) if path.is_dir() else _open_pickle(path, config)
    name_of = str if path.is_dir() else original_name
    specs = {name_of(name): spec for name, spec in named_leaves(vqgan_params(settings)).items()}
    expected = {name: spec.shape for name, spec in specs.items()}
    require_shapes(str(path), expected, shapes)
    leaves = []
    for name in specs:
        leaves.append(np.asarray(read(name), np.float32))
        if not np.isfinite(leaves[-1]).all():
            raise CheckpointError(
                f"{path}: the tensor {name!r} contains numbers that are not finite; replace it"
            )
    return settings, jax.tree.structure(vqgan_params(settings)).unflatten(leaves)


def _open_directory(path: Path) -> _Stored:
    if is_run(path):
        step = latest(path)
        source, tensors = step / "facts" / "metadata", StackedTensors(step)
        settings = read_json(source).get("vqgan")
        if not isinstance(settings, dict):
            raise CheckpointError(f"{step} has no settings of a vqgan; name another directory")
    elif (path / "config.json").is_file():
        source, tensors = path / "config.json", SafetensorsDirectory(path)
        settings = read_own_settings(path, "vqgan")
    else:
        raise CheckpointError(f"{path} has no config.json; name the directory of a VQGAN")
    return from_dict(VQGANConfig, settings, str(source)), tensors.shapes(), tensors.read


def _open_pickle(file: Path, config: Path | None) -> _Stored:
    data = {} if config is None else read_json(config)
    if data.get("attn_resolutions"):
        raise ConfigError(
            f"{config}: attn_resolutions is {data['attn_resolutions']}; it must be empty, because "
            "VQGANs with attention are not supported"
        )
    values = {ours: data[theirs] for theirs, ours in _SETTINGS.items() if theirs in data}
    settings, arrays = from_dict(VQGANConfig, values, str(config)), read_pickle(file)
    return settings, {name: array.shape for name, array in arrays.items()}, arrays.__getitem__


def write_vqgan(directory: Path, config: VQGANConfig, weights: VQGAN) -> None:
    """Write our directory, `config.json` and `model.safetensors`, completely or not at all."""
    with new_directory(directory) as partial:
        write_own_settings(partial, "vqgan", to_dict(config))
        leaves = ((name, np.asarray(leaf)) for name, leaf in named_leaves(weights).items())
        write_safetensors(partial, leaves)
