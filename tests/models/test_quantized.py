"""Check quantized kernels against the dense kernels that they represent."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwm.core.sharding import DECODE
from lwm.models.forward import dequantized, embed_tokens, multiply, text_logits
from lwm.models.llama import Llama
from lwm.models.quantized import (
    LANES,
    QUANTIZED_ROWS,
    BlockFormat,
    QuantizedKernel,
    QuantizedTensor,
    concatenate,
    has_quantized,
    lay_out,
)

OUT, INTO = 5 * LANES, 96
FORMATS = [BlockFormat(size, offsets) for size in (32, 16) for offsets in (True, False)]


def tensor(
    seed: int = 0, *, block_format: BlockFormat = FORMATS[0], out: int = OUT
) -> QuantizedTensor:
    random = np.random.default_rng(seed)
    blocks = (out, INTO // block_format.block_size)
    return QuantizedTensor(
        random.integers(-128, 128, (out, INTO)).astype(np.int8),
        random.normal(size=blocks).astype(np.float32),
        random.normal(size=blocks).astype(np.float32) if block_format.offsets else None,
    )


def dense(tensor: QuantizedTensor) -> np.ndarray:
    numbers = tensor.values.reshape(*tensor.scales.shape, -1) * tensor.scales[..., None]
    if tensor.offsets is not None:
        numbers += tensor.offsets[..., None]
    return numbers.reshape(tensor.values.shape)


def placed(tensor: QuantizedTensor) -> QuantizedKernel:
    return jax.device_put(lay_out(tensor))


@pytest.mark.parametrize("block_format", FORMATS)
def test_dequantized_kernels_equal_the_dense_ones(block_format: BlockFormat) -> None:
    stored = tensor(block_format=block_format)
    assert stored.block_format == block_format
    kernel = placed(stored)
    assert kernel.shape == (OUT, INTO)
    assert sum(x.nbytes for x in jax.tree.leaves(kernel)) == block_format.bytes(OUT * INTO)
    np.testing.assert_array_equal(kernel.dequantize(), dense(stored))
    places = jnp.array([[0, OUT - 1, 7], [8, 9, 8]])
    np.testing.assert_array_equal(kernel.rows(places), dense(stored)[np.asarray(places)])
    np.testing.assert_array_equal(kernel.rows(jnp.arange(16)), dense(stored)[:16])


@pytest.mark.parametrize(
    ("rows", "block_format"),
    [(rows, block_format) for rows in ((1, 1), (2, 2)) for block_format in FORMATS]
    + [((1, QUANTIZED_ROWS), FORMATS[0]), ((1, QUANTIZED_ROWS + 1), FORMATS[0])]
    + [((3, 9), FORMATS[1])],
)
def test_products_equal_those_of_the_dense_kernel(
    rows: tuple[int, int], block_format: BlockFormat
) -> None:
    stored = tensor(block_format=block_format)
    x = np.random.default_rng(1).normal(size=(*rows, INTO)).astype(np.float32)
    expected = x.astype(np.float64) @ dense(stored).T.astype(np.float64)
    out = jax.jit(multiply)(x, placed(stored))
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("block_format", "common"),
    [
        (BlockFormat(32, True), BlockFormat(32, True)),
        (BlockFormat(32, False), BlockFormat(32, True)),
        (BlockFormat(16, False), BlockFormat(16, True)),
    ],
)
def test_concatenated_kernels_give_the_outputs_of_each(
    block_format: BlockFormat, common: BlockFormat
) -> None:
    one, other = tensor(0), tensor(1, block_format=block_format, out=2 * LANES)
    both = concatenate([one, other])
    assert both.block_format == common
    expected = np.concatenate([dense(one), dense(other)])
    np.testing.assert_array_equal(placed(both).dequantize(), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_quantized_tables_embed_and_score(tied: bool) -> None:
    table, head = tensor(0, block_format=BlockFormat(16, False)), tensor(1)
    weights = Llama(
        embedding=placed(table),
        layers=(),
        norm=jnp.ones(INTO),
        head=None if tied else placed(head),
    )
    tokens = jnp.array([[3, OUT - 1, 0]])
    hidden = embed_tokens(weights.embedding, tokens, None, DECODE)
    np.testing.assert_array_equal(hidden, dense(table)[np.asarray(tokens)])
    dense_weights = replace(
        weights,
        embedding=jnp.asarray(dense(table)),
        head=None if tied else jnp.asarray(dense(head).T),
    )
    assert has_quantized(weights)
    assert not has_quantized(dense_weights)
    jax.tree.map(np.testing.assert_array_equal, dequantized(weights), dense_weights)
    expected = text_logits(dense_weights, hidden)
    atol = 1e-6 * float(jnp.abs(expected).max())
    np.testing.assert_allclose(text_logits(weights, hidden), expected, rtol=0, atol=atol)
