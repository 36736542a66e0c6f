"""AdamW as the paper uses it: warm-up, then cosine or constant; clipping; which weights decay.

Source: LargeWorldModel paper (arXiv 2402.08268, tables of appendix F) and the original's defaults.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lwm.core.errors import ConfigError
from lwm.core.params import ParamSpec


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights follow their gradients."""

    learning_rate: float = 4e-5
    """Highest learning rate, reached when the warm-up ends."""
    final_learning_rate: float = 0.0
    """Where a cosine ends."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of their squares."""
    epsilon: float = 1e-8
    """Keeps the division by their root finite."""
    weight_decay: float = 0.1
    """Share of a weight that a step takes off, times the learning rate."""
    decay: Literal["kernels", "all"] = "kernels"
    """Which weights decay: kernels alone, or norms and embeddings too, as in the original."""
    clip_norm: float = 1.0
    """Gradients longer than this are scaled down to it."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epsilon", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"optimizer.{name} is {getattr(self, name)}; it must be above 0")
        for name in ("final_learning_rate", "warmup_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ConfigError(
                    f"optimizer.{name} is {getattr(self, name)}; it must not be below 0"
                )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"optimizer.{name} is {getattr(self, name)}; it must be from 0 to below 1"
                )


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by number of updates made, over a run of `steps`."""
    after = max(1, steps - config.warmup_steps)
    if config.schedule == "constant":
        rest = optax.constant_schedule(config.learning_rate)
    else:
        rest = optax.cosine_decay_schedule(
            config.learning_rate, after, alpha=config.final_learning_rate / config.learning_rate
        )
    if not config.warmup_steps:
        return rest
    # The first update of a warm-up moves already: a rate of 0 would waste a batch.
    rise = optax.linear_schedule(
        config.learning_rate / config.warmup_steps,
        config.learning_rate,
        max(1, config.warmup_steps - 1),
    )
    return optax.join_schedules([rise, rest], [config.warmup_steps])


def make_optimizer(
    config: OptimizerConfig, specs: Any, steps: int
) -> optax.GradientTransformation:
    """The transformation of gradients into changes of the weights that `specs` declare."""
    decays = jax.tree.map(lambda spec: config.decay == "all" or _is_kernel(spec), specs)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decays,
        ),
    )


def _is_kernel(spec: ParamSpec) -> bool:
    """Neither a norm's scale nor an embedding, which has ids in front."""
    axes = tuple(axis for axis in spec.axes if axis != "layers")
    return len(axes) > 1 and axes[0] not in ("vocab", "codes")


def state_shardings(
    optimizer: optax.GradientTransformation, weights: Any, shardings: Any, mesh: Mesh
) -> Any:
    """Where the optimizer's state lives: each mean beside its weight, counters everywhere.

    Args:
        weights: the weights, or their abstract shapes.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    return optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, weights),
        shardings,
        transform_non_params=lambda _: everywhere,
    )
