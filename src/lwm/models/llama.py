"""The Llama transformer: one body for training, scoring, prefill and decode.

Weights are dataclass trees, either with layers stacked on a leading axis and scanned (training:
one compiled layer) or as a tuple of layers and unrolled (inference: scanning would copy each
layer's weights on a CPU). How attention is done is passed in as a function, so this file knows no
cache, no request and no strategy.

Source: Touvron et al. 2023 (arXiv 2302.13971, 2307.09288); grouped key heads, Ainslie et al. 2023
(arXiv 2305.13245).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from lwm.attention.rope import RotaryAngles, apply_rotary, rotary_angles
from lwm.core.errors import ConfigError
from lwm.core.mesh import TENSOR
from lwm.core.params import ParamSpec, normal, ones, stack
from lwm.core.sharding import Rules, constrain, partition_spec, require_divisible, shard_count
from lwm.models.quantized import QUANTIZED_ROWS, QuantizedKernel, multiply_quantized
from lwm.models.vision_tokens import VisionVocabulary

MAX_LAYERS = 4096
"""A checkpoint that claims more is broken; names are written out a layer, so the claim must not be
believed."""


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes and constants of one model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_sequence_length: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    vision: VisionVocabulary | None = None
    """Ids of vision behind the `vocab_size` ids of text, in a model that sees."""

    @property
    def table_size(self) -> int:
        """All ids, of text and of vision: rows of the embedding, columns of the head."""
        return self.vocab_size + (self.vision.size if self.vision else 0)

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
            "num_kv_heads", "head_dim", "max_sequence_length", "rope_theta", "rms_norm_eps",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ConfigError(f"model.{name} is {getattr(self, name)}; it must be positive")
        if self.num_layers > MAX_LAYERS:
            raise ConfigError(
                f"model.num_layers is {self.num_layers}; more than {MAX_LAYERS} is no model"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_heads ({self.num_heads}) must be a multiple of model.num_kv_heads "
                f"({self.num_kv_heads}), so that each key head serves the same number of heads"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"model.head_dim is {self.head_dim}; rotary embedding turns pairs, so it must be "
                "even"
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Layer:
    """One transformer layer; kernels are (in, out), the outputs of query and key in interleaved
    rotary pairs."""

    attention_norm: Float[Array, "*layers embed"]
    query: Float[Array, "*layers embed heads_dim"]
    key: Float[Array, "*layers embed kv_heads_dim"]
    value: Float[Array, "*layers embed kv_heads_dim"]
    output: Float[Array, "*layers heads_dim embed"]
    mlp_norm: Float[Array, "*layers embed"]
    gate: Float[Array, "*layers embed mlp"]
    up: Float[Array, "*layers embed mlp"]
    down: Float[Array, "*layers mlp embed"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class FusedLayer:
    """A layer whose products of the same input are one: query, key and value side by side, and
    gate and up.

    For inference where the `tensor` axis does not cut them: the fewer and larger products are, the
    nearer they come to the speed of memory. Kernels are (out, in), see `multiply`.
    """

    attention_norm: Float[Array, " embed"]
    attention_in: Float[Array, "heads_and_kv_heads_dim embed"] | QuantizedKernel
    output: Float[Array, "embed heads_dim"] | QuantizedKernel
    mlp_norm: Float[Array, " embed"]
    mlp_in: Float[Array, "gate_and_up embed"] | QuantizedKernel
    down: Float[Array, "embed mlp"] | QuantizedKernel


FUSED = {"attention_in": ("query", "key", "value"), "mlp_in": ("gate", "up")}
"""What each fused kernel is made of, in the order of its rows."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Llama:
    """All weights; `head` is None where it is the embedding's transpose. A quantized head is
    (out, in), as every quantized kernel."""

    embedding: Float[Array, "vocab embed"] | QuantizedKernel
    layers: Layer | tuple[Layer | FusedLayer, ...]
    norm: Float[Array, " embed"]
    head: Float[Array, "embed vocab"] | QuantizedKernel | None


def llama_params(config: LlamaConfig, *, stacked: bool) -> Llama:
    """Declares every weight once, as a tree of `ParamSpec`."""
    embed, mlp = config.hidden_size, config.intermediate_size
    heads = config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    start = normal(config.initializer_range)
    norm: Any = ParamSpec((embed,), ("norm",), ones())
    layer: Any = Layer(
        attention_norm=norm,
        query=ParamSpec((embed, heads), ("embed", "heads"), start),  # type: ignore[arg-type]
        key=ParamSpec((embed, kv_heads), ("embed", "kv_heads"), start),  # type: ignore[arg-type]
        value=ParamSpec((embed, kv_heads), ("embed", "kv_heads"), start),  # type: ignore[arg-type]
        output=ParamSpec((heads, embed), ("heads", "embed"), start),  # type: ignore[arg-type]
        mlp_norm=norm,
        gate=ParamSpec((embed, mlp), ("embed", "mlp"), start),  # type: ignore[arg-type]
        up=ParamSpec((embed, mlp), ("embed", "mlp"), start),  # type: ignore[arg-type]
        down=ParamSpec((mlp, embed), ("mlp", "embed"), start),  # type: ignore[arg-type]
    )
    embedding: Any = ParamSpec((config.table_size, embed), ("vocab", "embed"), start)
    head: Any = ParamSpec((embed, config.table_size), ("embed", "vocab"), start)
    return Llama(
        embedding=embedding,
        layers=stack(layer, config.num_layers) if stacked else (layer,) * config.num_layers,
        norm=norm,
        head=None if config.tie_embeddings else head,
    )


