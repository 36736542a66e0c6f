"""Read and write Hugging Face Llama directories.

To transformers a vision-language model is a plain Llama with one table, the vision ids after the
text ids. A key in `config.json`, which transformers preserves and ignores, says where the
vision ids begin.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge
from pydantic import StrictBool, StrictFloat, StrictInt

from lwm.checkpoints.checkpoint import Checkpoint, vqgan_in
from lwm.checkpoints.formats.safetensors import SafetensorsDirectory
from lwm.checkpoints.names import AS_IS, HALF_SPLIT, TRANSPOSED, NameRow, NameTable
from lwm.core.config import from_dict, read_json, to_dict
from lwm.core.errors import CheckpointError
from lwm.core.progress import say
from lwm.models.llama import LlamaConfig
from lwm.models.vision_tokens import VisionVocabulary

_LAYER = "model.layers.{layer}"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
HUGGINGFACE_NAMES: NameTable = (
    NameRow("embedding", _EMBEDDING, AS_IS),
    NameRow("layers.{layer}.attention_norm", f"{_LAYER}.input_layernorm.weight", AS_IS),
    NameRow("layers.{layer}.query", f"{_LAYER}.self_attn.q_proj.weight", HALF_SPLIT),
    NameRow("layers.{layer}.key", f"{_LAYER}.self_attn.k_proj.weight", HALF_SPLIT),
    NameRow("layers.{layer}.value", f"{_LAYER}.self_attn.v_proj.weight", TRANSPOSED),
    NameRow("layers.{layer}.output", f"{_LAYER}.self_attn.o_proj.weight", TRANSPOSED),
    NameRow("layers.{layer}.mlp_norm", f"{_LAYER}.post_attention_layernorm.weight", AS_IS),
    NameRow("layers.{layer}.gate", f"{_LAYER}.mlp.gate_proj.weight", TRANSPOSED),
    NameRow("layers.{layer}.up", f"{_LAYER}.mlp.up_proj.weight", TRANSPOSED),
    NameRow("layers.{layer}.down", f"{_LAYER}.mlp.down_proj.weight", TRANSPOSED),
    NameRow("norm", "model.norm.weight", AS_IS),
    NameRow("head", _HEAD, TRANSPOSED),
)

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
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
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
    if data.get("model_type") != "llama":
        kind = data.get("model_type")
        raise CheckpointError(f"{source}: models of type {kind!r} are not supported; only 'llama'")
    # transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling.
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{source}: rope_parameters is {rope!r}; an object is needed")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(
            f"{source} scales its rotary embedding by {kind!r}; only rope_theta is supported"
        )
    return config_from_keys(data | rope, source)


def config_from_keys(data: dict[str, Any], source: str) -> LlamaConfig:
    """Build a configuration from Hugging Face's keys; ignore keys that do not describe a model."""
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
    return LlamaConfig(**{name: values[name] for name in LlamaConfig.__dataclass_fields__})


def config_to_keys(config: LlamaConfig) -> dict[str, Any]:
    """Return a configuration by Hugging Face's keys."""
    values = to_dict(config) | {"vocab_size": config.table_size}
    theirs = {ours: key for key, ours in _OURS.items()}
    return {theirs.get(name, name): value for name, value in values.items() if value is not None}


def write_huggingface_config(directory: Path, config: LlamaConfig, dtype: str) -> None:
    """Write a `config.json` that old and new versions of transformers read."""
    data = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
        **config_to_keys(config),
    }
    (directory / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
