"""Measure the similarity of images in [-1, 1] by PSNR and SSIM.

Source: Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural
Similarity": Gaussian window of 11 pixels and deviation 1.5, the constants 0.01 and 0.03.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

RANGE = 2.0
WINDOW = 11
"""Smallest side of images that SSIM can compare."""

_Images = Float[Array, "batch height width channels"]


def psnr(a: _Images, b: _Images) -> Float[Array, " batch"]:
    """Compute the peak signal-to-noise ratio of each image, in dB."""
    error = ((a - b) ** 2).mean(axis=(1, 2, 3))
    # Bounded, so that a mean over images that include equal ones remains finite.
    return 10 * jnp.log10(RANGE**2 / jnp.maximum(error, 1e-10))


def ssim(a: _Images, b: _Images) -> Float[Array, " batch"]:
    """Compute the mean structural similarity of each image, over channels and whole windows."""
    moments = _blurred(jnp.stack([a, b, a * a, b * b, a * b]))
    mean_a, mean_b = moments[0], moments[1]
    variance_a = moments[2] - mean_a**2
    variance_b = moments[3] - mean_b**2
    covariance = moments[4] - mean_a * mean_b
    light, contrast = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    similarity = ((2 * mean_a * mean_b + light) * (2 * covariance + contrast)) / (
        (mean_a**2 + mean_b**2 + light) * (variance_a + variance_b + contrast)
    )
    return similarity.mean(axis=(1, 2, 3))


def _blurred(x: Array) -> Array:
    # A sum of shifted images, because a CPU convolves single channels slowly.
    distance = np.arange(WINDOW) - WINDOW // 2
    window = np.exp(-(distance**2) / (2 * 1.5**2))
    window /= window.sum()
    for axis in (2, 3):
        length = x.shape[axis] - WINDOW + 1
        x = sum(  # type: ignore[assignment]
            jax.lax.slice_in_dim(x, start, start + length, axis=axis) * float(weight)
            for start, weight in enumerate(window)
        )
    return x
