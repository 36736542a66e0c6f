"""Hugging Face Llama directories, both ways.

A model that sees is a plain Llama to transformers: one table, the ids of vision behind those of
text. A key of our own in `config.json`, which transformers keeps and ignores, says where the
border is.
"""

import json
import sys
from pathlib import Path
from typing import Any

from lwm.checkpoints.checkpoint import Checkpoint, vqgan_in
from lwm.checkpoints.formats.safetensors import SafetensorsDirectory
from lwm.checkpoints.names import HUGGINGFACE
from lwm.core.config import from_dict, read_json, to_dict
from lwm.core.errors import CheckpointError
from lwm.models.llama import LlamaConfig
from lwm.models.vision_tokens import VisionVocabulary

VISION = "lwm_vision"
"""The key of `config.json` that makes a Llama one that sees."""

_INTEGERS = {
    "table_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_sequence_length": "max_position_embeddings",
}


def open_huggingface(directory: Path) -> Checkpoint:
    """A directory that transformers could load as `LlamaForCausalLM`.

    Raises:
        CheckpointError: the architecture or one of its options is not Llama's, or files are
            broken.
    """
    data = read_json(directory / "config.json")
    config = _read_config(data, str(directory))
    tensors = SafetensorsDirectory(directory)
    tied = config.tie_embeddings

    def ignorable(name: str) -> bool:
        return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")

    return Checkpoint(
        source=str(directory),
        format="Hugging Face",
        stored=tensors.stored(),
        config=config,
        table=HUGGINGFACE,
        tensors=tensors,
        vocabulary=directory,
        vqgan=vqgan_in(directory),
        ignorable=ignorable,
    )


def _read_config(data: dict[str, Any], source: str) -> LlamaConfig:
    if data.get("model_type") != "llama":
        raise CheckpointError(
            f"{source} is a model of type {data.get('model_type')!r}; only 'llama' can be read"
        )
    refused = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    for key, needed in refused.items():
        if data.get(key, needed) != needed:
            raise CheckpointError(
                f"{source} has {key} = {data[key]!r}, which is not supported; it must be "
                f"{needed!r}"
            )
    # transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling.
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{source}: rope_parameters is {rope!r}; an object is needed")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(
            f"{source} scales its rotary embedding by {kind!r}, which is not supported; only a "
            "plain "
            "rope_theta is"
        )

    def number(key: str, kinds: tuple[type, ...], default: Any = None) -> Any:
        value = data.get(key)
        value = default if value is None else value
        return _number(value, kinds, f"{source}: {key} in config.json")

    defaults = {"max_position_embeddings": 2048}  # transformers' own
    integers: dict[str, Any] = {
        ours: number(key, (int,), defaults.get(key)) for ours, key in _INTEGERS.items()
    }
    heads = integers["num_heads"]
    if heads < 1:
        raise CheckpointError(f"{source}: num_attention_heads is {heads}; it must be positive")
    theta = rope.get("rope_theta", data.get("rope_theta", 10000.0))
    tied = data.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise CheckpointError(
            f"{source}: tie_word_embeddings is {tied!r}; true or false is needed"
        )
    table, vision = integers.pop("table_size"), None
    if data.get(VISION) is not None:
        if not isinstance(data[VISION], dict):
            raise CheckpointError(
                f"{source}: {VISION} in config.json is {data[VISION]!r}; an object is needed"
            )
        vision = from_dict(VisionVocabulary, data[VISION], f"{source}: {VISION} in config.json")
        if vision.size >= table:
            raise CheckpointError(
                f"{source}: {VISION} holds {vision.size} ids of a vocab_size of {table}, which "
                "leaves none for text; correct config.json"
            )
    return LlamaConfig(
        **integers,
        vocab_size=table - (vision.size if vision else 0),
        vision=vision,
        num_kv_heads=number("num_key_value_heads", (int,), heads),
        head_dim=number("head_dim", (int,), integers["hidden_size"] // heads),
        rope_theta=float(_number(theta, (int, float), f"{source}: rope_theta")),
        rms_norm_eps=float(number("rms_norm_eps", (int, float), 1e-6)),
        tie_embeddings=tied,
        initializer_range=float(number("initializer_range", (int, float), 0.02)),
    )


def _number(value: Any, kinds: tuple[type, ...], what: str) -> Any:
    """A number of JSON, of the wanted kind and of a size that a float can have."""
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise CheckpointError(f"{what} is {value!r}; a number is needed")
    if abs(value) > sys.float_info.max:
        raise CheckpointError(f"{what} is beyond all bounds; correct it")
    return value


def write_config(directory: Path, config: LlamaConfig, dtype: str) -> None:
    """Writes the `config.json` that transformers reads, old and new versions alike."""
    data = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(config, ours) for ours, key in _INTEGERS.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
    }
    if config.vision is not None:
        data[VISION] = to_dict(config.vision)
    (directory / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
