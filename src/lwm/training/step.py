"""Compute one training step: loss, gradients over microbatches, and the update.

Everything here is pure and is compiled by `training.text`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax
from annotated_types import Ge
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from lwm.attention.api import AttentionConfig, attention
from lwm.attention.mask import Side
from lwm.attention.strategies import CHECKPOINT_NAME
from lwm.core.config import Checked
from lwm.core.params import cast
from lwm.core.sharding import TRAINING, constrain
from lwm.models.forward import hidden_states
from lwm.models.llama import Layer, Llama, LlamaConfig, llama_params
from lwm.models.lora import AdaptedLayer, LoraConfig, merge_adapters
from lwm.training.loss import LossSums, cross_entropy


@dataclass(frozen=True, kw_only=True)
class ComputeConfig(Checked, section="compute"):
    """Set how a step is computed; its result is the same for every setting but rounding."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and products; weights are kept in float32."""
    remat: Literal["none", "attention", "full"] = "attention"
    """What each layer keeps for the backward pass: every activation (none), the output of
    attention, or only the layer's input (full)."""
    loss_chunk: Annotated[int, Ge(1)] = 1024
    """Positions per device whose logits exist at a time."""
    attention: AttentionConfig = AttentionConfig()
    """Block sizes of attention, and its strategy over the sequence axis."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Batch:
    """Hold rows of token ids, their positions in any order, and the loss weights of the targets.

    Positions start at 0 in each segment; segment -1 is padding.
    """

    tokens: Int[Array, "*micro rows seq"]
    targets: Int[Array, "*micro rows seq"]
    weights: Float[Array, "*micro rows seq"]
    positions: Int[Array, "*micro rows seq"]
    segments: Int[Array, "*micro rows seq"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Hold what a step changes.

    Args:
        weights: the float32 weights of the model, layers stacked, or of its adapters.
        optimizer: the optimizer's state.
        step: number of batches used so far.
    """

    weights: Any
    optimizer: Any
    step: Int[Array, ""]


StepMetrics = dict[str, Float[Array, ""]]
"""Metrics of one step by name, float32 scalars."""


def means_by_kind(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Return mean loss, accuracy and number of the text and of the vision targets.

    The result has names such as `vision_loss`, and is empty for a text model.
    """
    if "vision_nll" not in sums:
        return {}
    means = {}
    for kind in ("text", "vision"):
        nll, correct, targets = (
            sums[f"vision_{name}"] if kind == "vision" else sums[name] - sums[f"vision_{name}"]
            for name in ("nll", "correct", "targets")
        )
        count = jnp.maximum(targets, 1.0)
        means[f"{kind}_loss"], means[f"{kind}_accuracy"] = nll / count, correct / count
        means[f"{kind}_targets"] = targets
    return means


def adapted_model(adapters: Any, frozen: Llama) -> Llama:
    """Return the frozen model with trained adapters beside its layers."""
    layers: Any = AdaptedLayer(layer=frozen.layers, adapters=adapters)  # type: ignore[arg-type]
    return replace(frozen, layers=layers)


_GATHERED = {**TRAINING, "embed": None}
"""Rules for the weights of a layer while it computes."""


def _remat(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    match name:
        case "none":
            return lambda layer: layer
        case "full":
            return jax.checkpoint
        case _:
            policy = jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME)
            return partial(jax.checkpoint, policy=policy)


def loss_sums(
    weights: Llama,
    batch: Batch,
    *,
    config: LlamaConfig,
    compute: ComputeConfig,
    lora: LoraConfig,
    mesh: Mesh | None,
) -> LossSums:
    """Compute the loss of one microbatch [rows, seq]."""
    dtype = cast(compute.dtype)
    side = Side(positions=batch.positions, segments=batch.segments)
    layer_specs: Any = llama_params(config, stacked=False).layers[0]  # type: ignore[index]

    def prepare(layer: Any) -> Layer:
        """Gather one layer from its `fsdp` shards, in the type it computes in."""
        if isinstance(layer, AdaptedLayer):
            layer = merge_adapters(layer.layer, layer.adapters, lora.scale)
        return jax.tree.map(
            lambda spec, kernel: constrain(kernel.astype(dtype), mesh, spec.axes, _GATHERED),
            layer_specs,
            layer,
        )

    def attend(query: Array, key: Array, value: Array, cache: None) -> tuple[Array, None]:
        return attention(query, key, value, side, side, config=compute.attention, mesh=mesh), None

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
    embedding: Any = weights.embedding  # training never uses quantized weights
    return cross_entropy(
        hidden,
        embedding.T if weights.head is None else weights.head,  # type: ignore[arg-type]
        batch.targets,
        batch.weights,
        chunk=compute.loss_chunk,
        mesh=mesh,
        text_vocab=config.vocab_size if config.vision else None,
    )


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    optimizer: optax.GradientTransformation,
    sums: Callable[[Any, Batch], LossSums],
) -> tuple[TrainState, StepMetrics]:
    """Train on one batch [micro, rows, seq].

    The loss is one mean over all microbatches, so splitting a batch changes only memory. If loss
    or gradient is not finite, weights and optimizer stay as they were.

    Args:
        sums: computes the loss of a microbatch from the trained weights.

    Returns:
        The next state, and metrics: `loss`, which is minimized, and `nll`, the mean over targets,
        both in nats; `accuracy`, the share of targets that were the likeliest token; `targets`;
        `tokens`, without padding; `gradient_norm`; `weight_norm`; `skipped`, 1 if the step changed
        nothing; and those of `means_by_kind`.
    """

    def loss(weights: Any, batch: Batch) -> tuple[Array, LossSums]:
        total = sums(weights, batch)
        return total["loss"], total

    gradient, total = _sum_over_microbatches(
        partial(jax.grad(loss, has_aux=True), state.weights), batch
    )
    # A batch without targets changes nothing; 0 / 0 must not look like divergence.
    share = 1.0 / jnp.maximum(total["weight"], 1e-8)
    gradient = jax.tree.map(lambda x: x * share, gradient)
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(total["loss"]) & jnp.isfinite(norm)
    change, moments = optimizer.update(gradient, state.optimizer, state.weights)
    updated = optax.apply_updates(state.weights, change)
    weights, moments = select_finite(finite, (updated, moments), (state.weights, state.optimizer))
    targets = jnp.maximum(total["targets"], 1.0)
    metrics = {
        "loss": total["loss"] * share,
        "nll": total["nll"] / targets,
        "accuracy": total["correct"] / targets,
        "targets": total["targets"],
        "tokens": (batch.segments >= 0).sum(dtype=jnp.float32),
        "gradient_norm": norm,
        "weight_norm": optax.tree.norm(weights),
        "skipped": 1.0 - finite,
        **means_by_kind(total),
    }
    return TrainState(weights=weights, optimizer=moments, step=state.step + 1), metrics


def _sum_over_microbatches(function: Callable[[Batch], Any], batch: Batch) -> Any:
    """Add up the results of a function over microbatches, one after another."""
    first = jax.tree.map(lambda x: x[0], batch)
    if batch.tokens.shape[0] == 1:
        return function(first)
    shapes = jax.eval_shape(function, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(
        lambda carry, micro: (jax.tree.map(jnp.add, carry, function(micro)), None), zeros, batch
    )
    return total


def select_finite(finite: Bool[Array, ""], new: Any, old: Any) -> Any:
    """Return the tree `new` if a step was finite, and `old` otherwise."""
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
