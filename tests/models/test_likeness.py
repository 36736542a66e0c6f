"""Check PSNR and SSIM against scikit-image."""

import jax.numpy as jnp
import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from lwm.models.likeness import psnr, ssim


def test_psnr_and_ssim_equal_those_of_scikit_image() -> None:
    random = np.random.default_rng(0)
    a = random.uniform(-1, 1, (3, 17, 23, 3)).astype(np.float32)
    noise = np.array([0.05, 0.5, 0], np.float32)[:, None, None, None]
    b = np.clip(a + noise * random.normal(size=a.shape).astype(np.float32), -1, 1)
    ratios = psnr(jnp.asarray(a), jnp.asarray(b))
    for i in range(2):
        expected = peak_signal_noise_ratio(a[i], b[i], data_range=2)
        np.testing.assert_allclose(ratios[i], expected, rtol=1e-5)
    assert np.isfinite(ratios[2])
    assert ratios[2] > 90
    for i, value in enumerate(ssim(jnp.asarray(a), jnp.asarray(b))):
        expected = structural_similarity(
            a[i], b[i], data_range=2, channel_axis=-1, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )  # fmt: skip
        np.testing.assert_allclose(value, expected, atol=1e-5)
