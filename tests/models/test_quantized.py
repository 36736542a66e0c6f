"""Narrow kernels against the dense kernels that they stand for."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwm.core.sharding import DECODE
from lwm.models.llama import (
    FEW_NARROW_ROWS,
    Llama,
    embed_tokens,
    has_narrow,
    multiply,
    text_logits,
    widened,
)
from lwm.models.quantized import LANES, Codes, Grain, Narrow, join, narrow

OUT, INTO = 5 * LANES, 96
GRAINS = [Grain(32, True), Grain(32, False), Grain(16, True), Grain(16, False)]


def kernel(seed: int = 0, *, grain: Grain = GRAINS[0], out: int = OUT) -> Codes:
    random = np.random.default_rng(seed)
    blocks = (out, INTO // grain.block)
    return Codes(
        random.integers(-128, 128, (out, INTO)).astype(np.int8),
        random.normal(size=blocks).astype(np.float32),
        random.normal(size=blocks).astype(np.float32) if grain.offsets else None,
    )


def dense(kernel: Codes) -> np.ndarray:
    """The numbers that codes stand for."""
    wide = kernel.codes.reshape(*kernel.scales.shape, -1) * kernel.scales[..., None]
    if kernel.offsets is not None:
        wide += kernel.offsets[..., None]
    return wide.reshape(kernel.codes.shape)


def placed(codes: Codes) -> Narrow:
    return jax.device_put(narrow(codes))


@pytest.mark.parametrize("grain", GRAINS)
def test_a_narrow_kernel_made_wide_is_the_dense_one(grain: Grain) -> None:
    codes = kernel(grain=grain)
    assert codes.grain == grain
    held = placed(codes)
    assert held.shape == (OUT, INTO)
    assert sum(x.nbytes for x in jax.tree.leaves(held)) == grain.bytes(OUT * INTO)
    np.testing.assert_array_equal(held.wide(), dense(codes))
    places = jnp.array([[0, OUT - 1, 7], [8, 9, 8]])
    np.testing.assert_array_equal(held.rows(places), dense(codes)[np.asarray(places)])
    np.testing.assert_array_equal(held.rows(jnp.arange(16)), dense(codes)[:16])


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize(
    "rows", [(1, 1), (1, 2), (2, 2), (1, FEW_NARROW_ROWS), (1, FEW_NARROW_ROWS + 1), (3, 9)]
)
def test_products_are_those_of_the_dense_kernel(rows: tuple[int, int], grain: Grain) -> None:
    codes = kernel(grain=grain)
    x = np.random.default_rng(1).normal(size=(*rows, INTO)).astype(np.float32)
    expected = x.astype(np.float64) @ dense(codes).T.astype(np.float64)
    out = jax.jit(multiply)(x, placed(codes))
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("grain", "joint"),
    [
        (Grain(32, True), Grain(32, True)),
        (Grain(32, False), Grain(32, True)),
        (Grain(16, False), Grain(16, True)),
    ],
)
def test_kernels_joined_give_the_outputs_of_each(grain: Grain, joint: Grain) -> None:
    one, other = kernel(0), kernel(1, grain=grain, out=2 * LANES)
    joined = join([one, other])
    assert joined.grain == joint
    expected = np.concatenate([dense(one), dense(other)])
    np.testing.assert_array_equal(placed(joined).wide(), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_narrow_tables_embed_and_score(tied: bool) -> None:
    table, head = kernel(0, grain=Grain(16, False)), kernel(1)
    weights = Llama(
        embedding=placed(table),
        layers=(),
        norm=jnp.ones(INTO),
        head=None if tied else placed(head),
    )
    tokens = jnp.array([[3, OUT - 1, 0]])
    found = embed_tokens(weights.embedding, tokens, None, DECODE)
    np.testing.assert_array_equal(found, dense(table)[np.asarray(tokens)])
    wide = replace(
        weights,
        embedding=jnp.asarray(dense(table)),
        head=None if tied else jnp.asarray(dense(head).T),
    )
    assert has_narrow(weights)
    assert not has_narrow(wide)
    jax.tree.map(np.testing.assert_array_equal, widened(weights), wide)
    expected = text_logits(wide, found)
    atol = 1e-6 * float(jnp.abs(expected).max())
    np.testing.assert_allclose(text_logits(weights, found), expected, rtol=0, atol=atol)
