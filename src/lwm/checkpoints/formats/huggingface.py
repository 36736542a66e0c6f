"""Read and write Hugging Face directories of Llama models and of the others in `FAMILIES`.

To transformers a vision-language model is a plain Llama with one table, the vision ids after the
text ids. A key in `config.json`, which transformers preserves and ignores, says where the
vision ids begin.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Ge
from pydantic import StrictBool, StrictFloat, StrictInt

from lwm.checkpoints.checkpoint import Checkpoint, vqgan_in
from lwm.checkpoints.formats.rope_scaling import read_rope_scaling, rope_scaling_keys
from lwm.checkpoints.formats.safetensors import SafetensorsDirectory
from lwm.checkpoints.names import (
    AS_IS,
    HALF_SPLIT,
    TRANSPOSED,
    NameRow,
    NameTable,
    TensorLayout,
    kernel_rows,
)
from lwm.core.config import from_dict, read_json, to_dict
from lwm.core.errors import CheckpointError
from lwm.core.progress import say
from lwm.models.llama import Kernel, LlamaConfig
from lwm.models.vision_tokens import VisionVocabulary

_LAYER = "model.layers.{layer}"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_MODULES: dict[Kernel, tuple[str, TensorLayout]] = {
    "query": ("self_attn.q_proj", HALF_SPLIT),
    "key": ("self_attn.k_proj", HALF_SPLIT),
    "value": ("self_attn.v_proj", TRANSPOSED),
    "output": ("self_attn.o_proj", TRANSPOSED),
    "gate": ("mlp.gate_proj", TRANSPOSED),
    "up": ("mlp.up_proj", TRANSPOSED),
    "down": ("mlp.down_proj", TRANSPOSED),
}
HUGGINGFACE_NAMES: NameTable = (
    NameRow("embedding", _EMBEDDING, AS_IS),
    NameRow("layers.{layer}.attention_norm", f"{_LAYER}.input_layernorm.weight", AS_IS),
    NameRow("layers.{layer}.mlp_norm", f"{_LAYER}.post_attention_layernorm.weight", AS_IS),
    *kernel_rows(_MODULES, _LAYER),
    NameRow("norm", "model.norm.weight", AS_IS),
    NameRow("head", _HEAD, TRANSPOSED),
)

_ATTENTION: tuple[Kernel, ...] = ("query", "key", "value", "output")
_MLP: tuple[Kernel, ...] = ("gate", "up", "down")


class Family(NamedTuple):
    """Describe how an architecture of transformers differs from Llama."""

    architecture: str
    biases: tuple[Kernel, ...] | None = ()  # None if `attention_bias` and `mlp_bias` declare them
    defaults: Mapping[str, Any] = {}  # of keys whose default differs from Llama's
    window: bool = True  # whether `sliding_window` applies unless `use_sliding_window` is set


FAMILIES = {
    "llama": Family("LlamaForCausalLM", biases=None),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        biases=("query", "key", "value"),
        defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768},
        window=False,
    ),
}
"""The families that load, by `model_type`."""

_OURS = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_position_embeddings": "max_sequence_length",
    "tie_word_embeddings": "tie_embeddings",
    "lwm_vision": "vision",
}
"""Our names of the settings that `LlamaConfig` calls otherwise."""


@dataclass(frozen=True, kw_only=True)
class _Settings:
    # The keys of `config.json` that are read and written, with transformers' defaults.
    vocab_size: StrictInt
    hidden_size: StrictInt
    intermediate_size: StrictInt
    num_hidden_layers: StrictInt
    num_attention_heads: Annotated[StrictInt, Ge(1)]
    num_key_value_heads: StrictInt | None = None
    head_dim: StrictInt | None = None
    max_position_embeddings: StrictInt = 2048
    rope_theta: StrictFloat = 10000.0
    rms_norm_eps: StrictFloat = 1e-6
    tie_word_embeddings: StrictBool = False
    initializer_range: StrictFloat = 0.02
    hidden_act: Literal["silu", "swish"] = "silu"
    attention_bias: StrictBool = False
    mlp_bias: StrictBool = False
    lwm_vision: VisionVocabulary | None = None


def is_huggingface(path: Path) -> bool:
    """Return whether a path is a directory of a model of any architecture."""
    return (path / "config.json").is_file()


def open_huggingface(directory: Path) -> Checkpoint:
    """Open a directory that transformers could load as `LlamaForCausalLM`; refuse others."""
    file = directory / "config.json"
    config = _read_config(read_json(file), str(file))
    tensors = SafetensorsDirectory(directory)
    if config.tie_embeddings and _stores_another_head(tensors):
        say(
            f"{directory} ties the head to the embedding, but stores another {_HEAD}; it is used, "
            "as in transformers"
        )
        config = replace(config, tie_embeddings=False)
    ignorable = ("rotary_emb.inv_freq", *([_HEAD] if config.tie_embeddings else []))
    return Checkpoint(
        source=str(directory),
        format="Hugging Face",
        stored_dtype=tensors.dtype,
        config=config,
        table=HUGGINGFACE_NAMES,
        tensors=tensors,
        vocabulary=directory,
        vqgan=vqgan_in(directory),
        ignorable=lambda name: name.endswith(ignorable),
    )


def _stores_another_head(tensors: SafetensorsDirectory) -> bool:
    """Return whether a head is stored that differs from the embedding."""
    shapes = tensors.shapes()
    if _HEAD not in shapes or shapes[_HEAD] != shapes.get(_EMBEDDING):
        return False  # a wrong shape is refused with all others
    return not np.array_equal(tensors.read(_HEAD), tensors.read(_EMBEDDING))


def _read_config(data: dict[str, Any], source: str) -> LlamaConfig:
    kind = data.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise CheckpointError(
            f"{source}: models of type {kind!r} are not supported; only {', '.join(FAMILIES)} are"
        )
    data = {**family.defaults, **data}
    config = config_from_keys(data, source)
    _refuse_window(data, family, config, source)
    return config if family.biases is None else replace(config, biases=family.biases)


def _refuse_window(
    data: Mapping[str, Any], family: Family, config: LlamaConfig, source: str
) -> None:
    """Refuse attention within a sliding window that is shorter than the context."""
    window, layers = data.get("sliding_window"), data.get("layer_types")
    used = data.get("use_sliding_window", family.window)
    first = data.get("max_window_layers", 0)  # of the layers with a window
    if isinstance(layers, list):
        used = any(layer != "full_attention" for layer in layers)
    elif isinstance(first, int) and first >= config.num_layers:
        used = False
    if (
        used
        and window is not None
        and not (isinstance(window, int) and window >= config.max_sequence_length)
    ):
        raise CheckpointError(
            f"{source} restricts attention to a sliding window of {window!r} tokens in a context "
            f"of {config.max_sequence_length:,}; only full attention is supported"
        )


def config_from_keys(data: dict[str, Any], source: str) -> LlamaConfig:
    """Build a configuration from Hugging Face's keys; ignore keys that do not describe a model."""
    rope = data.get("rope_scaling") or data.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{source}: rope_parameters is {rope!r}; an object is needed")
    data = data | rope
    present = {key: value for key, value in data.items() if value is not None}
    fields = _Settings.__dataclass_fields__
    settings = from_dict(
        _Settings, {key: present[key] for key in fields if key in present}, source
    )
    values = {_OURS.get(key, key): value for key, value in vars(settings).items()}
    vision, heads = settings.lwm_vision, settings.num_attention_heads
    if vision is not None and vision.size >= settings.vocab_size:
        raise CheckpointError(
            f"{source}: lwm_vision has {vision.size} ids of a vocab_size of "
            f"{settings.vocab_size}, which leaves none for text; correct config.json"
        )
    values["vocab_size"] -= 0 if vision is None else vision.size
    if values["num_kv_heads"] is None:
        values["num_kv_heads"] = heads
    if values["head_dim"] is None:
        values["head_dim"] = settings.hidden_size // heads
    values["biases"] = _ATTENTION * settings.attention_bias + _MLP * settings.mlp_bias
    values["rope_scaling"] = scaling = read_rope_scaling(data, source)
    if scaling is not None:
        values["max_sequence_length"] = scaling.context(settings.max_position_embeddings)
    return LlamaConfig(**{name: values[name] for name in LlamaConfig.__dataclass_fields__})


