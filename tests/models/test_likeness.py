"""PSNR and SSIM against scikit-image."""

import jax.numpy as jnp
import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from lwm.models.likeness import psnr, ssim


def test_both_are_those_of_scikit_image() -> None:
    draw = np.random.default_rng(0)
    a = draw.uniform(-1, 1, (3, 17, 23, 3)).astype(np.float32)
    noise = np.array([0.05, 0.5, 0], np.float32)[:, None, None, None]
    b = np.clip(a + noise * draw.normal(size=a.shape).astype(np.float32), -1, 1)
    found = psnr(jnp.asarray(a), jnp.asarray(b))
    for i in range(2):
        wanted = peak_signal_noise_ratio(a[i], b[i], data_range=2)
        np.testing.assert_allclose(found[i], wanted, rtol=1e-5)
    assert np.isfinite(found[2])
    assert found[2] > 90
    for i, value in enumerate(ssim(jnp.asarray(a), jnp.asarray(b))):
        wanted = structural_similarity(
            a[i], b[i], data_range=2, channel_axis=-1, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )  # fmt: skip
        np.testing.assert_allclose(value, wanted, atol=1e-5)
