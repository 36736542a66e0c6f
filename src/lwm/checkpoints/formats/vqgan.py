"""VQGANs on disk: our directory, a training run, the original's pickle.

One table of names drives the original's pickle both ways. Every name and shape is compared with
the model's own before a weight is used. Knows files and the model's tree; computes nothing.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lwm.checkpoints.formats.pickle_arrays import read_pickle
from lwm.checkpoints.formats.run import StackedTensors, is_run, latest
from lwm.checkpoints.formats.safetensors import SafetensorsDirectory, write
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
"""Keys of the original's settings and ours."""

_BLOCK = {
    "norm_in": "GroupNorm_0",
    "conv_in": "Conv_0",
    "norm_out": "GroupNorm_1",
    "conv_out": "Conv_1",
    "skip": "Conv_2",
}
_NETWORK = {"conv_in": "Conv_0", "norm": "GroupNorm_0", "conv_out": "Conv_1"}
_WHOLE = {
    "codebook": "quantize/embeddings",
    "to_codes": "quant_conv",
    "from_codes": "post_quant_conv",
}
_LEVEL = {"encoder": "DownsamplingBlock", "decoder": "UpsamplingBlock"}
_RESAMPLE = {"encoder": "Downsample_0/Conv_0", "decoder": "Upsample_0/Conv_0"}


def original_name(ours: str) -> str:
    """`encoder.levels.0.blocks.1.conv_in.kernel` as the original calls it."""
    match ours.split("."):
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
            return "/".join([_WHOLE[field], *leaf])
    raise AssertionError(ours)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Weights, or their specs, by our names: the path in the tree, joined by dots."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def read_vqgan(path: Path, config: Path | None = None) -> tuple[VQGANConfig, VQGAN]:
    """Configuration and weights (numpy, float32) of any form.

    Args:
        path: our directory, a run's directory or one of its checkpoints, or the original's pickle.
        config: for a pickle, a JSON file of the original's settings; its defaults unless given.

    Raises:
        CheckpointError: nothing is there, it is broken, or tensors are missing or of other shapes.
        ConfigError: the settings are wrong.
    """
    if path.is_dir():
        if config is not None:
            raise ConfigError(
                f"{path} says itself what it is; leave config ({config}) away, it is for the "
                "original's pickle"
            )
        found, names, shapes, read = _open_directory(path)
    elif path.is_file():
        found = _original_config(config)
        arrays = read_pickle(path)
        names = {ours: original_name(ours) for ours in named_leaves(vqgan_params(found))}
        shapes, read = {name: array.shape for name, array in arrays.items()}, arrays.__getitem__
    else:
        raise CheckpointError(f"{path}: there is no such file or directory; check the path")
    specs = named_leaves(vqgan_params(found))
    _require_shapes(str(path), {names[ours]: spec.shape for ours, spec in specs.items()}, shapes)
    leaves = []
    for ours in specs:
        array = np.asarray(read(names[ours]), np.float32)
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"{path}: the tensor {names[ours]!r} holds numbers that are not finite; take "
                "another checkpoint"
            )
        leaves.append(array)
    return found, jax.tree.unflatten(jax.tree.structure(vqgan_params(found)), leaves)


Read = Callable[[str], np.ndarray]


def _open_directory(
    path: Path,
) -> tuple[VQGANConfig, dict[str, str], Mapping[str, tuple[int, ...]], Read]:
    if is_run(path):
        step = path if not (path / "run.json").is_file() else latest(path)
        settings, source = read_json(step / "facts" / "metadata").get("vqgan"), f"{step}/facts"
        tensors: Any = StackedTensors(step, "weights")
        shapes = tensors.shapes
    else:
        file = path / "config.json"
        if not file.is_file():
            raise CheckpointError(
                f"{path} has no config.json and is no training run; name a VQGAN's directory"
            )
        data, source = read_json(file), str(file)
        if data.get("format") == FORMAT and data.get("version") != VERSION:
            raise CheckpointError(
                f"{file} has format version {data.get('version')!r} and this lwm reads {VERSION}; "
                "update lwm"
            )
        settings = data.get("vqgan") if data.get("format") == FORMAT else None
        tensors = SafetensorsDirectory(path)
        shapes = tensors.shapes()
    if not isinstance(settings, dict):
        raise CheckpointError(f"{source} holds no settings of a VQGAN; name a VQGAN's directory")
    config = from_dict(VQGANConfig, settings, source)
    return (
        config,
        {name: name for name in named_leaves(vqgan_params(config))},
        shapes,
        tensors.read,
    )


def _original_config(file: Path | None) -> VQGANConfig:
    if file is None:
        return VQGANConfig()
    data = read_json(file)
    # What is left out of the names is how the original is trained, not what it is.
    known = {ours: data[theirs] for theirs, ours in _SETTINGS.items() if theirs in data}
    if data.get("attn_resolutions"):
        raise ConfigError(
            f"{file}: attn_resolutions is {data['attn_resolutions']}; VQGANs with attention are "
            "not supported, and the original has none"
        )
    return from_dict(VQGANConfig, known, str(file))


def _require_shapes(
    source: str, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{source} lacks the tensor {', '.join(map(repr, missing[:3]))}{more}; it is no VQGAN "
            "of this configuration"
        )
    for name, shape in wanted.items():
        if tuple(found[name]) != shape:
            raise CheckpointError(
                f"{source}: the tensor {name!r} has shape {list(found[name])}, but the "
                f"configuration asks for {list(shape)}; correct the configuration"
            )
    extra = [name for name in found if name not in wanted]
    if extra:
        raise CheckpointError(
            f"{source} has the tensor {extra[0]!r}, which a VQGAN of this configuration does not; "
            "correct the configuration"
        )


def write_vqgan(directory: Path, config: VQGANConfig, weights: VQGAN) -> None:
    """Our directory, `config.json` and `model.safetensors`, whole or not at all.

    Raises:
        InputError: the destination exists or cannot be written.
    """
    data = {"format": FORMAT, "version": VERSION, "vqgan": to_dict(config)}
    with new_directory(directory) as partial:
        (partial / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        write(partial, ((name, np.asarray(x)) for name, x in named_leaves(weights).items()))