def config_to_keys(config: LlamaConfig) -> dict[str, Any]:
    """Return a configuration by Hugging Face's keys."""
    values = to_dict(config) | {"vocab_size": config.table_size}
    values |= {
        "attention_bias": set(_ATTENTION) <= set(config.biases),
        "mlp_bias": set(_MLP) <= set(config.biases),
    }
    del values["biases"], values["rope_scaling"]
    theirs = {ours: key for key, ours in _OURS.items()}
    keys = {theirs.get(name, name): value for name, value in values.items() if value is not None}
    return keys | ({} if config.rope_scaling is None else rope_scaling_keys(config.rope_scaling))


def write_huggingface_config(directory: Path, config: LlamaConfig, dtype: str) -> None:
    """Write a `config.json` that old and new versions of transformers read."""
    keys = config_to_keys(config)
    declared = _ATTENTION * keys["attention_bias"] + _MLP * keys["mlp_bias"]
    model_type = "llama"
    if set(config.biases) != set(declared):
        model_type = next(
            (kind for kind, row in FAMILIES.items() if row.biases == config.biases), ""
        )
    if not model_type:
        raise CheckpointError(
            f"no architecture of transformers has biases on {', '.join(config.biases)} alone; "
            "convert to --format lwm"
        )
    data = {
        "architectures": [FAMILIES[model_type].architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "torch_dtype": dtype,
        **keys,
    }
    (directory / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
