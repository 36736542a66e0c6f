"""One step of training: loss, gradients over microbatches, update.

Everything here is pure and compiled; the loop around it reads batches and writes checkpoints.
Knows models and losses; knows no files.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from lwm.attention.api import AttentionConfig, attention
from lwm.attention.mask import Side
from lwm.attention.strategies import CHECKPOINT_NAME
from lwm.core.errors import ConfigError
from lwm.core.params import cast
from lwm.core.sharding import TRAINING, constrain
from lwm.models.forward import hidden_states
from lwm.models.llama import Layer, Llama, LlamaConfig, llama_params
from lwm.models.lora import AdaptedLayer, LoraConfig, merge_adapters
from lwm.training.loss import LossSums, cross_entropy


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How a step is computed; what it computes is the same for every setting."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and products; weights are kept in float32."""
    remat: Literal["none", "attention", "full"] = "attention"
    """What a layer keeps for the backward pass: all, the output of attention, or its input
    alone."""
    loss_chunk: int = 1024
    """Positions of a device whose logits exist at a time."""
    attention: AttentionConfig = AttentionConfig()
    """Blocks of attention, and its strategy over the sequence axis."""

    def __post_init__(self) -> None:
        if self.loss_chunk < 1:
            raise ConfigError(
                f"compute.loss_chunk is {self.loss_chunk}; it must be at least 1 position"
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of token ids, in any order of positions; weights are those of the targets."""

    tokens: Int[Array, "*micro rows seq"]
    targets: Int[Array, "*micro rows seq"]
    weights: Float[Array, "*micro rows seq"]
    positions: Int[Array, "*micro rows seq"]
    segments: Int[Array, "*micro rows seq"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What learning changes.

    Args:
        weights: float32: the model's, layers stacked, or its adapters.
        optimizer: the optimizer's state.
        step: batches seen.
    """

    weights: Any
    optimizer: Any
    step: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KindMetrics:
    """Figures of the targets of one kind, text or vision, float32 scalars.

    Args:
        loss: mean over targets, nats, each scored against its own kind alone.
    """

    loss: Float[Array, ""]
    accuracy: Float[Array, ""]
    targets: Float[Array, ""]

    @classmethod
    def of(cls, nll: Any, correct: Any, targets: Any) -> "KindMetrics":
        """Means of sums; nothing where there are no targets."""
        count = jnp.maximum(targets, 1.0)
        return cls(loss=nll / count, accuracy=correct / count, targets=targets)


def by_kind(sums: LossSums) -> dict[str, KindMetrics]:
    """Figures of `text` and `vision` apart; none where the model has text alone."""
    if (seen := sums.vision) is None:
        return {}
    return {
        "text": KindMetrics.of(
            sums.nll - seen.nll, sums.correct - seen.correct, sums.targets - seen.targets
        ),
        "vision": KindMetrics.of(seen.nll, seen.correct, seen.targets),
    }


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Figures of one step, float32 scalars.

    Args:
        loss: what was minimised, nats.
        nll: mean over targets, nats.
        accuracy: share of targets that were the likeliest token.
        tokens: positions that were not padding.
        skipped: 1 where loss or gradient was not finite and nothing was learned.
        text, vision: the kinds apart, where the model sees.
    """

    loss: Float[Array, ""]
    nll: Float[Array, ""]
    accuracy: Float[Array, ""]
    targets: Float[Array, ""]
    tokens: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    weight_norm: Float[Array, ""]
    skipped: Float[Array, ""]
    text: KindMetrics | None = None
    vision: KindMetrics | None = None


Trained = Callable[[Any, Any], Llama]
"""(trained weights, frozen weights) -> the model's weights as `sums_of` takes them."""


def whole_model(weights: Llama, frozen: None) -> Llama:
    return weights


def adapted_model(adapters: Any, frozen: Llama) -> Llama:
    layers: Any = AdaptedLayer(layer=frozen.layers, adapters=adapters)  # type: ignore[arg-type]
    return replace(frozen, layers=layers)


def _remat(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    match name:
        case "none":
            return lambda layer: layer
        case "full":
            return jax.checkpoint
        case _:
            policy = jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME)
            return partial(jax.checkpoint, policy=policy)


def sums_of(
    weights: Llama,
    batch: Batch,
    *,
    config: LlamaConfig,
    compute: ComputeConfig,
    lora: LoraConfig,
    mesh: Mesh | None,
) -> LossSums:
    """Loss of one batch [rows, seq]."""
    dtype = cast(compute.dtype)
    side = Side(positions=batch.positions, segments=batch.segments)
    layer_specs: Any = llama_params(config, stacked=False).layers[0]  # type: ignore[index]

    def prepare(layer: Any) -> Layer:
        """Gathers one layer from its `fsdp` shards, in the type it computes in."""
        if isinstance(layer, AdaptedLayer):
            layer = merge_adapters(layer.layer, layer.adapters, lora.scale)
        return jax.tree.map(
            lambda spec, kernel: constrain(kernel.astype(dtype), mesh, spec.axes, _GATHERED),
            layer_specs,
            layer,
        )

    def attend(query: Array, key: Array, value: Array, cache: None) -> tuple[Array, None]:
        mixed = attention(query, key, value, side, side, config=compute.attention, mesh=mesh)
        return mixed, None

    hidden = hidden_states(
        weights,
        batch.tokens,
        batch.positions,
        config,
        attend,
        prepare=prepare,
        remat=_remat(compute.remat),
        dtype=dtype,
        mesh=mesh,
        rules=TRAINING,
    )
    embedding: Any = weights.embedding  # no codes: those are for inference alone
    head: Any = embedding.T if weights.head is None else weights.head
    return cross_entropy(
        hidden,
        head,
        batch.targets,
        batch.weights,
        chunk=compute.loss_chunk,
        mesh=mesh,
        text_vocab=config.vocab_size if config.vision else None,
    )


_GATHERED = {**TRAINING, "embed": None}
"""Where a layer's weights are while it computes."""


def train_step(
    state: TrainState,
    frozen: Any,
    batch: Batch,
    *,
    optimizer: optax.GradientTransformation,
    model: Trained,
    sums: Callable[[Llama, Batch], LossSums],
) -> tuple[TrainState, StepMetrics]:
    """Learns from one batch [micro, rows, seq].

    The loss is one mean over all microbatches, so cutting a batch changes nothing but memory. A
    loss or gradient that is not finite leaves weights and optimizer as they were.

    Args:
        frozen: weights that are used and not changed.
    """

    def loss(weights: Any, batch: Batch) -> tuple[Array, LossSums]:
        found = sums(model(weights, frozen), batch)
        return found.loss, found

    gradient_of = jax.grad(loss, has_aux=True)

    def micro(carry: Any, batch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, gradient_of(state.weights, batch)), None

    first = jax.tree.map(lambda x: x[0], batch)
    if batch.tokens.shape[0] == 1:
        gradient, found = gradient_of(state.weights, first)
    else:
        shapes = jax.eval_shape(gradient_of, state.weights, first)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (gradient, found), _ = jax.lax.scan(micro, zero, batch)
    # A batch without any target teaches nothing; 0 / 0 must not look like a broken model.
    share = 1.0 / jnp.maximum(found.weight, 1e-8)
    gradient = jax.tree.map(lambda x: x * share, gradient)
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(found.loss) & jnp.isfinite(norm)
    change, memory = optimizer.update(gradient, state.optimizer, state.weights)
    learned = optax.apply_updates(state.weights, change)
    weights, memory = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (learned, memory),
        (state.weights, state.optimizer),
    )
    targets = jnp.maximum(found.targets, 1.0)
    metrics = StepMetrics(
        loss=found.loss * share,
        nll=found.nll / targets,
        accuracy=found.correct / targets,
        targets=found.targets,
        tokens=(batch.segments >= 0).sum(dtype=jnp.float32),
        gradient_norm=norm,
        weight_norm=optax.tree.norm(weights),
        skipped=1.0 - finite,
        **by_kind(found),
    )
    return TrainState(weights=weights, optimizer=memory, step=state.step + 1), metrics
