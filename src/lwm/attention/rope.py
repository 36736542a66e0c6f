"""Rotary position embedding on interleaved pairs: dimension 2i turns with dimension 2i + 1.

This is the layout of the original and of GGUF files; Hugging Face checkpoints turn i with i + d/2 and are permuted
when they are read. Knows positions and a base; knows nothing of models.

Source: Su et al. 2021 (arXiv 2104.09864), section 3.4.2.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def frequencies(head_dim: int, theta: float) -> Float[np.ndarray, " half"]:
    """Radians per position of each pair, float32."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return (1.0 / np.float32(theta) ** exponents).astype(np.float32)


def rotate(
    x: Float[Array, "batch seq heads dim"],
    positions: Int[Array, "batch seq"],
    theta: float,
) -> Float[Array, "batch seq heads dim"]:
    """Turns each pair of each head by its position; computed in float32, returned in x's own type."""
    angles = positions[..., None].astype(jnp.float32) * frequencies(x.shape[-1], theta)
    cosine, sine = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cosine - odd * sine, even * sine + odd * cosine], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
