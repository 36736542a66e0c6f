"""Write a VQGAN with random weights, as a directory that `lwm` reads."""

from pathlib import Path

import jax
import numpy as np

from lwm.checkpoints.formats.vqgan import write_vqgan
from lwm.core import params
from lwm.models.vqgan import VQGANConfig, vqgan_params


def save_random_vqgan(directory: Path, config: VQGANConfig) -> Path:
    """Write random weights to a directory, which is returned."""
    write_vqgan(
        directory, config, params.initialize(vqgan_params(config), jax.random.key(1), np.float32)
    )
    return directory
