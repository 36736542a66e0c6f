"""Check the blocks that are needed against the dense mask, the orders of a sharded sequence and
their balance of work, and the memory of compiled programs."""

import re
from functools import partial
from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from lwm.attention.api import attention
from lwm.attention.blocks import BlockLayout
from lwm.attention.mask import allowed, needed, pad, ranges, side
from lwm.attention.order import striped, zigzag, zigzag_length
from lwm.core.mesh import make_mesh

QUERY_BLOCKS, QUERY_BLOCK, KEY_BLOCKS, KEY_BLOCK = 4, 3, 3, 5


def integers(shape: tuple[int, int], least: int, most: int) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.int32, shape, elements=st.integers(least, most))


def dense_mask(
    positions: np.ndarray, segments: np.ndarray, k_positions: np.ndarray, k_segments: np.ndarray,
    causal: bool,
) -> np.ndarray:  # fmt: skip
    """Return, by loops, which pairs of [blocks, block] sides contain an allowed pair of tokens."""
    out = np.zeros((len(positions), len(k_positions)), bool)
    for i, j in np.ndindex(out.shape):
        out[i, j] = any(
            s == t >= 0 and (not causal or q >= k)
            for q, s in zip(positions[i], segments[i], strict=True)
            for k, t in zip(k_positions[j], k_segments[j], strict=True)
        )
    return out


@jax.jit
def both_needed(*sides: jax.Array) -> tuple[jax.Array, jax.Array]:
    query, key = (ranges(side(*sides[i : i + 2])) for i in (0, 2))
    query, key = (
        jax.tree.map(lambda x: x[:, None], query),
        jax.tree.map(lambda x: x[None], key),
    )
    return needed(query, key, causal=True), needed(query, key, causal=False)


@given(
    st.tuples(
        integers((QUERY_BLOCKS, QUERY_BLOCK), 0, 12), integers((QUERY_BLOCKS, QUERY_BLOCK), -2, 3),
        integers((KEY_BLOCKS, KEY_BLOCK), 0, 12), integers((KEY_BLOCKS, KEY_BLOCK), -2, 3),
    )
)  # fmt: skip
def test_no_needed_block_is_omitted(sides: tuple[np.ndarray, ...]) -> None:
    for answer, causal in zip(both_needed(*sides), (True, False), strict=True):
        assert not (dense_mask(*sides, causal=causal) & ~np.asarray(answer)).any()


@given(
    st.lists(st.integers(0, 2), min_size=16, max_size=16),
    st.lists(st.booleans(), min_size=16, max_size=16),
    st.permutations(range(4)),
)
def test_needed_is_exact_for_contiguous_segments_and_positions(
    steps: list[int], padding: list[bool], order: list[int]
) -> None:
    positions = np.arange(16, dtype=np.int32).reshape(4, 4)[order]
    segments = np.where(padding, -1, np.cumsum(steps)).astype(np.int32).reshape(4, 4)[order]
    sides = (positions, segments, positions, segments)
    for answer, causal in zip(both_needed(*sides), (True, False), strict=True):
        np.testing.assert_array_equal(np.asarray(answer), dense_mask(*sides, causal=causal))


