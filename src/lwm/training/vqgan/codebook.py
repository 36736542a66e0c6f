"""How a codebook learns: moving averages of what chooses each entry, and revival of dead ones.

Pure functions on flat latents. Knows nothing of encoders, decoders or losses.

Sources: van den Oord et al. 2017 (arXiv 1711.00937), appendix A.1, for the averages; Dhariwal et
al. 2020 (arXiv 2005.00341), section 3.1, for revival from the batch.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lwm.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """How the entries follow what chooses them."""

    learning: Literal["average", "gradient"] = "average"
    """Entries are moving averages of the latents that choose them, or follow the gradient of the
    codebook loss."""
    decay: float = 0.99
    """Of the moving averages, a step."""
    commitment: float = 0.25
    """Weight of the loss that draws latents to their entries."""
    dead_below: float = 0.1
    """An entry that is chosen less, on the moving average, than this share of what even use would
    give, takes the value of a random latent; 0 never revives."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(f"codebook.decay is {self.decay}; it must be from 0 to below 1")
        for name in ("commitment", "dead_below"):
            if not getattr(self, name) >= 0:
                raise ConfigError(
                    f"codebook.{name} is {getattr(self, name)}; it must not be below 0"
                )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Usage:
    """Moving averages, a step: places that choose each entry, and the sum of their latents."""

    counts: Float[Array, " codes"]
    sums: Float[Array, "codes channels"]


def unused(codes: int, channels: int) -> Usage:
    """Before the first step: all entries count as dead, so the first batch fills the codebook."""
    return Usage(counts=jnp.zeros(codes), sums=jnp.zeros((codes, channels)))


def counted(
    usage: Usage,
    latents: Float[Array, "places channels"],
    codes: Int[Array, " places"],
    decay: float,
) -> tuple[Usage, Float[Array, " codes"]]:
    """The averages after one more step, and the places of this step that chose each entry."""
    counts = jnp.zeros_like(usage.counts).at[codes].add(1.0)
    sums = jnp.zeros_like(usage.sums).at[codes].add(latents)
    return Usage(
        counts=decay * usage.counts + (1 - decay) * counts,
        sums=decay * usage.sums + (1 - decay) * sums,
    ), counts


def averaged(usage: Usage, codebook: Float[Array, "codes channels"]) -> Array:
    """Entries as the means of what chose them; those that nothing ever chose stay."""
    counts = usage.counts[:, None]
    return jnp.where(counts > 0, usage.sums / jnp.where(counts > 0, counts, 1.0), codebook)


def revived(
    codebook: Float[Array, "codes channels"],
    usage: Usage,
    latents: Float[Array, "places channels"],
    key: PRNGKeyArray,
    dead_below: float,
) -> tuple[Float[Array, "codes channels"], Usage, Float[Array, ""]]:
    """Gives dead entries the values of random latents, and time to be chosen: each counts as if
    twice `dead_below` places a step had chosen it.

    Args:
        dead_below: places a step.

    Returns:
        Also how many were revived.
    """
    dead = usage.counts < dead_below
    chosen = latents[jax.random.randint(key, dead.shape, 0, len(latents))]
    fresh = 2 * dead_below
    return (
        jnp.where(dead[:, None], chosen, codebook),
        Usage(
            counts=jnp.where(dead, fresh, usage.counts),
            sums=jnp.where(dead[:, None], fresh * chosen, usage.sums),
        ),
        dead.sum(dtype=jnp.float32),
    )


def perplexity(counts: Float[Array, " codes"]) -> Float[Array, ""]:
    """How many entries, used evenly, would carry as much as these counts do."""
    shares = counts / jnp.maximum(counts.sum(), 1.0)
    return jnp.exp(
        -jnp.sum(jnp.where(shares > 0, shares * jnp.log(jnp.where(shares > 0, shares, 1)), 0))
    )
