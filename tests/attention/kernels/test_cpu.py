"""Check the kernel for CPUs against the path compiled by XLA, and the fallback without a
compiler."""

import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwm.attention.api import attention
from lwm.attention.blocks import (
    BlockLayout,
    Keys,
    Queries,
    Sums,
    initial_sums,
    make_keys,
    make_queries,
    normalize,
)
from lwm.attention.blockwise import accumulate, accumulate_in_xla
from lwm.attention.kernels import cpu
from lwm.attention.kernels.compile import compile_c_function
from lwm.attention.mask import Side, ranges, side

# Sizes around the kernel's own: panels of 16 or 32 columns, 6 or 12 rows at a time,
# tiles of 128 keys, tasks of 192 rows.
SHAPES = [
    # batch, queries, keys, kv_heads, group, dim, query block, key block
    (1, 1, 1, 1, 1, 1, 1, 1),
    (2, 50, 300, 2, 3, 5, 50, 150),
    (1, 200, 129, 1, 1, 64, 100, 129),
    (1, 65, 257, 3, 4, 33, 65, 257),
    (2, 24, 20, 1, 2, 128, 8, 5),
]


def blocks(
    shape: tuple[int, ...], *, seed: int = 0, segments: bool = True
) -> tuple[Queries, Keys]:
    """Return random blocks; segments are those of packed rows with padding."""
    batch, queries, keys, kv_heads, group, dim, query_block, key_block = shape
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    length = max(queries, keys)
    names = np.sort(random.integers(-1, 3, (batch, length))) if segments else np.zeros((1, length))
    names[:, length // 2 : length // 2 + 3] -= 2 * segments
    whole = Side(
        positions=jnp.tile(jnp.arange(length), (batch, 1)),
        segments=jnp.broadcast_to(jnp.asarray(names, jnp.int32), (batch, length)),
    )
    first, second = (
        jax.tree.map(lambda x, n=n: x[:, length - n :], whole) for n in (queries, keys)
    )
    return (
        make_queries(
            normal(batch, queries, kv_heads * group, dim), first, kv_heads,
            BlockLayout.of(queries, query_block),
        ),
        make_keys(
            normal(batch, keys, kv_heads, dim), normal(batch, keys, kv_heads, dim), second,
            BlockLayout.of(keys, key_block),
        ),
    )  # fmt: skip


def empty_sums(queries: Queries) -> Sums:
    return initial_sums(queries.data.shape[:-1], queries.data.shape[-1])


def assert_same(actual: Sums, expected: Sums) -> None:
    for one, other in zip(normalize(actual), normalize(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert (np.isneginf(one) == np.isneginf(other)).all()
        one, other = (np.where(np.isneginf(x), 0, x) for x in (one, other))
        assert np.abs(one - other).max() <= 3e-6 * max(np.abs(other).max(), 1.0)


with_a_compiler = pytest.mark.skipif(not cpu.registered(), reason="there is no C compiler here")


def kernel(sums: Sums, queries: Queries, keys: Keys, *, causal: bool = True) -> Sums:
    assert cpu.supports(queries, keys)
    return cpu.accumulate_in_c(sums, queries, keys, causal=causal)


in_xla = jax.jit(accumulate_in_xla, static_argnames="causal")


@with_a_compiler
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_computes_the_same_as_xla(shape: tuple[int, ...]) -> None:
    for causal in (True, False):
        for segments in (True, False):
            queries, keys = blocks(shape, segments=segments)
            expected = in_xla(empty_sums(queries), queries, keys, causal=causal)
            assert_same(kernel(empty_sums(queries), queries, keys, causal=causal), expected)


@with_a_compiler
def test_the_kernel_is_used_only_for_float32() -> None:
    queries, keys = blocks(SHAPES[1])
    lower = jax.jit(partial(accumulate, causal=True)).lower
    assert "lwm_blockwise_forward" in lower(empty_sums(queries), queries, keys).as_text()
    halves = [
        jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, side)
        for side in (queries, keys)
    ]
    assert "lwm_blockwise_forward" not in lower(empty_sums(queries), *halves).as_text()


@with_a_compiler
def test_two_sets_of_keys_in_turn_equal_both_together() -> None:
    queries, keys = blocks((2, 300, 300, 2, 2, 16, 150, 100))
    first = jax.tree.map(lambda x: x[:, :2], keys)
    second = jax.tree.map(lambda x: x[:, 2:], keys)
    apart = kernel(kernel(empty_sums(queries), queries, second), queries, first)
    assert_same(apart, kernel(empty_sums(queries), queries, keys))


@with_a_compiler
def test_a_row_is_bitwise_equal_in_a_batch_and_by_itself() -> None:
    """Check that neither threads nor other rows change a row."""
    shape = (3, 500, 500, 2, 2, 16, 250, 250)
    queries, keys = blocks(shape)
    together = kernel(empty_sums(queries), queries, keys)
    for row in range(3):
        alone = [jax.tree.map(lambda x, row=row: x[row : row + 1], x) for x in (queries, keys)]
        apart = kernel(empty_sums(alone[0]), *alone)
        for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
            assert (np.asarray(one)[row] == np.asarray(other)[0]).all()


def weights_of(scores: np.ndarray) -> np.ndarray:
    """Return the weights of one query for keys with these scores."""
    count = len(scores)
    place = Side(
        positions=jnp.zeros((1, 1, 1), jnp.int32), segments=jnp.zeros((1, 1, 1), jnp.int32)
    )
    queries = Queries(
        data=jnp.ones((1, 1, 1, 1, 1, count), jnp.float32), side=place, ranges=ranges(place)
    )
    zeros = jnp.zeros((1, 1, count), jnp.int32)
    keys = Keys(
        key=jnp.asarray(np.diag(scores), jnp.float32)[None, None, None],
        value=jnp.eye(count)[None, None, None],
        side=Side(positions=zeros, segments=zeros),
    )
    return np.asarray(kernel(empty_sums(queries), queries, keys).values).reshape(-1)


@with_a_compiler
def test_weights_are_accurate_exponentials() -> None:
    scores = np.linspace(-86.5, 0, 200).astype(np.float32)
    exact = np.exp(scores.astype(np.float64))
    assert np.abs(weights_of(scores) / exact - 1).max() < 2e-7
    small = weights_of(np.array([0, -90, -1e4, -3e38], np.float32))
    assert small[0] == 1
    assert (np.abs(small[1:]) < 1e-37).all()


@with_a_compiler
def test_nan_is_preserved() -> None:
    queries, keys = blocks(SHAPES[2], segments=False)
    broken = queries.data.at[0, 1, 0, 0, 7, 3].set(jnp.nan)
    queries = Queries(data=broken, side=queries.side, ranges=queries.ranges)
    out = np.array(normalize(kernel(empty_sums(queries), queries, keys))[0])
    assert np.isnan(out[0, 1, 0, 0, 7]).all()
    out[0, 1, 0, 0, 7] = 0
    assert np.isfinite(out).all()


def test_attention_can_be_mapped_over_another_axis() -> None:
    random = np.random.default_rng(0)
    arrays = [jnp.asarray(random.normal(size=(3, 1, 20, 2, 4)), jnp.float32) for _ in range(3)]
    tokens = side(jnp.arange(20)[None])
    run = partial(attention, query_side=tokens, key_side=tokens)
    mapped = jax.vmap(run)(*arrays)
    for one, whole in zip(mapped, zip(*arrays, strict=True), strict=True):
        np.testing.assert_allclose(one, run(*whole), rtol=1e-6, atol=1e-6)


PROCESSORS = ["-mno-avx2 -mno-fma", "-mno-avx512f", "-D__AVX512F__=1"]
"""Flags that select other register sizes than this processor's."""


@with_a_compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of x86")
@pytest.mark.parametrize("flags", PROCESSORS)
def test_other_processors_compute_the_same(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLAGS", flags)
    handler = compile_c_function(Path(cpu.__file__).with_suffix(".c"), "lwm_blockwise_forward")
    name = f"lwm_blockwise_forward {flags}"
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    monkeypatch.setattr(cpu, "_TARGET", name)
    for shape in SHAPES:
        queries, keys = blocks(shape)
        expected = in_xla(empty_sums(queries), queries, keys, causal=True)
        assert_same(kernel(empty_sums(queries), queries, keys), expected)


PROGRAM = """
import jax.numpy as jnp
from lwm.attention.api import attention
from lwm.attention.mask import side
x, tokens = jnp.ones((1, 9, 2, 4)), side(jnp.arange(9)[None])
print(attention(x, x, x, tokens, tokens).sum())
print(attention(x, x, x, tokens, tokens).sum())
"""


def test_without_a_compiler_xla_computes_it_with_one_warning() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"CC": "no-such-compiler"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["72.0", "72.0"]
    assert done.stderr.count("computed by XLA") == 1
    assert "there is no C compiler" in done.stderr
