"""Check sizes, operations and memory against transformers and hand calculation, and the cache
against its calculated size."""

import jax
import numpy as np
import pytest
import torch
import transformers

from lwm.core.errors import CapacityError, ConfigError
from lwm.core.mesh import make_mesh
from lwm.models.cache import cache_capacity, grow_cache, make_cache
from lwm.models.llama import LlamaConfig
from lwm.models.sizes import (
    NAMES,
    cache_bytes,
    parameter_count,
    size,
    training_flops,
    weight_bytes,
)

SMALL = LlamaConfig(
    vocab_size=10, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=4, max_sequence_length=64,
)  # fmt: skip


def test_the_7b_model_has_its_published_size() -> None:
    assert parameter_count(size("7b")) == 6_738_415_616
    assert weight_bytes(size("7b"), "bfloat16") == 13_476_831_232
    assert weight_bytes(size("7b"), "float32") == 4 * 6_738_415_616


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts_equal_those_of_transformers(name: str) -> None:
    config = size(name)
    # The difference between two layers and one is a layer; the rest is embedding, norm and head.
    counts = []
    for layers in (1, 2):
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(
                    vocab_size=32000,
                    hidden_size=config.hidden_size,
                    intermediate_size=config.intermediate_size,
                    num_hidden_layers=layers,
                    num_attention_heads=config.num_heads,
                    tie_word_embeddings=False,
                )
            )
        counts.append(sum(parameter.numel() for parameter in model.parameters()))
    one, two = counts
    assert parameter_count(config) == one + (config.num_layers - 1) * (two - one)


def test_an_unknown_size_is_refused_with_a_list_of_sizes() -> None:
    with pytest.raises(ConfigError, match=r"'8b'.*7b.*65b"):
        size("8b")


def test_operations_equal_a_hand_calculation() -> None:
    # A layer: query 8x8, key and value 8x4 each, output 8x8, three of 8x12; the head 8x10.
    matrices = 2 * (64 + 32 + 32 + 64 + 3 * 96) + 80
    # Segments of five and of two tokens have 15 and 3 pairs; scores and weighted values are 2 * 4
    # operations for each of 2 heads and each pair, in 2 layers. Each product is computed in three
    # passes.
    kernels, attention = 2 * matrices * 7, 2 * 2 * (2 * 4 + 2 * 4) * 18
    assert training_flops(SMALL, tokens=7, pairs=18) == 3 * kernels + 3 * attention
    # With adapters of 50 parameters the frozen kernels get no gradient: two passes.
    with_adapters = 2 * kernels + 3 * (2 * 50 * 7) + 3 * attention
    assert training_flops(SMALL, tokens=7, pairs=18, adapters=50) == with_adapters


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_cache_bytes_equal_the_size_of_the_cache(dtype: str, width: int) -> None:
    assert cache_bytes(SMALL, 100, dtype, slots=3) == 3 * 100 * 2 * 2 * 1 * 4 * width
    cache = make_cache(SMALL, slots=3, capacity=512, dtype=dtype)
    assert cache_bytes(SMALL, 512, dtype, slots=3) == sum(x.nbytes for x in jax.tree.leaves(cache))


@pytest.mark.parametrize(("tokens", "mesh"), [(1, None), (700, None), (700, "1,1,1,4")])
def test_capacity_holds_the_tokens_in_equal_parts(tokens: int, mesh: str | None) -> None:
    device_mesh = None if mesh is None else make_mesh(mesh)
    capacity = cache_capacity(tokens, device_mesh)
    assert capacity >= tokens
    assert capacity % (1 if device_mesh is None else 4) == 0
    assert cache_capacity(capacity, device_mesh) == capacity


def test_a_cache_is_created_in_its_shards() -> None:
    cache = make_cache(SMALL, slots=2, capacity=1024, dtype="float32", mesh=make_mesh("2,1,1,2"))
    assert {x.data.shape for x in cache[0].keys.addressable_shards} == {(1, 1, 4, 512)}
    assert {x.data.shape for x in cache[0].values.addressable_shards} == {(1, 1, 512, 4)}


def test_a_cache_beyond_memory_is_refused_with_both_sizes() -> None:
    # Four simulated devices share the host's memory, so sharding does not make the cache fit.
    for mesh in (None, make_mesh("1,1,1,4")):
        with pytest.raises(CapacityError, match=r"64000\.00 GB.* GB.*free"):
            make_cache(SMALL, slots=1, capacity=10**12, dtype="float32", mesh=mesh)


@pytest.mark.parametrize("mesh", [None, "1,1,1,4", "2,1,1,2"])
def test_growing_preserves_the_place_of_every_position(mesh: str | None) -> None:
    device_mesh = None if mesh is None else make_mesh(mesh)
    shards = 1 if device_mesh is None else device_mesh.shape["sequence"]
    old, new = 512 * shards, 768 * shards
    cache = make_cache(SMALL, slots=2, capacity=old, dtype="float32", mesh=device_mesh)
    filled = jax.tree.map(
        lambda x: jax.device_put(
            np.random.default_rng(0).normal(size=x.shape).astype(np.float32), x.sharding
        ),
        cache,
    )
    before = jax.tree.map(np.asarray, filled)
    grown = grow_cache(filled, new, device_mesh)
    for was, now in zip(before, grown, strict=True):
        assert now.values.shape == (2, 1, new, 4)
        for position in (0, 1, 5, 511, old - 1):
            old_place, new_place = (
                position % shards * (size // shards) + position // shards for size in (old, new)
            )
            np.testing.assert_array_equal(was.values[:, :, old_place], now.values[:, :, new_place])
            np.testing.assert_array_equal(was.keys[..., old_place], now.keys[..., new_place])
