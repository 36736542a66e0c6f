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


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Checked, section="optimizer"):
    """Set how gradients change the weights."""

    learning_rate: Annotated[float, Gt(0)] = 4e-5
    """Highest learning rate, reached at the end of the warm-up."""
    final_learning_rate: Annotated[float, Ge(0)] = 0.0
    """Learning rate at the end of a cosine schedule."""
    schedule: Literal["cosine", "constant"] = "cosine"
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
        highest, warmup_steps = self.learning_rate, self.warmup_steps
        match self.schedule:
            case "cosine":
                decay_steps = max(1, steps - warmup_steps)
                alpha = self.final_learning_rate / highest
                after = optax.cosine_decay_schedule(highest, decay_steps, alpha=alpha)
            case "constant":
                after = optax.constant_schedule(highest)
        if not warmup_steps:
            return after
        # The warm-up does not begin at 0, because an update at rate 0 would waste a batch.
        warmup = optax.linear_schedule(highest / warmup_steps, highest, max(1, warmup_steps - 1))
        return optax.join_schedules([warmup, after], [warmup_steps])

    def transformation(self, specs: Any, steps: int) -> optax.GradientTransformation:
        """Return the optimizer of the weights that `specs` declare, for a run of `steps`."""

        def decays(spec: ParamSpec) -> bool:
            axes = [axis for axis in spec.axes if axis != "layers"]
            # A kernel is neither a norm's scale nor an embedding, whose rows are ids.
            return self.decay == "all" or (len(axes) > 1 and axes[0] not in ("vocab", "codes"))

        adamw = optax.adamw(
            self.rate_over(steps),
            b1=self.beta1,
            b2=self.beta2,
            eps=self.epsilon,
            weight_decay=self.weight_decay,
            mask=jax.tree.map(decays, specs),
        )
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), adamw)
