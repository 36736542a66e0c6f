"""Check every implementation of `attention` over whole sequences against the dense reference, in
values and gradients, and the reference against plain loops in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwm.attention.api import AttentionConfig, attention
from lwm.attention.kernels import cpu
from lwm.attention.mask import Side, side
from lwm.attention.order import zigzag
from lwm.attention.reference import reference_attention
from lwm.core.errors import ConfigError
from lwm.core.mesh import make_mesh

Arrays = tuple[np.ndarray, ...]

VALUES, GRADIENTS = 1e-5, 1e-4


@dataclass(frozen=True)
class Case:
    """Describe the sizes that one program is compiled for; masks are its inputs."""

    queries: int = 37
    keys: int = 37
    heads: int = 4
    kv_heads: int = 2
    causal: bool = True
    batch: int = 2
    dim: int = 6


def random_arrays(case: Case, seed: int = 0) -> Arrays:
    """Return queries, keys, values, and a direction of the output to differentiate along."""
    random = np.random.default_rng(seed)

    def normal(length: int, heads: int) -> np.ndarray:
        return random.normal(size=(case.batch, length, heads, case.dim)).astype(np.float32)

    return (
        normal(case.queries, case.heads), normal(case.keys, case.kv_heads),
        normal(case.keys, case.kv_heads), normal(case.queries, case.heads),
    )  # fmt: skip


def masks(case: Case) -> dict[str, tuple[Side, Side]]:
    """Return named pairs of sides; rows differ, and queries end where keys end."""
    random = np.random.default_rng(1)
    rows, last = 2, max(case.queries, case.keys)
    positions = np.tile(np.arange(last, dtype=np.int32), (rows, 1))
    packed = np.stack(
        [np.sort(random.integers(0, 4, last)) for _ in range(rows)]
    ).astype(np.int32)  # fmt: skip
    padded = packed.copy()
    padded[0, -9:] = -1
    padded[1, :5] = -3
    padded[1, 11:14] = -1
    mixed = random.integers(-1, 3, (rows, last)).astype(np.int32)
    order = random.permutation(last)
    restarting = positions - np.array([[np.argmax(row == s) for s in row] for row in packed])

    def pair(positions: np.ndarray, segments: np.ndarray) -> tuple[Side, Side]:
        rows = slice(-case.batch, None)
        queries, keys = slice(last - case.queries, None), slice(last - case.keys, None)
        first, second = (
            side(jnp.asarray(positions[rows, cut]), jnp.asarray(segments[rows, cut]))
            for cut in (queries, keys)
        )
        return first, second

    return {
        "plain": pair(positions, np.zeros_like(positions)),
        "packed": pair(positions, packed),
        "packed, positions restart": pair(restarting.astype(np.int32), packed),
        "padded": pair(positions, padded),
        "interleaved segments": pair(positions, mixed),
        "shuffled": pair(positions[:, order], padded[:, order]),
        "all padding": pair(positions, np.full_like(packed, -1)),
    }


# These many programs run for milliseconds, so their time is compilation.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


def values_and_gradients(attend: Callable[..., Any]) -> Callable[..., Any]:
    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(query: Any, key: Any, value: Any, along: Any, sides: tuple[Side, Side]) -> Any:
        out, pull = jax.vjp(lambda *x: attend(*x, *sides), query, key, value)
        return out, *pull(along)

    return run


@cache
def dense(causal: bool) -> Callable[..., Any]:
    return values_and_gradients(partial(reference_attention, causal=causal))


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Compare within the tolerance relative to the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    assert np.abs(actual - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-3)


def assert_agrees(run: Callable[..., Any], case: Case, names: tuple[str, ...] = ()) -> None:
    """Compare with the reference for all masks, or for those named."""
    arrays = random_arrays(case)
    for name, sides in masks(case).items():
        if names and name not in names:
            continue
        expected = dense(case.causal)(*arrays, sides)
        actual = run(*arrays, sides)
        assert_close(actual[0], expected[0], VALUES)
        for part, wanted in zip(actual[1:], expected[1:], strict=True):
            assert_close(part, wanted, GRADIENTS)


@pytest.mark.parametrize("causal", [True, False])
def test_the_reference_equals_loops_in_float64(causal: bool) -> None:
    case = Case(queries=13, keys=21, causal=causal)
    query, key, value, along = random_arrays(case)
    for sides in masks(case).values():
        out = dense(causal)(query, key, value, along, sides)[0]
        q_positions, q_segments, k_positions, k_segments = (
            np.asarray(x) for s in sides for x in (s.positions, s.segments)
        )
        expected = np.zeros(query.shape)
        for b, i, h in np.ndindex(query.shape[:3]):
            head = h // (case.heads // case.kv_heads)
            visible = [
                j
                for j in range(case.keys)
                if q_segments[b, i] == k_segments[b, j] >= 0
                and (not causal or k_positions[b, j] <= q_positions[b, i])
            ]
            if visible:
                scores = key[b, visible, head].astype(np.float64) @ query[b, i, h] / case.dim**0.5
                weights = np.exp(scores - scores.max())
                expected[b, i, h] = weights @ value[b, visible, head] / weights.sum()
        assert_close(out, expected, 1e-5)


BLOCKWISE = [
    (Case(), (16, 16)),
    (Case(heads=3, kv_heads=1, queries=11, keys=29), (3, 8)),
    (Case(heads=3, kv_heads=3, causal=False, queries=29, keys=11), (64, 4)),
    (Case(batch=1, heads=2, kv_heads=1), (1, 37)),
]


@pytest.fixture(params=["kernel", "xla"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with the kernel for CPUs, and with the code of other devices."""
    if request.param == "xla":
        monkeypatch.setattr(cpu, "supports", lambda *_: False)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(("case", "blocks"), BLOCKWISE, ids=str)
