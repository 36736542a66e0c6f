"""Rotary position embedding on interleaved pairs: dimension 2i turns with dimension 2i + 1.

This is the layout of the original and of GGUF files; Hugging Face checkpoints turn i with i + d/2
and are permuted when they are read. Angles are computed once for all layers and heads. Knows
positions and a base; knows nothing of models.

Source: Su et al. 2021 (arXiv 2104.09864), section 3.4.2.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class RotaryAngles(NamedTuple):
    """Cosine and sine of each position's angles, float32."""

    cosine: Float[Array, "batch seq half"]
    sine: Float[Array, "batch seq half"]


def rotary_angles(positions: Int[Array, "batch seq"], head_dim: int, theta: float) -> RotaryAngles:
    """The angle of pair i at position p is p / theta ** (2i / head_dim)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.float32(theta) ** exponents).astype(np.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return RotaryAngles(jnp.cos(angles), jnp.sin(angles))


def apply_rotary(
    x: Float[Array, "batch seq heads dim"], by: RotaryAngles
) -> Float[Array, "batch seq heads dim"]:
    """Turns each pair of each head; computed in float32, returned in x's own type."""
    cosine, sine = by.cosine[:, :, None, :], by.sine[:, :, None, :]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cosine - odd * sine, even * sine + odd * cosine], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