def require_mesh(config: LlamaConfig, mesh: Mesh, rules: Rules) -> None:
    """Refuses a mesh that the model's sizes cannot be divided by.

    Raises:
        ConfigError: names the size and the number of parts.
    """
    sizes = {
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "mlp": config.intermediate_size,
        "embed": config.hidden_size,
        "vocab": config.table_size,
    }
    require_divisible(mesh, sizes, rules)


Attend = Callable[[Array, Array, Array, Any], tuple[Array, Any]]
"""(query, key, value, one layer's cache) -> (attention, the cache after it); heads are [batch,
seq, heads, dim]."""


def rms_norm(
    x: Float[Array, "batch seq embed"], scale: Float[Array, " embed"], epsilon: float
) -> Float[Array, "batch seq embed"]:
    """Root mean square normalisation in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * scale.astype(jnp.float32)).astype(x.dtype)


def embed_tokens(
    table: Float[Array, "vocab embed"] | QuantizedKernel,
    tokens: Int[Array, "batch seq"],
    mesh: Mesh | None,
    rules: Rules,
) -> Float[Array, "batch seq embed"]:
    """Looks tokens up. On a mesh each device looks in its own rows, since a plain gather from a
    sharded table would make the compiler assemble the whole of it."""
    if isinstance(table, QuantizedKernel):
        return table.rows(tokens)
    if mesh is None or max(shard_count(mesh, axis, rules) for axis in ("vocab", "embed")) == 1:
        return table[tokens]

    def local(rows: Array, tokens: Array) -> Array:
        index = tokens - jax.lax.axis_index(TENSOR) * rows.shape[0]
        here = (index >= 0) & (index < rows.shape[0])
        found = jnp.where(here[..., None], rows[jnp.where(here, index, 0)], 0)
        return jax.lax.psum(found, TENSOR)

    batch = ("batch", "position")
    return jax.shard_map(
        jax.checkpoint(local),  # or the backward pass would keep a mask as wide as the embedding
        mesh=mesh,
        in_specs=(partition_spec(("vocab", None), rules), partition_spec(batch, rules)),
        out_specs=partition_spec((*batch, None), rules),
        check_vma=False,
    )(table, tokens)


FEW_ROWS = 16
"""Up to so many rows, a CPU multiplies faster with the kernel on the left (docs/log.md)."""


def multiply(
    x: Float[Array, "*rows into"],
    kernel: Float[Array, "out into"] | QuantizedKernel,
    dtype: Any = None,
) -> Float[Array, "*rows out"]:
    """`x @ kernel.T`, in x's own type or the one named.

    XLA's CPU backend packs the right side of a product once for all rows and the left side block
    by block, so a few rows are multiplied as columns of the result's transpose. The barrier keeps
    the compiler from turning the product round again.
    """
    count = math.prod(x.shape[:-1])
    if isinstance(kernel, QuantizedKernel):
        if count <= QUANTIZED_ROWS:
            return multiply_quantized(x.reshape(count, -1), kernel).reshape(*x.shape[:-1], -1)
        kernel = kernel.dequantize()
    if not 1 < count <= FEW_ROWS or jax.default_backend() != "cpu":
        return jnp.einsum("...i,oi->...o", x, kernel, preferred_element_type=dtype)
    rows = x.reshape(count, -1)
    columns = jnp.einsum("oi,ri->or", kernel, rows, preferred_element_type=dtype)
    return jax.lax.optimization_barrier(columns).T.reshape(*x.shape[:-1], -1)


def project(
    layer: Layer | FusedLayer, x: Float[Array, "batch seq embed"], config: LlamaConfig
) -> tuple[Array, Array, Array]:
    """Queries, keys and values of a normalised input, heads not yet split."""
    if isinstance(layer, Layer):
        return x @ layer.query, x @ layer.key, x @ layer.value
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    query, key, value = jnp.split(
        multiply(x, layer.attention_in), [heads, heads + kv_heads], axis=-1
    )
    return query, key, value


def feed_forward(
    layer: Layer | FusedLayer, x: Float[Array, "batch seq embed"], *, block: int, shards: int
) -> Float[Array, "batch seq embed"]:
    """SwiGLU (Shazeer 2020, arXiv 2002.05202), `block` positions of each of `shards` equal parts
    at a time.

    The hidden activation is the widest array of a layer; blocks bound it, and it is computed again
    in the backward pass.
    """

    def apply(x: Array) -> Array:
        if isinstance(layer, Layer):
            return (jax.nn.silu(x @ layer.gate) * (x @ layer.up)) @ layer.down
        gate, up = jnp.split(multiply(x, layer.mlp_in), 2, axis=-1)
        return multiply(jax.nn.silu(gate) * up, layer.down)

    batch, length, embed = x.shape
    if length % shards:  # one part then, which is right wherever it lies
        shards = 1
    part = length // shards
    if part <= block:
        return apply(x)
    count = -(-part // block)
    even = -(-part // count)
    parts = x.reshape(batch, shards, part, embed)
    parts = jnp.pad(parts, ((0, 0), (0, 0), (0, count * even - part), (0, 0)))
    blocks = jnp.moveaxis(parts.reshape(batch, shards, count, even, embed), 2, 0)
    out = jnp.moveaxis(jax.lax.map(jax.checkpoint(apply), blocks), 0, 2)
    out = out.reshape(batch, shards, count * even, embed)[:, :, :part]
    return out.reshape(batch, length, embed)


def apply_layer(
    layer: Layer | FusedLayer,
    x: Float[Array, "batch seq embed"],
    angles: RotaryAngles,
    cache: Any,
    config: LlamaConfig,
    attend: Attend,
    *,
    mesh: Mesh | None,
    rules: Rules,
    mlp_block: int = 1024,
) -> tuple[Float[Array, "batch seq embed"], Any]:
    """One layer: attention and feed-forward network, each on the normalised input and added to it.

    Args:
        angles: rotary angles of the tokens' positions, which need not be in order.
        attend: attention to this layer's keys and values, and to what `cache` holds of earlier
            ones.
        mlp_block: positions of a device's part that pass the feed-forward network at a time.
    """

    def split(x: Array, heads: int, axis: str) -> Array:
        x = x.reshape(*x.shape[:2], heads, config.head_dim)
        return constrain(x, mesh, ("batch", "position", axis, None), rules)

    normed = rms_norm(x, layer.attention_norm, config.rms_norm_eps)
    query, key, value = project(layer, normed, config)
    query = apply_rotary(split(query, config.num_heads, "heads"), angles)
    key = apply_rotary(split(key, config.num_kv_heads, "kv_heads"), angles)
    mixed, cache = attend(query, key, split(value, config.num_kv_heads, "kv_heads"), cache)
    mixed = mixed.reshape(*x.shape[:2], -1)
    x = x + (mixed @ layer.output if isinstance(layer, Layer) else multiply(mixed, layer.output))
    normed = rms_norm(x, layer.mlp_norm, config.rms_norm_eps)
    shards = 1 if mesh is None else shard_count(mesh, "position", rules)
    x = x + feed_forward(layer, normed, block=mlp_block, shards=shards)
    return constrain(x, mesh, ("batch", "position", "activation"), rules), cache


def hidden_states(
    weights: Llama,
    tokens: Int[Array, "batch seq"],
    positions: Int[Array, "batch seq"],
    config: LlamaConfig,
    attend: Attend,
    *,
    prepare: Callable[[Any], Layer] = lambda layer: layer,
    remat: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda layer: layer,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: Rules,
) -> Float[Array, "batch seq embed"]:
    """The last layer's output, normalised, without a cache.

    Args:
        prepare: makes of one stacked layer as it is kept the layer that computes: another type,
            gathered from its shards, adapters added.
        remat: what the backward pass computes again, as `jax.checkpoint` does; for stacked layers.
        dtype: of the activations; the embedding's unless given.
    """
    angles = rotary_angles(positions, config.head_dim, config.rope_theta)
    apply = partial(apply_layer, config=config, attend=attend, mesh=mesh, rules=rules)
    x = embed_tokens(weights.embedding, tokens, mesh, rules)
    x = x if dtype is None else x.astype(dtype)
    x = constrain(x, mesh, ("batch", "position", "activation"), rules)
    if isinstance(weights.layers, tuple):
        traced_once = jax.jit(apply)
        for layer in weights.layers:
            x, _ = traced_once(layer, x, angles, None)
    else:
        one = remat(lambda layer, x, angles: apply(prepare(layer), x, angles, None)[0])
        x, _ = jax.lax.scan(lambda x, layer: (one(layer, x, angles), None), x, weights.layers)
    return rms_norm(x, weights.norm, config.rms_norm_eps)


def dequantized(weights: Llama) -> Llama:
    """Return the weights with every quantized kernel as float32.

    Products of many rows are faster so.
    """
    dequantize = jax.jit(QuantizedKernel.dequantize)
    dense = jax.tree.map(
        lambda x: dequantize(x) if isinstance(x, QuantizedKernel) else x,
        weights,
        is_leaf=lambda x: isinstance(x, QuantizedKernel),
    )
    return (
        replace(dense, head=dense.head.T) if isinstance(weights.head, QuantizedKernel) else dense
    )


def text_logits(
    weights: Llama, hidden: Float[Array, "batch seq embed"]
) -> Float[Array, "batch seq vocab"]:
    """Scores of the next token, float32."""
    if weights.head is None or isinstance(weights.head, QuantizedKernel):
        head = weights.embedding if weights.head is None else weights.head
        return multiply(hidden, head, dtype=jnp.float32)
    return jnp.einsum("bse,ev->bsv", hidden, weights.head, preferred_element_type=jnp.float32)
