"""Train a language model, with or without vision, whole or by low-rank adapters."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge
from jaxtyping import Array

from lwm.attention.api import CHECKPOINT_NAME, AttentionConfig, attention
from lwm.attention.mask import Side
from lwm.checkpoints.checkpoint import Checkpoint
from lwm.checkpoints.place import load_stacked
from lwm.core import params
from lwm.core.config import Checked
from lwm.core.memory import require_memory
from lwm.core.mesh import FSDP, TENSOR
from lwm.core.sharding import TRAINING, constrain
from lwm.models.forward import hidden_states
from lwm.models.llama import Layer, Llama, LlamaConfig, llama_params
from lwm.models.lora import AdaptedLayer, LoraConfig, lora_params, merge_adapters
from lwm.models.sizes import training_flops
from lwm.training.batches import Batch, BatchLayout, causal_pairs
from lwm.training.loss import LossSums, cross_entropy, means_by_kind
from lwm.training.training import Tally, Training, TrainState, select_finite

# Rules for the weights of a layer while it computes.
_GATHERED = {**TRAINING, "embed": None}


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


@dataclass(frozen=True, kw_only=True)
class TextTraining(Training):
    """Train a language model on rows of tokens.

    Training starts from the weights of `source`, or adds adapters to them. `peak_flops` are the
    operations per second of all devices together; 0 if unknown.
    """

    step_note: ClassVar[str] = "loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s"
    evaluation_note: ClassVar[str] = "held-out loss {loss:.4f}, perplexity {perplexity:.2f}"

    config: LlamaConfig
    layout: BatchLayout
    compute: ComputeConfig = ComputeConfig()
    lora: LoraConfig = LoraConfig()
    source: Checkpoint | None = None
    peak_flops: float = 0.0

    @property
    def model_specs(self) -> Llama:
        """Return the tree of `ParamSpec` of the whole model, layers stacked."""
        return llama_params(self.config, stacked=True)

    @property
    def specs(self) -> Any:
        return lora_params(self.config, self.lora) if self.lora.rank else self.model_specs

    @property
    def dtype(self) -> Any:
        return params.cast(self.compute.dtype)

    @property
    def shardings(self) -> TrainState:
        weights = params.shardings(self.specs, self.mesh, TRAINING)
        optimizer = optax.tree_utils.tree_map_params(
            self.transformation,
            # Each average is sharded like its weight; a rule for some weights masks the others.
            lambda part, sharding: part if isinstance(part, optax.MaskedNode) else sharding,
            jax.eval_shape(self.transformation.init, params.abstract(self.specs, jnp.float32)),
            weights,
            transform_non_params=lambda _: self.replicated,
            is_leaf=lambda part: isinstance(part, optax.MaskedNode),
        )
        step: Any = self.replicated
        return TrainState(weights=weights, optimizer=optimizer, step=step)

    def initial_state(self, weights: Any) -> TrainState:
        optimizer = self.transformation.init(weights)
        return TrainState(weights=weights, optimizer=optimizer, step=jnp.zeros((), jnp.int32))

    def initial_weights(self) -> Any:
        if self.source is None or self.lora.rank:
            return super().initial_weights()
        return load_stacked(self.source, mesh=self.mesh)

    def require_memory(self) -> None:
        """Raise CapacityError if weights, gradient and the optimizer's averages do not fit."""
        needed = 16 * params.count(self.specs)
        if self.lora.rank:
            needed += 4 * params.count(self.model_specs)
        require_memory(
            needed // (self.mesh.shape[FSDP] * self.mesh.shape[TENSOR]),
            self.mesh,
            what="training (weights, gradient and optimizer, activations not counted)",
            remedy="spread it over more devices along fsdp or tensor with --mesh, take a smaller "
            "model, or train adapters with --lora.rank",
        )

    def frozen(self) -> Llama | None:
        if self.source is None or not self.lora.rank:
            return None
        return load_stacked(self.source, mesh=self.mesh)

    def place(self, local: Mapping[str, np.ndarray]) -> Batch:
        return self.layout.place(local)

    def loss_sums(self, weights: Any, batch: Batch, frozen: Llama | None = None) -> LossSums:
        """Compute the loss of one microbatch [rows, seq]."""
        if frozen is not None:
            layers: Any = AdaptedLayer(layer=frozen.layers, adapters=weights)  # type: ignore[arg-type]
            weights = replace(frozen, layers=layers)
        mesh, config = self.mesh, self.config
        side = Side(positions=batch.positions, segments=batch.segments)
        layer_specs: Any = llama_params(config, stacked=False).layers[0]  # type: ignore[index]

        def prepare(layer: Any) -> Layer:
            if isinstance(layer, AdaptedLayer):
                layer = merge_adapters(layer.layer, layer.adapters, self.lora.scale)
            return jax.tree.map(
                lambda spec, kernel: constrain(
                    kernel.astype(self.dtype), mesh, spec.axes, _GATHERED
                ),
                layer_specs,
                layer,
            )

        def attend(query: Array, key: Array, value: Array, cache: None) -> tuple[Array, None]:
            settings = self.compute.attention
            return attention(query, key, value, side, side, config=settings, mesh=mesh), None

        hidden = hidden_states(
            weights,
            batch.tokens,
            batch.positions,
            config,
            attend,
            prepare=prepare,
            remat=_remat(self.compute.remat),
            dtype=self.dtype,
            mesh=mesh,
            rules=TRAINING,
        )
        return cross_entropy(
            hidden,
            weights.embedding.T if weights.head is None else weights.head,
            batch.targets,
            batch.weights,
            chunk=self.compute.loss_chunk,
            mesh=mesh,
            text_vocab=config.vocab_size if config.vision else None,
        )

    def train_step(
        self, state: TrainState, frozen: Llama | None, batch: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        """Train on one batch [micro, rows, seq]; return the next state and float32 metrics.

        The loss is one mean over all microbatches, so splitting a batch changes only memory. If
        loss or gradient is not finite, weights and optimizer stay as they were.
        """

        def loss(weights: Any, batch: Batch) -> tuple[Array, LossSums]:
            total = self.loss_sums(weights, batch, frozen)
            return total["loss"], total

        gradient, total = _sum_over_microbatches(
            partial(jax.grad(loss, has_aux=True), state.weights), batch
        )
        # A batch without targets changes nothing; 0 / 0 must not look like divergence.
        share = 1.0 / jnp.maximum(total["weight"], 1e-8)
        gradient = jax.tree.map(lambda x: x * share, gradient)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(total["loss"]) & jnp.isfinite(norm)
        change, moments = self.transformation.update(gradient, state.optimizer, state.weights)
        updated = optax.apply_updates(state.weights, change)
        before = state.weights, state.optimizer
        weights, moments = select_finite(finite, (updated, moments), before)
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

    def evaluate_batch(self, state: TrainState, frozen: Llama | None, batch: Batch) -> LossSums:
        sums = jax.lax.map(lambda micro: self.loss_sums(state.weights, micro, frozen), batch)
        return jax.tree.map(lambda x: x.sum(), sums)

    def measure(self, local: Mapping[str, np.ndarray]) -> float:
        """Count the floating-point operations of a step, without recomputation."""
        segments = local["segments"]
        flops = training_flops(
            self.config,
            tokens=int((segments >= 0).sum()),
            pairs=causal_pairs(segments),
            adapters=params.count(self.specs) if self.lora.rank else 0,
        )
        # Rows of other processes are assumed to be like those of this one.
        return flops * self.layout.batch_size / len(segments)

    def step_row(
        self, metrics: Mapping[str, Any], seconds: float, work: float, tally: Tally
    ) -> dict[str, Any]:
        tokens = int(metrics["tokens"])
        tally.tokens += tokens
        return {
            **_values(metrics),
            "perplexity": _perplexity(float(metrics["nll"])),
            "tokens": tally.tokens,
            "tokens_per_second": tokens / seconds,
            "flops_utilization": work / seconds / self.peak_flops if self.peak_flops else None,
        }

    def evaluation_row(self, sums: Mapping[str, Any]) -> dict[str, float]:
        targets = max(float(sums["targets"]), 1.0)
        return {
            "loss": float(sums["loss"]) / max(float(sums["weight"]), 1e-8),
            "perplexity": _perplexity(float(sums["nll"]) / targets),
            "accuracy": float(sums["correct"]) / targets,
            **_values(means_by_kind(sums)),
        }


def _remat(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    match name:
        case "none":
            return lambda layer: layer
        case "full":
            return jax.checkpoint
        case _:
            policy = jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME)
            return partial(jax.checkpoint, policy=policy)


def _sum_over_microbatches(function: Callable[[Batch], Any], batch: Batch) -> Any:
    first = jax.tree.map(lambda x: x[0], batch)
    if batch.tokens.shape[0] == 1:
        return function(first)
    shapes = jax.eval_shape(function, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(
        lambda carry, micro: (jax.tree.map(jnp.add, carry, function(micro)), None), zeros, batch
    )
    return total


def _values(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: int(value) if name.endswith("targets") else float(value)
        for name, value in metrics.items()
        if name != "nll"  # its exponential, the perplexity, is more readable
    }


def _perplexity(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
