"""Define and compile the steps of the engine, pure functions of weights, caches and settings."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from lwm.attention.cached import CACHE_AXES, LayerCache, decode_attention, prefill_attention
from lwm.attention.rope import RotaryAngles, rotary_angles
from lwm.core.hardware import precise
from lwm.core.sharding import DECODE, PREFILL, constrain
from lwm.engine.sampling import History, Sampled, SlotSampling, sample
from lwm.models.cache import Cache
from lwm.models.forward import apply_layer, embed_tokens, rms_norm, text_logits
from lwm.models.llama import FusedLayer, Layer, Llama, LlamaConfig
from lwm.models.quantized import QuantizedKernel


def _dequantize_kernels(
    kernels: dict[str, QuantizedKernel], buffers: dict[str, Array]
) -> dict[str, Float[Array, "out into"]]:
    """Dequantize a layer's kernels to float32, into the donated buffers of another layer's."""
    return {name: kernel.dequantize() for name, kernel in kernels.items()}


def _prefill_layer(
    layer: Layer | FusedLayer,
    x: Float[Array, "1 size embed"],
    angles: RotaryAngles,
    cache: LayerCache,
    slot: Array,
    first: Array,
    *,
    config: LlamaConfig,
    mesh: Mesh | None,
) -> tuple[Float[Array, "1 size embed"], LayerCache]:
    """Run a chunk, laid out in the mesh's striped order, through one layer."""
    attend = partial(prefill_attention, slot=slot, first=first, mesh=mesh)
    return apply_layer(layer, x, angles, cache, config, attend, mesh=mesh, rules=PREFILL)


def _prefill_last_layer(*arguments: Any, config: LlamaConfig, mesh: Mesh | None) -> LayerCache:
    """Run a chunk through the last layer, of which only keys and values are needed.

    Nothing reads the output of attention and what follows it, so the compiler drops them.
    """
    return _prefill_layer(*arguments, config=config, mesh=mesh)[1]


def _decode_layers(
    layers: Sequence[Layer | FusedLayer],
    x: Float[Array, "slots width embed"],
    angles: RotaryAngles,
    caches: Cache,
    positions: Int[Array, "slots width"],
    first_slot: Int[Array, ""] | int = 0,
    *,
    config: LlamaConfig,
    mesh: Mesh | None,
) -> tuple[Float[Array, "slots width embed"], Cache]:
    """Run the next tokens of every slot through layers; positions are -1 where there is none."""
    attend = partial(decode_attention, positions=positions, mesh=mesh, first_slot=first_slot)
    apply = partial(apply_layer, config=config, attend=attend, mesh=mesh, rules=DECODE)
    traced_once, results = jax.jit(apply), []
    for layer, cache in zip(layers, caches, strict=True):
        x, cache = traced_once(layer, x, angles, cache)
        results.append(cache)
    return x, tuple(results)


def _sample_tokens(
    weights: Llama,
    x: Float[Array, "slots width embed"],
    history: History,
    tokens: Int[Array, "slots width"],
    positions: Int[Array, "slots width"],
    settings: SlotSampling,
    *,
    config: LlamaConfig,
    mesh: Mesh | None,
) -> tuple[Sampled, History]:
    """Sample after each token of a step, as if the tokens before it had come one per step.

    Returns also the history after the step, up to the first wrong draft. Requests whose answers
    are counted are not drafted, so only the first token of a step counts.
    """
    slots, width = tokens.shape
    hidden = rms_norm(x, weights.norm, config.rms_norm_eps)
    logits = text_logits(weights, hidden).reshape(slots * width, -1)
    if mesh is not None:  # the vocabulary may be sharded, and sorting needs it whole
        whole = NamedSharding(mesh, PartitionSpec())
        logits = jax.lax.with_sharding_constraint(logits, whole)
    present, answered = history.present, history.answered
    ids = jnp.where(positions >= 0, tokens, present.shape[1])
    slot = jnp.arange(slots)
    counted = jnp.where(positions[:, 0] >= settings.answer, ids[:, 0], present.shape[1])
    answered = answered.at[slot, counted].add(1, mode="drop")
    after = []  # the ids present after the first token, after the second, ...
    for column in range(width):
        present = present.at[slot, ids[:, column]].set(True, mode="drop")
        after.append(present)
    rows = jax.tree.map(lambda x: jnp.repeat(x, width, axis=0), settings)
    conditional, unconditional = (
        (partner[:, None] * width + jnp.arange(width)).reshape(-1)
        for partner in (settings.conditional, settings.unconditional)
    )
    rows = replace(rows, conditional=conditional, unconditional=unconditional)
    step = (positions + 1).reshape(-1)
    seen = jnp.stack(after, axis=1)
    histories = History(present=seen.reshape(slots * width, -1), answered=answered)
    sampled = sample(logits, histories, step, rows)
    sampled = jax.tree.map(lambda x: x.reshape(slots, width, *x.shape[1:]), sampled)
    right = (sampled.tokens[:, :-1] == tokens[:, 1:]) & (positions[:, 1:] >= 0)
    accepted = jnp.cumprod(right, axis=1).sum(axis=1)
    return sampled, History(present=seen[slot, accepted], answered=answered)


