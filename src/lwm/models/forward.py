"""Compute with a Llama: one forward pass for training, scoring, prefill and decode."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from lwm.attention.rope import RotaryAngles, apply_rotary, rotary_angles
from lwm.core.hardware import traits
from lwm.core.mesh import TENSOR
from lwm.core.sharding import Rules, constrain, partition_spec, shard_count
from lwm.models.llama import FUSED, FusedLayer, Layer, Llama, LlamaConfig
from lwm.models.quantized import QUANTIZED_ROWS, QuantizedKernel, multiply_quantized

_Hidden = Float[Array, "batch seq embed"]
_Tokens = Int[Array, "batch seq"]

MLP_BLOCK = 1024  # positions of a device that pass the feed-forward network at a time

Attend = Callable[[Array, Array, Array, Any], tuple[Array, Any]]
"""Function from query, key, value [batch, seq, heads, dim] and a layer's cache to the attention
and the new cache."""


def hidden_states(
    weights: Llama,
    tokens: _Tokens,
    positions: _Tokens,
    config: LlamaConfig,
    attend: Attend,
    *,
    prepare: Callable[[Any], Layer] = lambda layer: layer,
    remat: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda layer: layer,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: Rules,
) -> _Hidden:
    """Return the normalized output of the last layer, without a cache.

    Args:
        prepare: function from a stored stacked layer to the layer that computes.
        remat: wrapper like `jax.checkpoint`, for stacked layers.
        dtype: of the activations; defaults to the embedding's.
    """
    angles = rotary_angles(positions, config.head_dim, config.rope_theta, config.rope_scaling)
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


def text_logits(weights: Llama, hidden: _Hidden) -> Float[Array, "batch seq vocab"]:
    """Return the logits of the next token, float32."""
    if weights.head is None or isinstance(weights.head, QuantizedKernel):
        head = weights.embedding if weights.head is None else weights.head
        return multiply(hidden, head, dtype=jnp.float32)
    return jnp.einsum("bse,ev->bsv", hidden, weights.head, preferred_element_type=jnp.float32)


def embed_tokens(
    table: Float[Array, "vocab embed"] | QuantizedKernel,
    tokens: _Tokens,
    mesh: Mesh | None,
    rules: Rules,
) -> _Hidden:
    """Look tokens up in the embedding."""
    if isinstance(table, QuantizedKernel):
        return table.rows(tokens)
    if mesh is None or max(shard_count(mesh, axis, rules) for axis in ("vocab", "embed")) == 1:
        return table[tokens]

    # For a plain look-up in a sharded table the compiler would gather the whole table.
    def local(rows: Array, tokens: Array) -> Array:
        index = tokens - jax.lax.axis_index(TENSOR) * rows.shape[0]
        here = (index >= 0) & (index < rows.shape[0])
        embedded = jnp.where(here[..., None], rows[jnp.where(here, index, 0)], 0)
        return jax.lax.psum(embedded, TENSOR)

    batch = ("batch", "position")
    return jax.shard_map(
        # Without the checkpoint the backward pass would save a mask of the embedding's size.
        jax.checkpoint(local),
        mesh=mesh,
        in_specs=(partition_spec(("vocab", None), rules), partition_spec(batch, rules)),
        out_specs=partition_spec((*batch, None), rules),
        check_vma=False,
    )(table, tokens)


def apply_layer(
    layer: Layer | FusedLayer,
    x: _Hidden,
    angles: RotaryAngles,
    cache: Any,
    config: LlamaConfig,
    attend: Attend,
    *,
    mesh: Mesh | None,
    rules: Rules,
) -> tuple[_Hidden, Any]:
    """Apply one layer: add attention, then the feed-forward network, of the normalized input."""

    def split(x: Array, heads: int, axis: str) -> Array:
        x = x.reshape(*x.shape[:2], heads, config.head_dim)
        return constrain(x, mesh, ("batch", "position", axis, None), rules)

    shards = 1 if mesh is None else shard_count(mesh, "position", rules)
    normed = rms_norm(x, layer.attention_norm, config.rms_norm_eps)
    query, key, value = _project(layer, normed, config, shards)
    query = apply_rotary(split(query, config.num_heads, "heads"), angles)
    key = apply_rotary(split(key, config.num_kv_heads, "kv_heads"), angles)
    mixed, cache = attend(query, key, split(value, config.num_kv_heads, "kv_heads"), cache)
    mixed = mixed.reshape(*x.shape[:2], -1)
    x = x + _linear(layer, "output", mixed, shards)
    normed = rms_norm(x, layer.mlp_norm, config.rms_norm_eps)
    x = x + feed_forward(layer, normed, block=MLP_BLOCK, shards=shards)
    return constrain(x, mesh, ("batch", "position", "activation"), rules), cache


def rms_norm(x: _Hidden, scale: Float[Array, " embed"], epsilon: float) -> _Hidden:
    """Normalize by the root mean square, in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    normed = x.astype(jnp.float32)
    normed *= jax.lax.rsqrt(jnp.mean(normed * normed, axis=-1, keepdims=True) + epsilon)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def _project(
    layer: Layer | FusedLayer, x: _Hidden, config: LlamaConfig, shards: int
) -> tuple[Array, ...]:
    """Return queries, keys and values of a normalized input, heads not yet split."""
    if isinstance(layer, Layer):
        return tuple(_linear(layer, name, x, shards) for name in FUSED["attention_in"])
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    fused = _linear(layer, "attention_in", x, shards)
    return tuple(jnp.split(fused, [heads, heads + kv_heads], axis=-1))


