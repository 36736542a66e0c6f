"""Configure AdamW as the paper uses it, or Muon: schedule, clipping, and which weights decay.

Sources: LargeWorldModel paper (arXiv 2402.08268, tables of appendix F) and the original's
defaults; Muon in the form of arXiv 2502.16982.
"""

import math
import operator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import optax
from annotated_types import Ge, Gt, Lt
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from lwm.core.config import Checked
from lwm.core.params import ParamSpec


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Checked, section="optimizer"):
    """Set how gradients change the weights."""

    method: Literal["adamw", "muon"] = "adamw"
    """Rule of the update; "muon" takes Muon for kernels and AdamW for all other weights."""
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
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), self._rule(specs, steps))

    def _rule(self, specs: Any, steps: int) -> optax.GradientTransformation:
        kernels = jax.tree.map(_is_kernel, specs)
        decays = jax.tree.map(lambda kernel: kernel or self.decay == "all", kernels)
        rate = self.rate_over(steps)
        adamw = optax.adamw(
            rate,
            b1=self.beta1,
            b2=self.beta2,
            eps=self.epsilon,
            weight_decay=self.weight_decay,
            mask=decays,
        )
        if self.method == "adamw":
            return adamw
        # The root mean square of an update becomes 0.2, as of AdamW's, so that one learning rate
        # fits both (arXiv 2502.16982, section 2.2).
        matrices = jax.tree.map(
            lambda spec: spec if _is_kernel(spec) else optax.MaskedNode(), specs
        )
        scales = jax.tree.map(lambda spec: 0.2 * _largest_side(spec) ** 0.5, matrices)
        muon = optax.chain(
            scale_by_muon(weight_dimension_numbers=jax.tree.map(_matrix_axes, matrices)),
            optax.stateless(lambda updates, _: jax.tree.map(operator.mul, updates, scales)),
            optax.add_decayed_weights(self.weight_decay),
            optax.scale_by_learning_rate(rate),
        )
        return optax.partition({True: muon, False: adamw}, kernels)


def _is_kernel(spec: ParamSpec) -> bool:
    axes = [axis for axis in spec.axes if axis != "layers"]
    # A kernel is neither a norm's scale nor an embedding, whose rows are ids.
    return len(axes) > 1 and axes[0] not in ("vocab", "codes")


def _matrix_axes(spec: ParamSpec) -> MuonDimensionNumbers:
    """Return the axes of the matrix that Muon orthogonalizes; a convolution's inputs join."""
    first, last = int(spec.axes[0] == "layers"), len(spec.shape) - 1
    return MuonDimensionNumbers(tuple(range(first, last)), (last,))


def _largest_side(spec: ParamSpec) -> int:
    first = int(spec.axes[0] == "layers")
    return max(math.prod(spec.shape[first:-1]), spec.shape[-1])
