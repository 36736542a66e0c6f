"""Low-rank adapters: a small trained change beside each frozen kernel.

Source: Hu et al. 2021 (arXiv 2106.09685).
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax
from jaxtyping import Array, Float

from lwm.core.errors import ConfigError
from lwm.core.params import ParamSpec, normal, stack, zeros
from lwm.models.llama import Layer, LlamaConfig, llama_params

Target = Literal["query", "key", "value", "output", "gate", "up", "down"]
TARGETS: tuple[Target, ...] = get_args(Target)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which kernels are adapted, and how much."""

    rank: int = 0
    """Columns of each adapter; 0 trains the whole model instead."""
    alpha: float = 16.0
    """The change counts alpha / rank times."""
    targets: tuple[Target, ...] = TARGETS
    """Kernels that get an adapter."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ConfigError(f"lora.rank is {self.rank}; it must be 0 (no adapters) or more")
        if self.rank and not self.targets:
            raise ConfigError(f"lora.targets is empty; name some of {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A change of one kernel: `down @ up`, before scaling."""

    down: Float[Array, "*layers inputs rank"]
    up: Float[Array, "*layers rank outputs"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class AdaptedLayer:
    """A frozen layer and its adapters by kernel."""

    layer: Layer
    adapters: dict[str, Adapter]


def lora_params(config: LlamaConfig, lora: LoraConfig) -> dict[str, Adapter]:
    """Declares the adapters of all layers, stacked, as a tree of `ParamSpec`; the change starts at
    zero."""
    layer: Any = llama_params(config, stacked=False).layers[0]  # type: ignore[index]

    def adapter(spec: ParamSpec) -> Any:
        inputs, outputs = spec.shape
        start = normal(inputs**-0.5)
        return Adapter(
            down=ParamSpec((inputs, lora.rank), (spec.axes[0], "rank"), start),  # type: ignore[arg-type]
            up=ParamSpec((lora.rank, outputs), ("rank", spec.axes[1]), zeros()),  # type: ignore[arg-type]
        )

    adapters = {target: adapter(getattr(layer, target)) for target in lora.targets}
    return stack(adapters, config.num_layers)


def merge_adapters(layer: Layer, adapters: dict[str, Adapter], scale: float) -> Layer:
    """The layer with its changes added, in the type of its kernels."""
    changed = {}
    for target, adapter in adapters.items():
        kernel = getattr(layer, target)
        change = (adapter.down @ adapter.up) * scale
        changed[target] = kernel + change.astype(kernel.dtype)
    return replace(layer, **changed)
