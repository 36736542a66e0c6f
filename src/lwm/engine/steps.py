"""The steps that the engine compiles: a layer's quantized kernels dequantized, a chunk through one
layer, the next tokens through a run of layers, and the draw of what follows them.

Pure functions of weights, caches and settings; which request is in which slot is the engine's
affair.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from lwm.attention.cached import LayerCache, decode_attention, prefill_attention
from lwm.attention.rope import Rotation, rotation
from lwm.core.sharding import DECODE, PREFILL
from lwm.engine.sampling import Sampled, SlotSampling, sample
from lwm.models.cache import Cache
from lwm.models.llama import (
    FusedLayer,
    Layer,
    Llama,
    LlamaConfig,
    apply_layer,
    embed_tokens,
    rms_norm,
    text_logits,
)
from lwm.models.quantized import QuantizedKernel


def dequantize_kernels(
    kernels: dict[str, QuantizedKernel], buffers: dict[str, Array]
) -> dict[str, Float[Array, "out into"]]:
    """Dequantize the kernels of a layer into the buffers of another layer's."""
    return {name: kernel.dequantize() for name, kernel in kernels.items()}


def prefill_layer(
    layer: Layer | FusedLayer,
    x: Array,
    turn: Rotation,
    cache: LayerCache,
    slot: Array,
    first: Array,
    *,
    config: LlamaConfig,
    mesh: Mesh | None,
) -> tuple[Array, LayerCache]:
    """Runs a chunk [1, size], laid out in the mesh's striped order, through one layer, which keeps
    its keys and values."""
    attend = partial(prefill_attention, slot=slot, first=first, mesh=mesh)
    return apply_layer(layer, x, turn, cache, config, attend, mesh=mesh, rules=PREFILL)


def prefill_last_layer(*arguments: Any, config: LlamaConfig, mesh: Mesh | None) -> LayerCache:
    """The same through the last layer, of which a chunk needs no more than keys and values: what
    follows a prompt is drawn from its last token, and that one is decoded. Attention and whatever
    comes behind it have no reader then, so the compiler drops them."""
    return prefill_layer(*arguments, config=config, mesh=mesh)[1]


def decode_layers(
    layers: Sequence[Layer | FusedLayer],
    x: Array,
    turn: Rotation,
    caches: Cache,
    positions: Array,
    *,
    config: LlamaConfig,
    mesh: Mesh | None,
) -> tuple[Array, Cache]:
    """Runs the next tokens of every slot, [slots, width], through a run of layers, which keep
    their keys and values. A position of -1 holds no token."""
    attend = partial(decode_attention, positions=positions, mesh=mesh)
    apply = partial(apply_layer, config=config, attend=attend, mesh=mesh, rules=DECODE)
    traced_once, after = jax.jit(apply), []
    for layer, cache in zip(layers, caches, strict=True):
        x, cache = traced_once(layer, x, turn, cache)
        after.append(cache)
    return x, tuple(after)


def draw(
    weights: Llama,
    x: Array,
    seen: Array,
    tokens: Array,
    positions: Array,
    how: SlotSampling,
    *,
    config: LlamaConfig,
    mesh: Mesh | None,
) -> tuple[Sampled, Array]:
    """Samples behind every token that was fed, [slots, width], from what the last layer made of
    it. Needs no layers.

    A row is drawn as it would be had the tokens before it come one a step: from the same position
    and with the same tokens seen. Returns with it the tokens of each slot's text, those drafts
    included that were drawn themselves.
    """
    slots, width = tokens.shape
    hidden = rms_norm(x, weights.norm, config.rms_norm_eps)
    logits = text_logits(weights, hidden).reshape(slots * width, -1)
    if mesh is not None:  # the vocabulary may be sharded, and sorting wants it whole
        whole = NamedSharding(mesh, PartitionSpec())
        logits = jax.lax.with_sharding_constraint(logits, whole)
    fed = jnp.where(positions >= 0, tokens, seen.shape[1])
    slot = jnp.arange(slots)
    after = []  # what has been seen behind the first token, the second, ...
    for column in range(width):
        seen = seen.at[slot, fed[:, column]].set(True, mode="drop")
        after.append(seen)
    rows = jax.tree.map(lambda x: jnp.repeat(x, width, axis=0), how)
    partner = (how.conditional, how.unconditional)
    conditional, unconditional = (
        (other[:, None] * width + jnp.arange(width)).reshape(-1) for other in partner
    )
    rows = replace(rows, conditional=conditional, unconditional=unconditional)
    step = (positions + 1).reshape(-1)
    sampled = sample(logits, jnp.stack(after, axis=1).reshape(slots * width, -1), step, rows)
    sampled = jax.tree.map(lambda x: x.reshape(slots, width, *x.shape[1:]), sampled)
    true = (sampled.tokens[:, :-1] == tokens[:, 1:]) & (positions[:, 1:] >= 0)
    accepted = jnp.cumprod(true, axis=1).sum(axis=1)
    return sampled, jnp.stack(after, axis=1)[slot, accepted]


def mark_seen(seen: Array, slot: Array, row: Array) -> Array:
    return seen.at[slot].set(row)


class Steps(NamedTuple):
    """The steps compiled: each once for every shape of what it is given."""

    embed: Any
    turn: Any
    dequantize: Any
    prefill: Any
    prefill_last: Any
    embed_next: Any
    decode: Any
    draw: Any
    mark_seen: Any

    def dequantized_layers(
        self, layers: Sequence[Layer | FusedLayer]
    ) -> Iterator[Layer | FusedLayer]:
        """Yield layers for products of many rows, their quantized kernels as float32.

        Each reuses the buffers of the layer before: fresh memory costs more than the dequantizing.
        """
        held: dict[str, Array] = {}
        for layer in layers:
            kernels = {
                field.name: kernel
                for field in fields(layer)
                if isinstance(kernel := getattr(layer, field.name), QuantizedKernel)
            }
            if kernels:
                given = {name: held.pop(name) for name in kernels if name in held}
                held |= self.dequantize(kernels, given)
            yield replace(layer, **{name: held[name] for name in kernels})


@lru_cache(maxsize=8)
def compile_steps(config: LlamaConfig, mesh: Mesh | None) -> Steps:
    """The same for all engines of a configuration and a mesh, so that another engine, with more
    slots or a longer cache, compiles what is new to it and no more."""
    static = {"config": config, "mesh": mesh}
    # What every device needs, and what every process reads, is whole everywhere.
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    turn = partial(rotation, head_dim=config.head_dim, theta=config.rope_theta)
    return Steps(
        embed=jax.jit(partial(embed_tokens, mesh=mesh, rules=PREFILL)),
        turn=jax.jit(turn, out_shardings=whole),
        # Kept though no number of it is read: jit would drop the argument, and with it, silently,
        # the giving away of its buffers.
        dequantize=jax.jit(dequantize_kernels, donate_argnums=1, keep_unused=True),
        prefill=jax.jit(partial(prefill_layer, **static), donate_argnums=(1, 3)),
        prefill_last=jax.jit(partial(prefill_last_layer, **static), donate_argnums=3),
        embed_next=jax.jit(partial(embed_tokens, mesh=mesh, rules=DECODE)),
        decode=jax.jit(partial(decode_layers, **static), donate_argnums=(1, 3)),
        draw=jax.jit(partial(draw, **static), donate_argnums=2, out_shardings=whole),
        mark_seen=jax.jit(mark_seen, donate_argnums=0),
    )
