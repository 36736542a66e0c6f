"""Adapt frozen kernels by small trained low-rank matrices (Hu et al. 2021, arXiv 2106.09685)."""

from dataclasses import dataclass, replace
from typing import Annotated, Any

from annotated_types import Ge
from jaxtyping import Array, Float

from lwm.core.config import Checked
from lwm.core.errors import ConfigError
from lwm.core.params import ParamSpec, normal, stack, zeros
from lwm.core.pytree import pytree
from lwm.models.llama import KERNELS, Kernel, Layer, LlamaConfig, llama_params


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Checked, section="lora"):
    """Configure which kernels are adapted, and how strongly."""

    rank: Annotated[int, Ge(0)] = 0
    """Rank of each adapter; 0 trains the whole model instead."""
    alpha: float = 16.0
    """Adapters are scaled by alpha / rank."""
    targets: tuple[Kernel, ...] = KERNELS
    """Kernels that are adapted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank and not self.targets:
            raise ConfigError(f"lora.targets is empty; name some of {', '.join(KERNELS)}")

    @property
    def scale(self) -> float:
        """Return the factor of `down @ up`."""
        return self.alpha / self.rank


@pytree
class Adapter:
    """Hold the change of one kernel: `down @ up`, before scaling."""

    down: Float[Array, "*layers inputs rank"]
    up: Float[Array, "*layers rank outputs"]


@pytree
class AdaptedLayer:
    """Hold a frozen layer and its adapters by kernel."""

    layer: Layer
    adapters: dict[str, Adapter]


def lora_params(config: LlamaConfig, lora: LoraConfig) -> dict[str, Adapter]:
    """Declare the adapters of all layers, stacked, as a tree of `ParamSpec`."""
    layer: Any = llama_params(config, stacked=False).layers[0]  # type: ignore[index]

    def adapter(spec: ParamSpec) -> Any:
        inputs, outputs = spec.shape
        down: Any = ParamSpec((inputs, lora.rank), (spec.axes[0], "rank"), normal(inputs**-0.5))
        up: Any = ParamSpec((lora.rank, outputs), ("rank", spec.axes[1]), zeros())
        return Adapter(down=down, up=up)

    adapters = {target: adapter(getattr(layer, target)) for target in lora.targets}
    return stack(adapters, config.num_layers)


def merge_adapters(layer: Layer, adapters: dict[str, Adapter], scale: float) -> Layer:
    """Return the layer with its adapters added, in the type of its kernels."""
    kernels = {target: getattr(layer, target) for target in adapters}
    for target, adapter in adapters.items():
        change = (adapter.down @ adapter.up) * scale
        kernels[target] += change.astype(kernels[target].dtype)
    return replace(layer, **kernels)
