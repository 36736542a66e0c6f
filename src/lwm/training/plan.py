"""What is compiled for a run, from its settings alone: state, step and evaluation.

Shapes and shardings come first and arrays last, so that a run can be traced for a mesh of devices
that are elsewhere. Knows weights and where they start; knows no data and no directory.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lwm.checkpoints.checkpoint import Checkpoint
from lwm.checkpoints.place import load_stacked
from lwm.core import params
from lwm.core.memory import require_memory
from lwm.core.mesh import FSDP, TENSOR
from lwm.core.sharding import TRAINING
from lwm.models.llama import Llama, LlamaConfig, llama_params
from lwm.models.lora import LoraConfig, lora_params
from lwm.training.loss import LossSums
from lwm.training.optimizer import OptimizerConfig, make_optimizer, state_shardings
from lwm.training.step import (
    Batch,
    ComputeConfig,
    StepMetrics,
    TrainState,
    adapted_model,
    sums_of,
    train_step,
    whole_model,
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model learns on a mesh.

    Args:
        steps: length of the run, which the learning rate follows.
    """

    config: LlamaConfig
    mesh: Mesh
    optimizer: OptimizerConfig
    compute: ComputeConfig
    lora: LoraConfig
    steps: int

    @property
    def model_specs(self) -> Llama:
        return llama_params(self.config, stacked=True)

    @property
    def specs(self) -> Any:
        """What is trained: the model, or its adapters."""
        return lora_params(self.config, self.lora) if self.lora.rank else self.model_specs

    @property
    def transformation(self) -> optax.GradientTransformation:
        return make_optimizer(self.optimizer, self.specs, self.steps)

    @property
    def shardings(self) -> TrainState:
        weights = params.shardings(self.specs, self.mesh, TRAINING)
        abstract = params.abstract(self.specs, jnp.float32)
        return TrainState(
            weights=weights,
            optimizer=state_shardings(self.transformation, abstract, weights, self.mesh),
            step=self._everywhere,  # type: ignore[arg-type]
        )

    @property
    def _everywhere(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def template(self) -> TrainState:
        """Shapes, types and shardings of the state."""
        weights = params.abstract(self.specs, jnp.float32)
        state = TrainState(
            weights=weights,
            optimizer=jax.eval_shape(self.transformation.init, weights),
            step=jax.ShapeDtypeStruct((), jnp.int32),  # type: ignore[arg-type]
        )
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            state,
            self.shardings,
        )

    def require_memory(self) -> None:
        """Raises:
        CapacityError: weights, their gradient and the optimizer's two means do not fit.
        """
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

    def first_state(self, source: Checkpoint | None, *, seed: int) -> TrainState:
        """The state before the first step: random weights, or those of a checkpoint."""
        if source is not None and not self.lora.rank:
            weights: Any = load_stacked(source, mesh=self.mesh)
        else:
            key = jax.random.key(seed)
            weights = params.initialize(
                self.specs, key, jnp.float32, mesh=self.mesh, rules=TRAINING
            )
        shardings = self.shardings
        begin = jax.jit(self.transformation.init, out_shardings=shardings.optimizer)
        return TrainState(
            weights=weights,
            optimizer=begin(weights),
            step=jax.device_put(np.zeros((), np.int32), shardings.step),
        )

    def frozen(self, source: Checkpoint | None) -> Llama | None:
        """The weights that adapters change and learning does not."""
        return load_stacked(source, mesh=self.mesh) if source and self.lora.rank else None

    def step(self) -> Any:
        """The compiled step: (state, frozen, batch) -> (state, metrics)."""
        step = partial(
            train_step, optimizer=self.transformation, model=self._model(), sums=self._sums()
        )
        figures: Any = dict.fromkeys(StepMetrics.__dataclass_fields__, self._everywhere)
        return jax.jit(
            step, donate_argnums=0, out_shardings=(self.shardings, StepMetrics(**figures))
        )

    def evaluate(self) -> Any:
        """The compiled loss: (state, frozen, batch) -> sums over all microbatches."""
        sums, model = self._sums(), self._model()

        def evaluate(state: TrainState, frozen: Any, batch: Batch) -> LossSums:
            found = jax.lax.map(lambda one: sums(model(state.weights, frozen), one), batch)
            return jax.tree.map(lambda x: x.sum(), found)

        return jax.jit(evaluate, out_shardings=self._everywhere)

    def _model(self) -> Any:
        return adapted_model if self.lora.rank else whole_model

    def _sums(self) -> Any:
        sums = partial(
            sums_of, config=self.config, compute=self.compute, lora=self.lora, mesh=self.mesh
        )
        # Accelerators would compute products of float32 in fewer bits unless told.
        precision = "highest" if self.compute.dtype == "float32" else "default"

        def precise(weights: Llama, batch: Batch) -> LossSums:
            with jax.default_matmul_precision(precision):
                return sums(weights, batch)

        return precise
