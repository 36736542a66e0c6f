"""Configure AdamW as the paper uses it: schedule, clipping, and which weights decay.

Source: LargeWorldModel paper (arXiv 2402.08268, tables of appendix F) and the original's defaults.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import optax
from annotated_types import Ge, Gt, Lt

from lwm.core.config import Checked
from lwm.core.params import ParamSpec
from lwm.training.learning_rate import Schedule, learning_rate


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Checked, section="optimizer"):
    """Set how gradients change the weights."""

    learning_rate: Annotated[float, Gt(0)] = 4e-5
    """Highest learning rate, reached at the end of the warm-up."""
    final_learning_rate: Annotated[float, Ge(0)] = 0.0
    """Learning rate at the end of a cosine schedule."""
    schedule: Schedule = "cosine"
    """Learning-rate schedule after the warm-up."""
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Steps over which the learning rate rises."""
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Decay rate of the moving average of gradients."""
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.95
    """Decay rate of the moving average of squared gradients."""
    epsilon: Annotated[float, Gt(0)] = 1e-8
    """Term added to the denominator for numerical stability."""
    weight_decay: Annotated[float, Ge(0)] = 0.1
    """Weight decay; each step shrinks a weight by this times the learning rate."""
    decay: Literal["kernels", "all"] = "kernels"
    """Which weights decay: kernels only, or norms and embeddings too, as in the original."""
    clip_norm: Annotated[float, Gt(0)] = 1.0
    """Largest norm of the gradient; longer gradients are scaled down to it."""

    def rate_over(self, steps: int) -> optax.Schedule:
        """Return the learning rate by number of updates made, for a run of `steps`."""
        return learning_rate(
            self.schedule,
            highest=self.learning_rate,
            final=self.final_learning_rate,
            warmup_steps=self.warmup_steps,
            steps=steps,
        )


def make_optimizer(
    config: OptimizerConfig, specs: Any, steps: int
) -> optax.GradientTransformation:
    """Return the optimizer for the weights that `specs` declare, for a run of `steps`."""
    decays = jax.tree.map(lambda spec: config.decay == "all" or _is_kernel(spec), specs)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            config.rate_over(steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decays,
        ),
    )


def _is_kernel(spec: ParamSpec) -> bool:
    """Return whether a weight is neither a norm's scale nor an embedding, whose rows are ids."""
    axes = tuple(axis for axis in spec.axes if axis != "layers")
    return len(axes) > 1 and axes[0] not in ("vocab", "codes")
