"""Read and write VQGANs: our directory, a training run, the original's pickle.

Every name and shape is compared with those of the model before a tensor is used.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lwm.checkpoints.formats.pickle_arrays import read_pickle
from lwm.checkpoints.formats.run import RUN_FILE, StackedTensors, is_run, latest
from lwm.checkpoints.formats.safetensors import SafetensorsDirectory, write_safetensors
from lwm.core.config import from_dict, read_json, to_dict
from lwm.core.errors import CheckpointError, ConfigError
from lwm.core.files import new_directory
from lwm.models.vqgan import VQGAN, VQGANConfig, vqgan_params

FORMAT, VERSION = "lwm-vqgan", 1

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


class _Stored(NamedTuple):
    """Hold what each form of a VQGAN provides: its configuration, and tensors by its names."""

    config: VQGANConfig
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    name_of: Callable[[str], str] = str


def read_vqgan(path: Path, config: Path | None = None) -> tuple[VQGANConfig, VQGAN]:
    """Read the configuration and the weights (numpy, float32) of any form.

    Args:
        path: our directory, a run's directory or one of its checkpoints, or the original's pickle.
        config: a JSON file of the original's settings, only for a pickle; defaults to the
            original's default settings.

    Raises:
        CheckpointError: nothing exists there, it is broken, or tensors are missing or have other
            shapes.
        ConfigError: the settings are wrong.
    """
    if path.is_file():
        stored = _open_pickle(path, config)
    elif not path.is_dir():
        raise CheckpointError(f"{path}: there is no such file or directory; check the path")
    elif config is not None:
        raise ConfigError(
            f"{path} contains its configuration; omit config ({config}), which is only for the "
            "original's pickle"
        )
    else:
        stored = _open_run(path) if is_run(path) else _open_directory(path)
    specs = named_leaves(vqgan_params(stored.config))
    names = [stored.name_of(name) for name in specs]
    shapes = [spec.shape for spec in specs.values()]
    _require_shapes(str(path), dict(zip(names, shapes, strict=True)), stored.shapes)
    leaves = []
    for name in names:
        leaves.append(np.asarray(stored.read(name), np.float32))
        if not np.isfinite(leaves[-1]).all():
            raise CheckpointError(
                f"{path}: the tensor {name!r} contains numbers that are not finite; use another "
                "checkpoint"
            )
    return stored.config, jax.tree.structure(vqgan_params(stored.config)).unflatten(leaves)


def _open_pickle(file: Path, config: Path | None) -> _Stored:
    data = {} if config is None else read_json(config)
    if data.get("attn_resolutions"):
        raise ConfigError(
            f"{config}: attn_resolutions is {data['attn_resolutions']}; VQGANs with attention are "
            "not supported, and the original has none"
        )
    values = {ours: data[theirs] for theirs, ours in _SETTINGS.items() if theirs in data}
    settings = from_dict(VQGANConfig, values, str(config))
    arrays = read_pickle(file)
    shapes = {name: array.shape for name, array in arrays.items()}
    return _Stored(settings, shapes, arrays.__getitem__, original_name)


def _open_run(path: Path) -> _Stored:
    step = latest(path) if (path / RUN_FILE).is_file() else path
    settings = read_json(step / "facts" / "metadata").get("vqgan")
    tensors = StackedTensors(step, "weights")
    return _Stored(_config(settings, f"{step}/facts"), tensors.shapes, tensors.read)


def _open_directory(path: Path) -> _Stored:
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{path} has no config.json and is no training run; name a VQGAN's directory"
        )
    data = read_json(file)
    ours = data.get("format") == FORMAT
    if ours and data.get("version") != VERSION:
        raise CheckpointError(
            f"{file} has format version {data.get('version')!r} and this lwm reads {VERSION}; "
            "update lwm"
        )
    config = _config(data.get("vqgan") if ours else None, str(file))
    tensors = SafetensorsDirectory(path)
    return _Stored(config, tensors.shapes(), tensors.read)


def _config(settings: Any, source: str) -> VQGANConfig:
    if not isinstance(settings, dict):
        raise CheckpointError(f"{source} has no settings of a VQGAN; name a VQGAN's directory")
    return from_dict(VQGANConfig, settings, source)


def _require_shapes(
    source: str, expected: Mapping[str, tuple[int, ...]], present: Mapping[str, tuple[int, ...]]
) -> None:
    missing = [name for name in expected if name not in present]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{source} lacks the tensor {', '.join(map(repr, missing[:3]))}{more}; it is no VQGAN "
            "of this configuration"
        )
    for name, shape in expected.items():
        if tuple(present[name]) != shape:
            raise CheckpointError(
                f"{source}: the tensor {name!r} has shape {list(present[name])}, but the "
                f"configuration implies {list(shape)}; correct the configuration"
            )
    for name in present:
        if name not in expected:
            raise CheckpointError(
                f"{source} has the tensor {name!r}, which a VQGAN of this configuration does not; "
                "correct the configuration"
            )


def write_vqgan(directory: Path, config: VQGANConfig, weights: VQGAN) -> None:
    """Write our directory, `config.json` and `model.safetensors`, completely or not at all.

    Raises:
        InputError: the destination exists or cannot be written.
    """
    data = {"format": FORMAT, "version": VERSION, "vqgan": to_dict(config)}
    with new_directory(directory) as partial:
        (partial / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        leaves = ((name, np.asarray(leaf)) for name, leaf in named_leaves(weights).items())
        write_safetensors(partial, leaves)
