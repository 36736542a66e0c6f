"""The VQGAN against the original's outputs, and one picture against many."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lwm
from lwm.core import params
from lwm.core.errors import ConfigError, InputError
from lwm.core.hardware import traits
from lwm.generation import codec as codecs
from lwm.generation.codec import VqganCodec
from lwm.models.vqgan import VQGANConfig, nearest_codes, vqgan_params

SCAN = Path(__file__).parents[1] / "fixtures" / "original" / "scan"
TINY = VQGANConfig(
    image_size=8, hidden_channels=4, channel_multipliers=(1, 2), residual_blocks=1,
    latent_channels=4, codebook_size=16, code_channels=3, norm_groups=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def original():
    codec = lwm.load_vqgan(SCAN / "vqgan.pickle", config=SCAN / "vqgan_config.json")
    with np.load(SCAN / "vqgan_expected.npz") as expected:
        return codec, dict(expected)


@pytest.fixture(scope="module")
def tiny():
    return VqganCodec(TINY, params.initialize(vqgan_params(TINY), jax.random.key(1), np.float32))


def pictures(count: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (count, height, width, 3)).astype(np.float32)


def test_codes_are_those_of_the_original_and_so_are_pixels(original) -> None:
    codec, expected = original
    np.testing.assert_array_equal(codec.encode(expected["pixels"]), expected["codes"])
    np.testing.assert_allclose(
        codec.decode(expected["codes"]), expected["reconstruction"], atol=1e-3
    )
    assert codec.config.codebook_size == 64
    assert codec.config.image_size == 32
    assert codec.config.codes_per_frame == 256


def test_the_default_is_the_originals_size() -> None:
    config = VQGANConfig()
    assert (config.downsampling, config.codes_per_frame) == (16, 256)
    assert config.channels == (128, 256, 256, 512, 768)


def test_a_batch_gives_what_its_pictures_give_alone(tiny, monkeypatch) -> None:
    # Five of at most four a batch: a full one, and a rest that is padded.
    monkeypatch.setattr(codecs, "traits", lambda: replace(traits(), codec_pixels=4 * 64))
    pixels = pictures(5)
    codes = tiny.encode(pixels)
    assert codes.shape == (5, 4, 4)
    np.testing.assert_array_equal(codes, np.concatenate([tiny.encode(x[None]) for x in pixels]))
    back = tiny.decode(codes)
    assert back.shape == pixels.shape
    assert np.abs(back).max() <= 1
    alone = np.concatenate([tiny.decode(x[None]) for x in codes])
    np.testing.assert_allclose(back, alone, atol=1e-5)


def test_float32_products_are_exact(tiny) -> None:
    """Check the precision of products, which accelerators would otherwise round."""
    pixels, codes = np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 4, 4), np.int32)
    for step, x in ((tiny._encode, pixels), (tiny._decode, codes)):
        lines = step.lower(tiny._weights, x).as_text().splitlines()
        products = [x for x in lines if "dot_general" in x or "stablehlo.convolution" in x]
        assert products
        assert all("HIGHEST" in product for product in products)


def test_pictures_need_not_be_square_nor_many(tiny) -> None:
    assert tiny.encode(pictures(1, 4, 12)).shape == (1, 2, 6)
    assert tiny.encode(pictures(0)).shape == (0, 4, 4)
    assert tiny.decode(np.zeros((0, 4, 4), np.int64)).shape == (0, 8, 8, 3)


def test_the_nearest_entry_is_taken_and_the_first_of_equal_ones() -> None:
    codebook = np.array([[4, 0], [1, 1], [1, 1], [-2, 0]], np.float32)
    latents = np.array([[[[1, 1], [3, -1], [-9, 0], [0.9, 1.2]]]], np.float32)
    assert nearest_codes(jnp.asarray(codebook), jnp.asarray(latents)).tolist() == [[[1, 0, 3, 1]]]
    many = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    places = np.random.default_rng(1).normal(size=(2, 3, 4, 5)).astype(np.float32)
    distances = ((places[..., None, :] - many) ** 2).sum(-1)
    np.testing.assert_array_equal(
        nearest_codes(jnp.asarray(many), jnp.asarray(places)), distances.argmin(-1)
    )


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (pictures(1, 8, 7), "8 high and 7 wide; this VQGAN needs multiples of 2"),
        (pictures(1)[..., :2], r"\[1, 8, 8, 2\]"),
        (pictures(1)[0], r"\[8, 8, 3\]"),
        (pictures(1) * 127, "must lie in"),
        (pictures(1) * np.nan, "must lie in"),
        (np.zeros((1, 8, 8, 3), np.uint8), "uint8"),
    ],
)
def test_wrong_pixels_are_refused(tiny, pixels, said) -> None:
    with pytest.raises(InputError, match=said):
        tiny.encode(pixels)


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        (np.full((1, 2, 2), 16), "code 16 is not in the codebook, which has the entries 0 to 15"),
        (np.full((1, 2, 2), -1), "code -1"),
        (np.zeros((2, 2), np.int32), r"\[2, 2\]"),
        (np.zeros((1, 2, 2)), "float64"),
    ],
)
def test_wrong_codes_are_refused(tiny, codes, said) -> None:
    with pytest.raises(InputError, match=said):
        tiny.decode(codes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_size": 9}, "multiple of 16"),
        ({"norm_groups": 7}, "does not divide"),
        ({"channel_multipliers": ()}, "0 levels"),
        ({"channel_multipliers": (1, 0)}, "at least 1"),
        ({"residual_blocks": 10**9}, "at most 64"),
        ({"codebook_size": 0}, "at least 1"),
    ],
)
def test_wrong_sizes_are_refused(changes, said) -> None:
    with pytest.raises(ConfigError, match=said):
        VQGANConfig(**changes)