def _sample_alone(
    weights: Llama, x: Array, history: History, tokens: Array, positions: Array,
    settings: SlotSampling, slot: Array, *, config: LlamaConfig,
) -> tuple[Sampled, History]:  # fmt: skip
    """Sample for one slot, the only one of its step."""
    row = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1), history)
    sampled, row = _sample_tokens(
        weights, x, row, tokens, positions, settings, config=config, mesh=None
    )

    def put(x: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(x, new, slot, axis=0)

    return sampled, jax.tree.map(put, history, row)


def _set_history(history: History, slot: Array, row: History) -> History:
    return jax.tree.map(lambda x, new: x.at[slot].set(new), history, row)


def _copy_slot(
    cache: LayerCache, source: Array, destination: Array, *, mesh: Mesh | None
) -> LayerCache:
    """Copy one slot's keys and values to another; the whole row, since its places are striped."""
    axes: Any = CACHE_AXES

    def copied(x: Array, axes: Sequence[str | None]) -> Array:
        return constrain(x.at[destination].set(x[source]), mesh, axes, DECODE)

    return LayerCache(copied(cache.keys, axes.keys), copied(cache.values, axes.values))


class Steps:
    """Hold the compiled steps; each compiles once for every shape of its arguments."""

    def __init__(self, config: LlamaConfig, mesh: Mesh | None, dtype: Any) -> None:
        static = {"config": config, "mesh": mesh}
        # Arrays that every device needs, or that every process reads, are not sharded.
        whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())

        def jit(function: Callable[..., Any], **options: Any) -> Any:
            return jax.jit(precise(function, dtype), **options)

        angles = partial(
            rotary_angles, head_dim=config.head_dim, theta=config.rope_theta,
            scaling=config.rope_scaling,
        )  # fmt: skip
        sample_tokens = partial(_sample_tokens, **static)
        self.embed = jit(partial(embed_tokens, mesh=mesh, rules=PREFILL))
        self.embed_next = jit(partial(embed_tokens, mesh=mesh, rules=DECODE))
        self.angles = jit(angles, out_shardings=whole)
        # The donated buffers are kept though nothing reads them: jit would drop the argument, and
        # with it, silently, the donation.
        self.dequantize = jit(_dequantize_kernels, donate_argnums=1, keep_unused=True)
        self.prefill = jit(partial(_prefill_layer, **static), donate_argnums=(1, 3))
        self.prefill_last = jit(partial(_prefill_last_layer, **static), donate_argnums=3)
        self.decode = jit(partial(_decode_layers, **static), donate_argnums=(1, 3))
        self.sample = jit(sample_tokens, donate_argnums=2, out_shardings=whole)
        self.sample_alone = jit(partial(_sample_alone, config=config), donate_argnums=2)
        self.copy_slot = jit(partial(_copy_slot, mesh=mesh), donate_argnums=0)
        self.set_history = jit(_set_history, donate_argnums=0)

    def dequantized_layers(
        self, layers: Sequence[Layer | FusedLayer]
    ) -> Iterator[Layer | FusedLayer]:
        """Iterate over layers with dequantized kernels, for products of many rows.

        Each layer reuses the buffers of the one before: fresh memory costs more than dequantizing.
        """
        buffers: dict[str, Array] = {}
        for layer in layers:
            kernels = {
                field.name: kernel
                for field in fields(layer)
                if isinstance(kernel := getattr(layer, field.name), QuantizedKernel)
            }
            if kernels:
                donated = {name: buffers.pop(name) for name in kernels if name in buffers}
                buffers |= self.dequantize(kernels, donated)
            yield replace(layer, **{name: buffers[name] for name in kernels})


# Engines of the same configuration, mesh and type of weights share their steps, so another engine,
# with more slots or a longer cache, compiles only what is new to it.
compile_steps = lru_cache(maxsize=8)(Steps)
