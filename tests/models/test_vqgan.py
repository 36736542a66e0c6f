"""Check the VQGAN against the original's outputs, and batches against single images."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lwm
from lwm.checkpoints.formats.vqgan import write_vqgan
from lwm.core import params
from lwm.core.errors import ConfigError, InputError
from lwm.core.hardware import traits
from lwm.generation import codec as codecs
from lwm.generation.codec import VqganCodec
from lwm.models.vqgan import VQGANConfig, encode_latents, nearest_codes, vqgan_params

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


def images(count: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (count, height, width, 3)).astype(np.float32)


def test_codes_and_pixels_equal_those_of_the_original(original) -> None:
    codec, expected = original
    np.testing.assert_array_equal(codec.encode(expected["pixels"]), expected["codes"])
    np.testing.assert_allclose(
        codec.decode(expected["codes"]), expected["reconstruction"], atol=1e-3
    )
    assert codec.config.codebook_size == 64
    assert codec.config.image_size == 32
    assert codec.config.codes_per_frame == 256


def test_the_default_configuration_is_the_originals() -> None:
    config = VQGANConfig()
    assert (config.downsampling, config.codes_per_frame) == (16, 256)
    assert config.channels == (128, 256, 256, 512, 768)


def test_a_batch_equals_its_images_one_by_one(tiny, monkeypatch) -> None:
    # Five images in batches of at most four: a full batch, and one that is padded.
    monkeypatch.setattr(codecs, "traits", lambda: replace(traits(), codec_pixels=4 * 64))
    pixels = images(5)
    codes = tiny.encode(pixels)
    assert codes.shape == (5, 4, 4)
    np.testing.assert_array_equal(codes, np.concatenate([tiny.encode(x[None]) for x in pixels]))
    back = tiny.decode(codes)
    assert back.shape == pixels.shape
    assert np.abs(back).max() <= 1
    one_by_one = np.concatenate([tiny.decode(x[None]) for x in codes])
    np.testing.assert_allclose(back, one_by_one, atol=1e-5)


def test_float32_products_are_exact(tiny) -> None:
    """Check the precision of products, which accelerators would otherwise round."""
    pixels, codes = np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 4, 4), np.int32)
    for step, x in ((tiny._encode, pixels), (tiny._decode, codes)):
        lines = step.lower(tiny._weights, x).as_text().splitlines()
        products = [x for x in lines if "dot_general" in x or "stablehlo.convolution" in x]
        assert products
        assert all("HIGHEST" in product for product in products)


def test_images_may_be_oblong_and_none_at_all(tiny) -> None:
    assert tiny.encode(images(1, 4, 12)).shape == (1, 2, 6)
    assert tiny.encode(images(0)).shape == (0, 4, 4)
    assert tiny.decode(np.zeros((0, 4, 4), np.int64)).shape == (0, 8, 8, 3)


def test_each_place_takes_the_first_nearest_entry() -> None:
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
    ("pixels", "message"),
    [
        (images(1, 8, 7), "8 high and 7 wide; this VQGAN needs multiples of 2"),
        (images(1)[..., :2], r"\[1, 8, 8, 2\]"),
        (images(1)[0], r"\[8, 8, 3\]"),
        (images(1) * 127, "must lie in"),
        (images(1) * np.nan, "must lie in"),
        (np.zeros((1, 8, 8, 3), np.uint8), "uint8"),
    ],
)
def test_wrong_pixels_are_refused(tiny, pixels, message) -> None:
    with pytest.raises(InputError, match=message):
        tiny.encode(pixels)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.full((1, 2, 2), 16), "code 16 is not in the codebook, which has the entries 0 to 15"),
        (np.full((1, 2, 2), -1), "code -1"),
        (np.zeros((2, 2), np.int32), r"\[2, 2\]"),
        (np.zeros((1, 2, 2)), "float64"),
    ],
)
def test_wrong_codes_are_refused(tiny, codes, message) -> None:
    with pytest.raises(InputError, match=message):
        tiny.decode(codes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 9}, "multiple of 16"),
        ({"norm_groups": 7}, "does not divide"),
        ({"channel_multipliers": ()}, "0 levels"),
        ({"channel_multipliers": (1, 0)}, "at least 1"),
        ({"residual_blocks": 10**9}, "at most 64"),
        ({"codebook_size": 0}, "at least 1"),
    ],
)
def test_wrong_sizes_are_refused(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        VQGANConfig(**changes)


LOCAL = replace(TINY, patch_size=2, local_encoder=True, scalar_levels=(4, 2, 2))


def test_scalar_entries_are_all_combinations_of_even_levels() -> None:
    codebook = np.asarray(
        params.initialize(vqgan_params(LOCAL), jax.random.key(0), np.float32).codebook
    )
    expected = [(a, b, c) for a in (-1, -1 / 3, 1 / 3, 1) for b in (-1, 1) for c in (-1, 1)]
    np.testing.assert_allclose(codebook, expected, atol=1e-6)
    latents = np.random.default_rng(0).uniform(-1, 1, (1, 4, 5, 3)).astype(np.float32)
    digits = np.round((latents + 1) / 2 * [3, 1, 1]).astype(int)
    np.testing.assert_array_equal(
        nearest_codes(jnp.asarray(codebook), jnp.asarray(latents)),
        digits @ [4, 2, 1],
    )


@pytest.mark.parametrize("local", [True, False])
def test_a_local_encoder_sees_only_the_square_of_a_code(local) -> None:
    config = replace(LOCAL, local_encoder=local)
    weights = params.initialize(vqgan_params(config), jax.random.key(2), np.float32)
    assert (config.downsampling, config.codes_per_frame) == (4, 4)
    pixels = jnp.asarray(images(1, 12, 16))
    latents = encode_latents(weights, pixels, config)
    assert latents.shape == (1, 3, 4, 3)
    assert (abs(latents) <= 1).all()
    changed = encode_latents(weights, pixels.at[0, 5, 10].set(0.9), config)
    moved = np.asarray((changed != latents).any(axis=-1))[0]
    if local:
        assert moved.sum() == 1
        assert moved[1, 2]
        # Equal squares have equal codes wherever they are.
        tiled = jnp.tile(pixels[:, :4, :4], (1, 3, 4, 1))
        np.testing.assert_allclose(
            encode_latents(weights, tiled, config), latents[:, :1, :1] * np.ones((1, 3, 4, 1)),
            atol=1e-6,
        )  # fmt: skip
    else:
        assert moved.sum() > 6
    decoded = VqganCodec(config, weights).decode(np.zeros((1, 3, 4), np.int32))
    assert decoded.shape == (1, 12, 16, 3)


@pytest.mark.parametrize("changes", [{}, {"local_encoder": True}, {"patch_size": 2}])
def test_a_saved_vqgan_has_the_same_codes(tmp_path, changes) -> None:
    config = replace(TINY, scalar_levels=(4, 2, 2), **changes)
    weights = params.initialize(vqgan_params(config), jax.random.key(3), np.float32)
    write_vqgan(tmp_path / "saved", config, weights)
    again = lwm.load_vqgan(tmp_path / "saved")
    assert again.config == config
    pixels = images(2)
    np.testing.assert_array_equal(again.encode(pixels), VqganCodec(config, weights).encode(pixels))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scalar_levels": (4, 4)}, "16 combinations of 2 values"),
        ({"scalar_levels": (16, 1, 1)}, "must be at least 2"),
        ({"scalar_levels": (4, 4, 2)}, r"codebook_size \(16\)"),
        ({"patch_size": 0}, "at least 1"),
        ({"patch_size": 3}, "multiple of 6"),
    ],
)
def test_wrong_levels_and_patches_are_refused(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **changes)
