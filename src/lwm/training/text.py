"""Train a language model, with or without vision, whole or by low-rank adapters."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lwm.checkpoints.checkpoint import Checkpoint
from lwm.checkpoints.place import load_stacked
from lwm.core import params
from lwm.core.memory import require_memory
from lwm.core.mesh import FSDP, TENSOR
from lwm.core.sharding import TRAINING
from lwm.models.costs import training_flops
from lwm.models.llama import Llama, LlamaConfig, llama_params
from lwm.models.lora import LoraConfig, lora_params
from lwm.training.batches import BatchLayout, causal_pairs
from lwm.training.loss import LossSums
from lwm.training.step import (
    Batch,
    ComputeConfig,
    StepMetrics,
    TrainState,
    adapted_model,
    loss_sums,
    means_by_kind,
    train_step,
)
from lwm.training.training import Tally, Training


@dataclass(frozen=True, kw_only=True)
class TextTraining(Training):
    """Train a language model on rows of tokens.

    Args:
        layout: how batches are split over the same mesh.
        source: the checkpoint whose weights training starts from, or that adapters are added to;
            None for random weights.
        peak_flops: operations per second that all devices together can do; 0 if unknown.
    """

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
            lambda _, sharding: sharding,  # each average is sharded like its weight
            jax.eval_shape(self.transformation.init, params.abstract(self.specs, jnp.float32)),
            weights,
            transform_non_params=lambda _: self.replicated,
        )
        step: Any = self.replicated
        return TrainState(weights=weights, optimizer=optimizer, step=step)

    def initial_state(self, weights: Any) -> TrainState:
        return TrainState(
            weights=weights,
            optimizer=self.transformation.init(weights),
            step=jnp.zeros((), jnp.int32),
        )

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
        """Return the weights that adapters are added to, or None without adapters."""
        if self.source is None or not self.lora.rank:
            return None
        return load_stacked(self.source, mesh=self.mesh)

    def place(self, local: Mapping[str, np.ndarray]) -> Batch:
        return self.layout.place(local)

    def train_step(
        self, state: TrainState, frozen: Llama | None, batch: Batch
    ) -> tuple[TrainState, StepMetrics]:
        sums = partial(self._loss_sums, frozen)
        return train_step(state, batch, optimizer=self.transformation, sums=sums)

    def evaluate_batch(self, state: TrainState, frozen: Llama | None, batch: Batch) -> LossSums:
        sums = jax.lax.map(partial(self._loss_sums, frozen, state.weights), batch)
        return jax.tree.map(lambda x: x.sum(), sums)

    def _loss_sums(self, frozen: Llama | None, weights: Any, batch: Batch) -> LossSums:
        return loss_sums(
            weights if frozen is None else adapted_model(weights, frozen),
            batch,
            config=self.config,
            compute=self.compute,
            lora=self.lora,
            mesh=self.mesh,
        )

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

    def step_note(self, row: dict[str, Any]) -> str:
        return f"loss {row['loss']:.4f}, {row['tokens_per_second']:,.0f} tokens/s"

    def evaluation_row(self, sums: Mapping[str, Any]) -> dict[str, float]:
        targets = max(float(sums["targets"]), 1.0)
        return {
            "loss": float(sums["loss"]) / max(float(sums["weight"]), 1e-8),
            "perplexity": _perplexity(float(sums["nll"]) / targets),
            "accuracy": float(sums["correct"]) / targets,
            **_values(means_by_kind(sums)),
        }

    def evaluation_note(self, row: dict[str, float]) -> str:
        return f"held-out loss {row['loss']:.4f}, perplexity {row['perplexity']:.2f}"


def _values(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return numbers for a row; numbers of targets are whole."""
    return {
        name: int(value) if name.endswith("targets") else float(value)
        for name, value in metrics.items()
        if name != "nll"  # its exponential, the perplexity, is more readable
    }


def _perplexity(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
