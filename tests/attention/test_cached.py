"""Check attention to a cache, in chunks and token by token, against the dense reference over the
whole sequence, on one device and on caches sharded in striped order."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from lwm.attention.cached import (
    CAPACITY_UNIT,
    DECODE_SLAB,
    SLAB,
    LayerCache,
    decode_attention,
    prefill_attention,
)
from lwm.attention.mask import side
from lwm.attention.order import striped
from lwm.attention.reference import reference_attention
from lwm.core.mesh import SEQUENCE, make_mesh

FAST_COMPILE = {"xla_backend_optimization_level": 0}
HEADS, KV_HEADS, DIM = 4, 2, 4
MESHES = [None, "1,1,1,4", "2,1,1,2", "1,1,2,2"]


def mesh_of(mesh: str | None) -> Mesh | None:
    return None if mesh is None else make_mesh(mesh)


def shards_of(mesh: str | None) -> int:
    return 1 if mesh is None else make_mesh(mesh).shape[SEQUENCE]


@cache
def prefill(mesh: str | None) -> Any:
    return jax.jit(partial(prefill_attention, mesh=mesh_of(mesh)), compiler_options=FAST_COMPILE)


@cache
def decode(mesh: str | None) -> Any:
    return jax.jit(partial(decode_attention, mesh=mesh_of(mesh)), compiler_options=FAST_COMPILE)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def stale(slots: int, capacity: int, seed: int = 9) -> LayerCache:
    """Return a cache full of the remains of earlier requests."""
    return LayerCache(
        jnp.asarray(50 * normal(slots, KV_HEADS, DIM, capacity, seed=seed)),
        jnp.asarray(50 * normal(slots, KV_HEADS, capacity, DIM, seed=seed + 1)),
    )


def cache_of(keys: np.ndarray, values: np.ndarray, capacity: int, shards: int) -> LayerCache:
    """Return a cache of keys and values [slots, seq, kv_heads, dim], and garbage after them."""
    slots, length = keys.shape[:2]
    garbage = 50 * normal(2, slots, capacity - length, KV_HEADS, DIM, seed=3)
    order = striped(capacity, shards)
    keys, values = (
        np.concatenate([x, after], axis=1)[:, order]
        for x, after in zip((keys, values), garbage, strict=True)
    )
    return LayerCache(
        jnp.asarray(keys.transpose(0, 2, 3, 1)), jnp.asarray(values.transpose(0, 2, 1, 3))
    )


@jax.jit
def causal(query: Any, key: Any, value: Any, first: Any) -> Any:
    """Attend with queries from position `first` on to keys from position 0 on."""
    positions = [jnp.arange(x.shape[1])[None].repeat(len(x), 0) for x in (query, key)]
    sides = (side(positions[0] + first), side(positions[1]))
    return reference_attention(query, key, value, *sides, causal=True)


def reference(query: np.ndarray, key: np.ndarray, value: np.ndarray, first: int) -> np.ndarray:
    return np.asarray(causal(query, key, value, np.int32(first)))


def assert_close(actual: Any, expected: Any) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("mesh", "chunk", "chunks"), [
    (None, 320, 2), ("1,1,1,4", 640, 4), ("2,1,1,2", 320, 2), ("1,1,2,2", 320, 2),
])  # fmt: skip
def test_chunks_and_then_tokens_equal_the_reference(
    mesh: str | None, chunk: int, chunks: int
) -> None:
    """Check two slots of different sequences, on devices of more than one slab each.

    The second sequence is one token shorter; the end of the last chunk is padding.
    """
    shards, slots = shards_of(mesh), 2
    real = chunk * chunks - 5
    lengths = (real, real - 1)
    total = real + 3
    query = normal(slots, total, HEADS, DIM, seed=1)
    key, value = (normal(slots, total, KV_HEADS, DIM, seed=n) for n in (2, 3))
    unit = CAPACITY_UNIT * shards
    cache = stale(slots, -(-(total + 8) // unit) * unit)  # 768 per device: a slab and a half
    order = striped(chunk, shards)

    def padded(x: np.ndarray) -> np.ndarray:
        extra = np.full((1, chunk - x.shape[1], *x.shape[2:]), 7, np.float32)
        return np.concatenate([x, extra], axis=1)[:, order]

    expected = [reference(query[s : s + 1], key[s : s + 1], value[s : s + 1], 0) for s in (0, 1)]
    for slot in (1, 0):
        before = cache
        for first in range(0, lengths[slot], chunk):
            cut = slice(first, min(first + chunk, lengths[slot]))
            parts = [padded(x[slot : slot + 1, cut]) for x in (query, key, value)]
            out, cache = prefill(mesh)(*parts, cache, slot=np.int32(slot), first=np.int32(first))
            back = np.asarray(out)[:, np.argsort(order)][:, : cut.stop - first]
            assert_close(back, expected[slot][:, cut])
        for old, new in zip(before, cache, strict=True):  # the other slot is unchanged
            np.testing.assert_array_equal(np.asarray(old)[1 - slot], np.asarray(new)[1 - slot])
    for step in range(3):
        positions = np.array(lengths, np.int32) + step
        rows = [
            np.stack([x[s, p : p + 1] for s, p in enumerate(positions)])
            for x in (query, key, value)
        ]
        out, cache = decode(mesh)(*rows, cache, positions=positions[:, None])
        for slot, position in enumerate(positions):
            assert_close(np.asarray(out)[slot, 0], expected[slot][0, position])


@pytest.mark.parametrize("mesh", MESHES)
def test_decode_at_uneven_positions_ignores_later_places(mesh: str | None) -> None:
    shards = shards_of(mesh)
    capacity = SLAB * shards
    positions = np.array([300, 0, 17, 511], np.int32)
    keys, values = (normal(4, 512, KV_HEADS, DIM, seed=n) for n in (2, 3))
    query = normal(4, 1, HEADS, DIM)
    rows = [np.stack([x[s, p : p + 1] for s, p in enumerate(positions)]) for x in (keys, values)]
    outs = []
    for garbage in (0, 1):
        later = np.arange(512)[None] >= positions[:, None]
        shifted = [np.where(later[..., None, None], x + 90 * garbage, x) for x in (keys, values)]
        cache = cache_of(shifted[0], shifted[1], capacity, shards)
        outs.append(np.asarray(decode(mesh)(query, *rows, cache, positions=positions[:, None])[0]))
    np.testing.assert_array_equal(outs[0], outs[1])
    for slot, position in enumerate(positions):
        cut = slice(slot, slot + 1)
        expected = reference(query[cut], keys[cut], values[cut], position)
        assert_close(outs[0][slot], expected[0])


@pytest.mark.parametrize("mesh", MESHES)
def test_idle_slots_write_nothing_and_get_zeros(mesh: str | None) -> None:
    shards = shards_of(mesh)
    cache = stale(4, SLAB * shards)
    before = jax.tree.map(np.asarray, cache)
    positions = np.array([-1, 6, -1, -1], np.int32)
    query, row = normal(4, 1, HEADS, DIM), normal(4, 1, KV_HEADS, DIM)
    out, after = decode(mesh)(query, row, row, cache, positions=positions[:, None])
    out, after = np.asarray(out), jax.tree.map(np.asarray, after)
    assert (out[[0, 2, 3]] == 0).all()
    # Position 6 is on device 6 mod R at index 6 // R, the only place that changes.
    place = 6 % shards * SLAB + 6 // shards
    changed = np.zeros(before.values.shape, bool)
    changed[1, :, place] = True
    np.testing.assert_array_equal(after.values != before.values, changed)
    np.testing.assert_array_equal(after.keys != before.keys, changed.swapaxes(2, 3))
    np.testing.assert_array_equal(after.values[1, :, place], row[1, 0])


@pytest.mark.parametrize("mesh", MESHES)
def test_several_tokens_of_a_slot_attend_in_order(mesh: str | None) -> None:
    """Check three tokens, one, none and five; later places contain garbage."""
    shards, width = shards_of(mesh), 5
    capacity = SLAB * shards
    counts, firsts = (3, 1, 0, 5), (300, 0, 0, 506)
    positions = np.full((4, width), -1, np.int32)
    query = normal(4, width, HEADS, DIM)
    keys, values = (normal(4, 512, KV_HEADS, DIM, seed=n) for n in (2, 3))
    rows = [normal(4, width, KV_HEADS, DIM, seed=n) for n in (5, 6)]
    cache = cache_of(keys, values, capacity, shards)
    for slot, (first, count) in enumerate(zip(firsts, counts, strict=True)):
        positions[slot, :count] = first + np.arange(count)
        keys[slot, first : first + count] = rows[0][slot, :count]
        values[slot, first : first + count] = rows[1][slot, :count]
    out, after = decode(mesh)(query, *rows, cache, positions=positions)
    out = np.asarray(out)
    assert (out[positions < 0] == 0).all()
    for slot, (first, count) in enumerate(zip(firsts, counts, strict=True)):
        cut = slice(slot, slot + 1)
        if count:
            expected = reference(query[cut, :count], keys[cut], values[cut], first)
            assert_close(out[cut, :count], expected)
    order = np.argsort(striped(capacity, shards))
    np.testing.assert_array_equal(np.asarray(after.values)[:, :, order][:, :, :512],
                                  values.swapaxes(1, 2))  # fmt: skip
    np.testing.assert_array_equal(np.asarray(after.keys)[..., order][..., :512],
                                  keys.transpose(0, 2, 3, 1))  # fmt: skip


def test_decode_beyond_one_slab_equals_the_reference() -> None:
    capacity = DECODE_SLAB + 7 * CAPACITY_UNIT
    positions = np.array([4900, 17, -1, 4096], np.int32)
    keys, values = (normal(4, 4901, KV_HEADS, DIM, seed=n) for n in (2, 3))
    query = normal(4, 1, HEADS, DIM)
    rows = [normal(4, 1, KV_HEADS, DIM, seed=n) for n in (5, 6)]
    cache = cache_of(keys, values, capacity, 1)
    out = np.asarray(decode(None)(query, *rows, cache, positions=positions[:, None])[0])
    for slot, position in enumerate(positions):
        if position < 0:
            assert (out[slot] == 0).all()
            continue
        cut = slice(slot, slot + 1)
        key, value = (x[cut].copy() for x in (keys, values))
        key[0, position], value[0, position] = rows[0][slot, 0], rows[1][slot, 0]
        assert_close(out[slot], reference(query[cut], key, value, position)[0])
