"""Define what the training loop needs of a kind of training, text or VQGAN.

Only `first_state` and `frozen` make arrays, so a run can be traced for devices that this machine
does not have.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from lwm.core import params
from lwm.core.hardware import precise
from lwm.core.pytree import pytree
from lwm.core.sharding import TRAINING
from lwm.training.optimizer import OptimizerConfig


@pytree
class TrainState:
    """Hold what a step changes; `step` counts the batches used so far."""

    weights: Any
    optimizer: Any
    step: Int[Array, ""]


def select_finite(finite: Bool[Array, ""], new: Any, old: Any) -> Any:
    """Return the tree `new` if a step was finite, and `old` otherwise."""
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)


@dataclass
class Tally:
    """Count over the whole run; saved with each checkpoint."""

    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best: float | None = None  # the lowest evaluation loss


@dataclass(frozen=True, kw_only=True)
class Training(ABC):
    """Describe how one kind of model is trained on a mesh.

    Args:
        steps: length of the run, which the learning rate depends on.
        show: called with the step and the state after each evaluation, to write samples.
    """

    # Formats of a log line, from the values of `step_row` or `evaluation_row`.
    step_note: ClassVar[str]
    evaluation_note: ClassVar[str]

    mesh: Mesh
    optimizer: OptimizerConfig
    steps: int
    seed: int = 0
    show: Callable[[int, Any], None] | None = None

    @property
    @abstractmethod
    def specs(self) -> Any:
        """Return the tree of `ParamSpec` that is trained."""

    @property
    def dtype(self) -> Any:
        """Return the type that products are computed in."""
        return jnp.float32

    @property
    def shardings(self) -> Any:
        """Return the shardings of the state; every device has the whole state by default."""
        return self.replicated

    @abstractmethod
    def initial_state(self, weights: Any) -> Any:
        """Compute the state before the first step."""

    def initial_weights(self) -> Any:
        """Return the weights before the first step, random by default."""
        key = jax.random.key(self.seed)
        return params.initialize(self.specs, key, jnp.float32, mesh=self.mesh, rules=TRAINING)

    def first_state(self) -> Any:
        """Return the state before the first step, on the mesh."""
        compiled = jax.jit(self.initial_state, donate_argnums=0, out_shardings=self.shardings)
        return compiled(self.initial_weights())

    def template(self) -> Any:
        """Return shapes, types and shardings of the state, without arrays."""
        state = jax.eval_shape(self.initial_state, params.abstract(self.specs, jnp.float32))
        return jax.tree.map(
            lambda sharding, part: jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part
            ),
            self.shardings,
            state,
        )

    def frozen(self) -> Any:
        """Return the weights that training uses and does not change, or None."""
        return None

    @abstractmethod
    def place(self, local: Mapping[str, np.ndarray]) -> Any:
        """Return the global batch on the mesh, from this process's rows."""

    @abstractmethod
    def train_step(self, state: Any, frozen: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        """Compute the next state and metrics, among them `loss` and `skipped`."""

    @abstractmethod
    def evaluate_batch(self, state: Any, frozen: Any, batch: Any) -> dict[str, Any]:
        """Compute sums over one batch, which add up over batches."""

    @abstractmethod
    def measure(self, local: Mapping[str, np.ndarray]) -> float:
        """Measure the work of a step from this process's rows, in the unit of `step_row`."""

    @abstractmethod
    def step_row(
        self, metrics: Mapping[str, Any], seconds: float, work: float, tally: Tally
    ) -> dict[str, Any]:
        """Return one step's values for `metrics.jsonl`, with `loss`, and count in `tally`."""

    @abstractmethod
    def evaluation_row(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Return an evaluation's values, with `loss`, from the sums over its batches."""

    def compiled_step(self) -> Any:
        """Compile `train_step`; the compiled function reuses the buffers of the state."""
        outputs = self.shardings, self.replicated
        step = precise(self.train_step, self.dtype)
        return jax.jit(step, donate_argnums=0, out_shardings=outputs)

    def compiled_evaluation(self) -> Any:
        """Compile `evaluate_batch`."""
        return jax.jit(precise(self.evaluate_batch, self.dtype), out_shardings=self.replicated)

    @property
    def transformation(self) -> optax.GradientTransformation:
        """Return the optimizer of the trained weights."""
        return self.optimizer.transformation(self.specs, self.steps)

    @cached_property
    def learning_rates(self) -> np.ndarray:
        """Return the learning rate of each update of the run."""
        return np.asarray(jax.vmap(self.optimizer.rate_over(self.steps))(np.arange(self.steps)))

    @property
    def replicated(self) -> NamedSharding:
        """Return the sharding that puts the whole array on every device."""
        return NamedSharding(self.mesh, PartitionSpec())
