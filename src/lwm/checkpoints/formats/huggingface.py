"""Read and write Hugging Face Llama directories.

To transformers a vision-language model is a plain Llama with one table, the vision ids after the
text ids. An additional key of `config.json`, which transformers preserves and ignores, says where
the vision ids begin.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge
from pydantic import StrictBool, StrictFloat, StrictInt

from lwm.checkpoints.checkpoint import Checkpoint, vqgan_in
from lwm.checkpoints.formats.safetensors import SafetensorsDirectory
from lwm.checkpoints.names import AS_IS, HALF_SPLIT, TRANSPOSED, NameRow, NameTable
from lwm.core.config import from_dict, read_json
from lwm.core.errors import CheckpointError
from lwm.models.llama import LlamaConfig
from lwm.models.vision_tokens import VisionVocabulary

_LAYER = "model.layers.{layer}"
HUGGINGFACE_NAMES: NameTable = (
    NameRow("embedding", "model.embed_tokens.weight", AS_IS),
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
    NameRow("head", "lm_head.weight", TRANSPOSED),
)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Declare the keys of `config.json` that are read and written, with transformers' defaults.

    `lwm_vision` is ours: it makes a Llama a vision-language model.
    """

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
    """Open a directory that transformers could load as `LlamaForCausalLM`.

    Raises:
        CheckpointError: the architecture is not Llama's, or files are broken.
        ConfigError: a setting is wrong, or an option is not supported.
    """
    file = directory / "config.json"
    config = _read_config(read_json(file), str(file))
    tensors = SafetensorsDirectory(directory)
    tied = config.tie_embeddings

    def ignorable(name: str) -> bool:
        return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")

    return Checkpoint(
        source=str(directory),
        format="Hugging Face",
        stored_dtype=tensors.dtype(),
        config=config,
        table=HUGGINGFACE_NAMES,
        tensors=tensors,
        vocabulary=directory,
        vqgan=vqgan_in(directory),
        ignorable=ignorable,
    )


def _read_config(data: dict[str, Any], source: str) -> LlamaConfig:
    if data.get("model_type") != "llama":
        raise CheckpointError(
            f"{source} describes a model of type {data.get('model_type')!r}; only 'llama' is "
            "supported"
        )
    # transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling.
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{source}: rope_parameters is {rope!r}; an object is needed")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(
            f"{source} scales its rotary embedding by {kind!r}, which is not supported; only a "
            "plain rope_theta is"
        )
    data = data | rope
    names = [field.name for field in fields(_Settings)]
    values = {name: data[name] for name in names if data.get(name) is not None}
    settings = from_dict(_Settings, values, source)
    vision = settings.lwm_vision
    if vision is not None and vision.size >= settings.vocab_size:
        raise CheckpointError(
            f"{source}: lwm_vision has {vision.size} ids of a vocab_size of "
            f"{settings.vocab_size}, which leaves none for text; correct config.json"
        )
    heads = settings.num_attention_heads
    return LlamaConfig(
        vocab_size=settings.vocab_size - (vision.size if vision else 0),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_layers=settings.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=heads if (n := settings.num_key_value_heads) is None else n,
        head_dim=settings.hidden_size // heads if (d := settings.head_dim) is None else d,
        max_sequence_length=settings.max_position_embeddings,
        rope_theta=settings.rope_theta,
        rms_norm_eps=settings.rms_norm_eps,
        tie_embeddings=settings.tie_word_embeddings,
        initializer_range=settings.initializer_range,
        vision=vision,
    )


def write_huggingface_config(directory: Path, config: LlamaConfig, dtype: str) -> None:
    """Write a `config.json` that old and new versions of transformers read."""
    settings = _Settings(
        vocab_size=config.table_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_sequence_length,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        initializer_range=config.initializer_range,
        lwm_vision=config.vision,
    )
    data = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": dtype}
    data |= {name: value for name, value in asdict(settings).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
