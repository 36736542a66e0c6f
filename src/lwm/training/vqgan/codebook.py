"""Update a VQGAN's codebook: moving averages of the latents that choose each entry, and revival.

Sources: van den Oord et al. 2017 (arXiv 1711.00937), appendix A.1, for the averages; Dhariwal et
al. 2020 (arXiv 2005.00341), section 3.1, for revival from the batch.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge, Lt
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lwm.core.config import Checked


@dataclass(frozen=True, kw_only=True)
class CodebookConfig(Checked, section="codebook"):
    """Set how codebook entries are trained."""

    learning: Literal["average", "gradient"] = "average"
    """Set entries to moving averages of the latents that choose them, or train them by the
    gradient of the codebook loss."""
    decay: Annotated[float, Ge(0), Lt(1)] = 0.99
    """Decay rate of the moving averages, per step."""
    commitment: Annotated[float, Ge(0)] = 0.25
    """Weight of the loss that moves latents toward their entries."""
    dead_below: Annotated[float, Ge(0)] = 0.1
    """An entry whose moving average of use falls below this share of even use takes the value of a
    random latent; 0 disables this."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Usage:
    """Hold, for each entry, moving averages of how often it is chosen and of its latents' sum."""

    counts: Float[Array, " codes"]
    sums: Float[Array, "codes channels"]


def no_usage(codes: int, channels: int) -> Usage:
    """Return the usage before the first step; all entries count as dead, so the first batch fills
    the codebook."""
    return Usage(counts=jnp.zeros(codes), sums=jnp.zeros((codes, channels)))


def update_usage(
    usage: Usage,
    latents: Float[Array, "places channels"],
    codes: Int[Array, " places"],
    decay: float,
) -> tuple[Usage, Float[Array, " codes"]]:
    """Return the averages after one more step, and how often each entry was chosen in it."""
    counts = jnp.zeros_like(usage.counts).at[codes].add(1.0)
    sums = jnp.zeros_like(usage.sums).at[codes].add(latents)
    return Usage(
        counts=decay * usage.counts + (1 - decay) * counts,
        sums=decay * usage.sums + (1 - decay) * sums,
    ), counts


def average_entries(usage: Usage, codebook: Float[Array, "codes channels"]) -> Array:
    """Return entries as means of the latents that chose them; entries never chosen stay."""
    counts = usage.counts[:, None]
    return jnp.where(counts > 0, usage.sums / jnp.where(counts > 0, counts, 1.0), codebook)


def revive_entries(
    codebook: Float[Array, "codes channels"],
    usage: Usage,
    latents: Float[Array, "places channels"],
    key: PRNGKeyArray,
    dead_below: float,
) -> tuple[Float[Array, "codes channels"], Usage, Float[Array, ""]]:
    """Give dead entries the values of random latents.

    A revived entry counts as chosen by twice `dead_below` places per step, which gives it time to
    be chosen.

    Args:
        dead_below: places per step.

    Returns:
        Codebook, usage, and the number of revived entries.
    """
    dead = usage.counts < dead_below
    chosen = latents[jax.random.randint(key, dead.shape, 0, len(latents))]
    count = 2 * dead_below
    return (
        jnp.where(dead[:, None], chosen, codebook),
        Usage(
            counts=jnp.where(dead, count, usage.counts),
            sums=jnp.where(dead[:, None], count * chosen, usage.sums),
        ),
        dead.sum(dtype=jnp.float32),
    )


def codebook_perplexity(counts: Float[Array, " codes"]) -> Float[Array, ""]:
    """Compute the number of entries that, evenly used, would carry as much information."""
    shares = counts / jnp.maximum(counts.sum(), 1.0)
    return jnp.exp(
        -jnp.sum(jnp.where(shares > 0, shares * jnp.log(jnp.where(shares > 0, shares, 1)), 0))
    )