def _linear(layer: Layer | FusedLayer, name: str, x: Array, shards: int) -> Array:
    """Multiply by a kernel of a layer, and add its bias if there is one.

    Rows of all texts are multiplied as one matrix unless positions are sharded: for the gradient
    of a kernel, XLA's CPU backend would otherwise transpose both operands.
    """
    kernel, bias = getattr(layer, name), layer.biases.get(name)
    if not isinstance(layer, Layer):
        out = multiply(x, kernel)
    elif shards == 1:
        out = (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)
    else:
        out = x @ kernel
    return out if bias is None else out + bias


def feed_forward(layer: Layer | FusedLayer, x: _Hidden, *, block: int, shards: int) -> _Hidden:
    """Apply SwiGLU (Shazeer 2020, arXiv 2002.05202) to `block` positions of each shard at a time.

    Blocks bound the size of the hidden activation, a layer's widest array, which the backward pass
    recomputes.
    """

    def apply(x: Array) -> Array:
        if isinstance(layer, Layer):
            gate, up = (_linear(layer, name, x, shards) for name in FUSED["mlp_in"])
        else:
            gate, up = jnp.split(_linear(layer, "mlp_in", x, shards), 2, axis=-1)
        return _linear(layer, "down", jax.nn.silu(gate) * up, shards)

    batch, length, embed = x.shape
    shards = 1 if length % shards else shards  # one part is correct for any sharding
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


def multiply(
    x: Float[Array, "*rows into"],
    kernel: Float[Array, "out into"] | QuantizedKernel,
    dtype: Any = None,
) -> Float[Array, "*rows out"]:
    """Compute `x @ kernel.T`, in x's own type or in `dtype`.

    XLA's CPU backend packs the right operand of a product once and the left one block by block, so
    a few rows are multiplied as columns. The barrier keeps the product from being transposed back.
    """
    count = math.prod(x.shape[:-1])
    if isinstance(kernel, QuantizedKernel):
        if count <= QUANTIZED_ROWS:
            return multiply_quantized(x.reshape(count, -1), kernel).reshape(*x.shape[:-1], -1)
        kernel = kernel.dequantize()
    if not 1 < count <= traits().transposed_rows:
        return jnp.einsum("...i,oi->...o", x, kernel, preferred_element_type=dtype)
    rows = x.reshape(count, -1)
    columns = jnp.einsum("oi,ri->or", kernel, rows, preferred_element_type=dtype)
    return jax.lax.optimization_barrier(columns).T.reshape(*x.shape[:-1], -1)


def dequantized(weights: Llama) -> Llama:
    """Return the weights with quantized kernels as float32, and the head as (in, out)."""
    dequantize = jax.jit(QuantizedKernel.dequantize)

    def is_quantized(x: Any) -> bool:
        return isinstance(x, QuantizedKernel)

    dense = jax.tree.map(
        lambda x: dequantize(x) if is_quantized(x) else x, weights, is_leaf=is_quantized
    )
    return replace(dense, head=dense.head.T) if is_quantized(weights.head) else dense