def test_padding_neither_attends_nor_is_attended_to() -> None:
    sides = pad(side(jnp.arange(3)[None]), 5)
    mask = np.asarray(allowed(sides, sides, causal=False))[0]
    np.testing.assert_array_equal(mask, np.pad(np.ones((3, 3), bool), ((0, 2), (0, 2))))


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 3))
def test_blocks_are_even_and_stay_inside_chunks(run: int, block: int, chunks: int) -> None:
    cut = BlockLayout.of(run * chunks, block, chunks)
    assert cut.block <= block
    blocks = -(-run // cut.block)
    assert blocks == -(-run // block)
    assert blocks * cut.block - run < blocks  # even: less than one position per block is padding


def test_blocks_contain_the_positions_of_one_chunk_each() -> None:
    x = jnp.arange(22).reshape(1, 22)
    cut = BlockLayout.of(22, 4, 2)
    blocks = cut.split(x, fill=-1)
    assert blocks.shape == (1, 6, 4)
    np.testing.assert_array_equal(blocks[0, 2], [8, 9, 10, -1])
    np.testing.assert_array_equal(blocks[0, 3], [11, 12, 13, 14])
    np.testing.assert_array_equal(cut.join(blocks), x)


@given(st.integers(1, 8), st.integers(1, 12))
def test_orders_are_permutations_that_place_tokens_on_the_right_device(
    shards: int, run: int
) -> None:
    length = 2 * shards * run
    pairs, stripes = zigzag(length, shards), striped(length, shards)
    assert sorted(pairs) == sorted(stripes) == list(range(length))
    for rank in range(shards):
        local = slice(rank * 2 * run, (rank + 1) * 2 * run)
        last = (2 * shards - 1 - rank) * run
        assert [*pairs[local]] == [*range(rank * run, (rank + 1) * run), *range(last, last + run)]
        assert (stripes[local] % shards == rank).all()
        assert [*stripes[local]] == sorted(stripes[local])


@given(st.integers(1, 10_000), st.integers(1, 64))
def test_zigzag_pads_to_the_next_multiple(length: int, shards: int) -> None:
    padded = zigzag_length(length, shards)
    assert padded % (2 * shards) == 0
    assert 0 <= padded - length < 2 * shards


def blocks_per_rank(order: np.ndarray, shards: int, runs: int, block: int) -> np.ndarray:
    """Count the key blocks that the queries of each rank need under causality."""
    length = len(order)
    cut = BlockLayout.of(length // shards, block, runs)
    parts = jnp.asarray(order.astype(np.int32)).reshape(shards, 1, -1)
    block_ranges = ranges(
        jax.tree.map(lambda *x: jnp.concatenate(x), *[cut.split_side(side(p)) for p in parts])
    )
    flat = jax.tree.map(lambda x: x.reshape(-1), block_ranges)
    counts = needed(
        jax.tree.map(lambda x: x[:, None], flat),
        jax.tree.map(lambda x: x[None], flat),
        causal=True,
    ).sum(axis=1)
    return np.asarray(counts).reshape(shards, -1).sum(axis=1)


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_zigzag_balances_the_blocks_of_all_ranks(shards: int) -> None:
    length, block = 8192, 64
    work = blocks_per_rank(zigzag(length, shards), shards, 2, block)
    blocks = length // block
    assert work.sum() == blocks * (blocks + 1) / 2  # exactly the triangle
    assert work.max() <= 1.1 * work.min()
    contiguous = blocks_per_rank(np.arange(length), shards, 1, block)
    assert contiguous.max() > 2 * contiguous.min()


def compile_step(length: int, mesh: str | None) -> Any:
    """Compile forward and backward passes over plain causal sequences."""
    laid = None if mesh is None else make_mesh(mesh)
    attend = partial(attention, mesh=laid)

    def loss(
        query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array
    ) -> jax.Array:
        return attend(query, key, value, side(positions), side(positions)).sum()

    array = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    positions = jax.ShapeDtypeStruct((1, length), jnp.int32)
    options = {"xla_backend_optimization_level": 0}
    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), compiler_options=options)
    return step.lower(array, array, array, positions).compile()


def largest_array(program: Any) -> int:
    """Return the elements of the largest array in the optimized program."""
    shapes = re.findall(r"\b(?:pred|[fsu]\d+|bf16)\[([\d,]+)\]", program.as_text() or "")
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


@pytest.mark.parametrize("mesh", [None, "1,1,1,4"])
def test_no_program_contains_the_square_and_memory_grows_linearly(mesh: str | None) -> None:
    # On a mesh the program is one device's, with a quarter of the sequence.
    lengths = (4096, 8192) if mesh is None else (8192, 16384)
    programs = [compile_step(length, mesh) for length in lengths]
    shards = 1 if mesh is None else 4
    for program, length in zip(programs, lengths, strict=True):
        # The largest squares are blocks of 512 by 512; whole arrays have 8 numbers per position.
        assert largest_array(program) <= max(512 * 512, 8 * length)
        assert largest_array(program) < (length / shards) ** 2 / 8
    memory = [program.memory_analysis().temp_size_in_bytes for program in programs]
    assert memory[1] < 2.1 * memory[0]
