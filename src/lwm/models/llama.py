"""Declare the Llama transformer: its configuration and its weights. Biases make it a Qwen2.

Layers are stacked on a leading axis in training, where they are scanned and one is compiled, and a
tuple in inference, where scanning would copy each layer's weights on a CPU.

Source: Touvron et al. 2023 (arXiv 2302.13971, 2307.09288); grouped key-value heads, Ainslie et al.
2023 (arXiv 2305.13245).
"""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from annotated_types import Ge, Gt, Le, Lt
from jax.sharding import Mesh
from jaxtyping import Array, Float

from lwm.attention.rope import RopeScaling
from lwm.core.config import Checked
from lwm.core.errors import ConfigError
from lwm.core.params import ParamSpec, normal, ones, stack, zeros
from lwm.core.pytree import pytree
from lwm.core.sharding import Rules, require_divisible
from lwm.models.quantized import QuantizedKernel
from lwm.models.vision_tokens import VisionVocabulary

Kernel = Literal["query", "key", "value", "output", "gate", "up", "down"]
"""A kernel of a layer."""

KERNELS: tuple[Kernel, ...] = get_args(Kernel)

MAX_LAYERS = 4096
"""Limit on the layers that a checkpoint may claim, since their names are listed one by one."""


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(Checked, section="model"):
    """Configure the sizes and constants of one model."""

    vocab_size: Annotated[int, Ge(1)]
    hidden_size: Annotated[int, Ge(1)]
    intermediate_size: Annotated[int, Ge(1)]
    num_layers: Annotated[int, Ge(1), Le(MAX_LAYERS)]
    num_heads: Annotated[int, Ge(1)]
    num_kv_heads: Annotated[int, Ge(1)]
    head_dim: Annotated[int, Ge(1)]
    max_sequence_length: Annotated[int, Ge(1), Lt(2**31)]  # positions are int32
    rope_theta: Annotated[float, Gt(0), Lt(math.inf)] = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: Annotated[float, Gt(0)] = 1e-6
    biases: tuple[Kernel, ...] = ()
    """Kernels of a layer whose outputs have a bias."""
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    vision: VisionVocabulary | None = None
    """Vision ids, which follow the `vocab_size` text ids; None for a text model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_heads ({self.num_heads}) must be a multiple of model.num_kv_heads "
                f"({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim is {self.head_dim}; it must be even")
        if self.rope_scaling is not None:
            self.rope_scaling.require(self.head_dim, self.rope_theta)
        if unknown := [name for name in self.biases if name not in KERNELS]:
            raise ConfigError(
                f"model.biases contains {unknown[0]!r}; choose among {', '.join(KERNELS)}"
            )
        for parts in FUSED.values():
            if 0 < len(set(parts) & set(self.biases)) < len(parts):
                raise ConfigError(f"model.biases must contain {', '.join(parts)} together or none")

    @property
    def generation_length(self) -> int:
        """Return the longest sequence that a cache can hold. With `dynamic` scaling, the keys of
        all positions would change as a sequence grows beyond the original length."""
        if self.rope_scaling is None or self.rope_scaling.rope_type != "dynamic":
            return self.max_sequence_length
        original = self.rope_scaling.original_max_position_embeddings
        return min(self.max_sequence_length, original)

    @property
    def table_size(self) -> int:
        """Return the number of text and vision ids: rows of the embedding, columns of the head."""
        return self.vocab_size + (self.vision.size if self.vision else 0)


@pytree
class Layer:
    """Hold the weights of one transformer layer.

    Kernels are (in, out); the outputs of query and key are in interleaved rotary pairs. Biases are
    by the name of their kernel.
    """

    attention_norm: Float[Array, "*layers embed"]
    query: Float[Array, "*layers embed heads_dim"]
    key: Float[Array, "*layers embed kv_heads_dim"]
    value: Float[Array, "*layers embed kv_heads_dim"]
    output: Float[Array, "*layers heads_dim embed"]
    mlp_norm: Float[Array, "*layers embed"]
    gate: Float[Array, "*layers embed mlp"]
    up: Float[Array, "*layers embed mlp"]
    down: Float[Array, "*layers mlp embed"]
    biases: dict[str, Float[Array, "*layers out"]] = field(default_factory=dict)


@pytree
class FusedLayer:
    """Hold the weights of one layer with products of the same input fused into one.

    For inference on meshes without `tensor` shards: fewer and larger products come closer to the
    speed of memory. Kernels are (out, in), see `forward.multiply`.
    """

    attention_norm: Float[Array, " embed"]
    attention_in: Float[Array, "heads_and_kv_heads_dim embed"] | QuantizedKernel
    output: Float[Array, "embed heads_dim"] | QuantizedKernel
    mlp_norm: Float[Array, " embed"]
    mlp_in: Float[Array, "gate_and_up embed"] | QuantizedKernel
    down: Float[Array, "embed mlp"] | QuantizedKernel
    biases: dict[str, Float[Array, " out"]] = field(default_factory=dict)


FUSED = {"attention_in": ("query", "key", "value"), "mlp_in": ("gate", "up")}
"""The parts of each fused kernel, in the order of its rows."""


@pytree
class Llama:
    """Hold all weights; `head` is None if tied, and (out, in) if quantized."""

    embedding: Float[Array, "vocab embed"] | QuantizedKernel
    layers: Layer | tuple[Layer | FusedLayer, ...]
    norm: Float[Array, " embed"]
    head: Float[Array, "embed vocab"] | QuantizedKernel | None


def llama_params(config: LlamaConfig, *, stacked: bool) -> Llama:
    """Declare every weight once, as a tree of `ParamSpec`."""
    sizes = {
        "vocab": config.table_size,
        "embed": config.hidden_size,
        "heads": config.num_heads * config.head_dim,
        "kv_heads": config.num_kv_heads * config.head_dim,
        "mlp": config.intermediate_size,
    }
    initializer = normal(config.initializer_range)

    def matrix(*axes: str) -> Any:
        return ParamSpec(tuple(sizes[axis] for axis in axes), axes, initializer)

    norm: Any = ParamSpec((config.hidden_size,), ("norm",), ones())
    kernels = {
        "query": matrix("embed", "heads"),
        "key": matrix("embed", "kv_heads"),
        "value": matrix("embed", "kv_heads"),
        "output": matrix("heads", "embed"),
        "gate": matrix("embed", "mlp"),
        "up": matrix("embed", "mlp"),
        "down": matrix("mlp", "embed"),
    }
    biases: Any = {
        name: ParamSpec(kernels[name].shape[1:], kernels[name].axes[1:], zeros())
        for name in config.biases
    }
    layer: Any = Layer(attention_norm=norm, mlp_norm=norm, biases=biases, **kernels)
    return Llama(
        embedding=matrix("vocab", "embed"),
        layers=stack(layer, config.num_layers) if stacked else (layer,) * config.num_layers,
        norm=norm,
        head=None if config.tie_embeddings else matrix("embed", "vocab"),
    )


def require_mesh(config: LlamaConfig, mesh: Mesh, rules: Rules) -> None:
    """Raise ConfigError if a mesh does not divide the sizes of the model."""
    sizes = {
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "mlp": config.intermediate_size,
        "embed": config.hidden_size,
        "vocab": config.table_size,
    }
    require_divisible(mesh, sizes, rules)
