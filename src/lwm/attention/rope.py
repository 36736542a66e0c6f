"""Apply rotary position embedding to interleaved pairs: dimensions 2i and 2i + 1 form a pair.

This is the layout of the original and of GGUF files. Hugging Face checkpoints pair i with i + d/2
and are permuted when they are read.

Source: Su et al. 2021 (arXiv 2104.09864), section 3.4.2.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class RotaryAngles(NamedTuple):
    """Hold cosine and sine of the angles of each position, float32."""

    cosine: Float[Array, "batch seq half"]
    sine: Float[Array, "batch seq half"]


def rotary_angles(positions: Int[Array, "batch seq"], head_dim: int, theta: float) -> RotaryAngles:
    """Compute the angles: p / theta ** (2i / head_dim) for pair i at position p."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.float32(theta) ** exponents).astype(np.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return RotaryAngles(jnp.cos(angles), jnp.sin(angles))


def apply_rotary(
    x: Float[Array, "batch seq heads dim"], angles: RotaryAngles
) -> Float[Array, "batch seq heads dim"]:
    """Rotate each pair of each head; compute in float32 and return x's own type."""
    cosine, sine = angles.cosine[:, :, None, :], angles.sine[:, :, None, :]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cosine - odd * sine, even * sine + odd * cosine], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
