"""Define the loss of a reconstructed image."""

from dataclasses import dataclass
from typing import Annotated

import jax.numpy as jnp
from annotated_types import Ge
from jaxtyping import Array, Float

from lwm.core.config import Checked
from lwm.core.errors import ConfigError
from lwm.models.likeness import ssim


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig(Checked, section="reconstruction"):
    """Set the weights of the terms of the reconstruction loss."""

    absolute: Annotated[float, Ge(0)] = 1.0
    """Weight of the mean absolute error (L1)."""
    squared: Annotated[float, Ge(0)] = 1.0
    """Weight of the mean squared error (L2)."""
    structure: Annotated[float, Ge(0)] = 0.0
    """Weight of 1 - SSIM, a perceptual term; 0 omits it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.absolute + self.squared + self.structure > 0:
            raise ConfigError(
                "reconstruction.absolute, squared and structure are all 0; set at least one of "
                "them above 0"
            )


def reconstruction_loss(
    pixels: Float[Array, "batch height width 3"],
    reconstruction: Float[Array, "batch height width 3"],
    config: ReconstructionConfig,
) -> Float[Array, " batch"]:
    """Compute the reconstruction loss of each image."""
    error = pixels - reconstruction
    loss = config.absolute * jnp.abs(error).mean(axis=(1, 2, 3))
    loss += config.squared * (error**2).mean(axis=(1, 2, 3))
    if config.structure:
        loss += config.structure * (1 - ssim(pixels, reconstruction))
    return loss