def test_blockwise_equals_the_reference(case: Case, blocks: tuple[int, int]) -> None:
    config = AttentionConfig(query_block=blocks[0], key_block=blocks[1])
    run = values_and_gradients(partial(attention, causal=case.causal, config=config))
    assert_agrees(run, case)


def test_blockwise_in_bfloat16_is_as_accurate_as_the_type() -> None:
    case = Case(heads=2, kv_heads=1)
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in random_arrays(case)]
    sides = masks(case)["padded"]
    config = AttentionConfig(query_block=16, key_block=16)
    actual = values_and_gradients(partial(attention, config=config))(*arrays, sides)
    exact = dense(True)(*(x.astype(jnp.float32) for x in arrays), sides)
    for part, wanted in zip(actual, exact, strict=True):
        assert part.dtype == jnp.bfloat16
        assert_close(part, wanted, 0.02)


@pytest.mark.parametrize(
    ("mesh", "strategy", "causal"),
    [
        ("1,1,1,4", "ring", True),
        ("1,1,1,4", "all_gather", True),
        ("1,1,1,4", "ulysses", True),
        ("1,1,2,2", "ring", False),
        ("1,1,2,2", "all_gather", False),
        ("1,1,2,2", "ulysses", True),
    ],
)
def test_sharded_sequences_equal_the_reference(mesh: str, strategy: Any, causal: bool) -> None:
    device_mesh = make_mesh(mesh)
    # One key-value head for each tensor shard; ulysses repeats it.
    kv_heads = device_mesh.shape["tensor"]
    case = Case(causal=causal, queries=37 if causal else 29, kv_heads=kv_heads)
    config = AttentionConfig(strategy=strategy, query_block=3, key_block=5)
    run = values_and_gradients(partial(attention, causal=causal, config=config, mesh=device_mesh))
    chosen = ("plain", "padded", "interleaved segments", "shuffled", "all padding")
    assert_agrees(run, case, chosen)


def test_rows_sharded_over_data_and_fsdp_equal_the_reference() -> None:
    device_mesh = make_mesh("1,2,1,2")
    config = AttentionConfig(query_block=5, key_block=4)
    run = values_and_gradients(partial(attention, config=config, mesh=device_mesh))
    assert_agrees(run, Case(heads=2, kv_heads=1), ("packed", "padded"))


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("strategy", ["ring", "all_gather"])
def test_zigzag_order_gives_the_result_of_natural_order(strategy: Any) -> None:
    case = Case(queries=40, keys=40, heads=2, kv_heads=1)
    order = zigzag(40, 4)
    assert not (order == np.arange(40)).all()
    device_mesh = make_mesh("1,1,1,4")
    config = AttentionConfig(strategy=strategy, query_block=4, key_block=4)
    run = values_and_gradients(partial(attention, config=config, mesh=device_mesh))
    arrays = random_arrays(case)
    for name in ("packed", "padded"):
        sides = masks(case)[name]
        expected = dense(True)(*arrays, sides)
        ordered = [x[:, order] for x in arrays]
        actual = run(*ordered, jax.tree.map(lambda x: x[:, order], sides))
        back = [np.asarray(x)[:, np.argsort(order)] for x in actual]
        assert_close(back[0], expected[0], VALUES)
        for part, wanted in zip(back[1:], expected[1:], strict=True):
            assert_close(part, wanted, GRADIENTS)


def test_ulysses_refuses_heads_that_devices_do_not_divide() -> None:
    case = Case(heads=6, kv_heads=2)
    query, key, value, _ = map(jnp.asarray, random_arrays(case))
    config = AttentionConfig(strategy="ulysses")
    with pytest.raises(ConfigError, match=r"6 heads .* 4 devices"):
        attention(
            query, key, value, *masks(case)["plain"], config=config, mesh=make_mesh("1,1,1,4")
        )


@pytest.mark.parametrize("name", ["query_block", "key_block"])
def test_blocks_below_one_position_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        AttentionConfig(**{name: 0})  # type: ignore[arg-type]


# Of 64 keys, those from index 32 on must not be read: each case of `forbidding` masks them for
# another reason.
FORBIDDEN = slice(32, 64)


def forbidding(how: str) -> tuple[Side, Side]:
    queries, keys = np.arange(32), np.arange(64)
    segments = np.zeros(64, np.int32)
    if how == "another segment":
        queries, segments[32:] = queries + 64, 5
    elif how == "padding":
        queries, segments[32:] = queries + 64, -1
    as_row = partial(jnp.asarray, dtype=jnp.int32)
    return (
        side(as_row(queries)[None]),
        side(as_row(keys)[None], as_row(segments)[None]),
    )


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("mesh", [None, "1,1,1,4"])
def test_fully_masked_blocks_are_not_computed(mesh: str | None) -> None:
    case = Case(batch=1, queries=32, keys=64, heads=2, kv_heads=1)
    query, key, value, along = random_arrays(case)
    poisoned = [x.copy() for x in (key, value)]
    for x in poisoned:
        x[:, FORBIDDEN] = np.nan
    config = AttentionConfig(query_block=8, key_block=8)
    device_mesh = None if mesh is None else make_mesh(mesh)
    run = values_and_gradients(partial(attention, config=config, mesh=device_mesh))
    for how in ("the future", "another segment", "padding"):
        sides = forbidding(how)
        expected = dense(True)(
            query, key[:, :32], value[:, :32], along,
            (sides[0], jax.tree.map(lambda x: x[:, :32], sides[1])),
        )  # fmt: skip
        out, for_query, for_key, for_value = run(query, *poisoned, along, sides)
        assert_close(out, expected[0], VALUES)
        assert_close(for_query, expected[1], GRADIENTS)
        for part, wanted in ((for_key, expected[2]), (for_value, expected[3])):
            assert_close(part[:, :32], wanted, GRADIENTS)
            assert (np.asarray(part)[:, FORBIDDEN] == 0).all()


def test_fully_masked_blocks_between_needed_ones_are_not_computed() -> None:
    case = Case(batch=1, queries=64, keys=64, heads=2, kv_heads=1)
    segments = jnp.asarray(np.repeat([0, 7, 0, 9], 16).astype(np.int32))[None]
    sides = side(jnp.arange(64, dtype=jnp.int32)[None], segments)
    queries = side(sides.positions, jnp.where(segments == 0, 0, -1))
    query, key, value, along = random_arrays(case)
    poisoned = [np.where((segments == 0)[..., None, None], x, np.nan) for x in (key, value)]
    config = AttentionConfig(query_block=8, key_block=8)
    run = values_and_gradients(partial(attention, config=config))
    expected = dense(True)(query, key, value, along, (queries, queries))
    out, *gradients = run(query, *poisoned, along, (queries, sides))
    assert_close(out, expected[0], VALUES)
    for part, wanted in zip(gradients, expected[1:], strict=True):
        assert_close(part, wanted, GRADIENTS)
