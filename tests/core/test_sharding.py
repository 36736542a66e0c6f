"""Check the sharding rules against the shards that jax places."""

import jax
import jax.numpy as jnp
import pytest

from lwm.core.errors import ConfigError
from lwm.core.mesh import make_mesh
from lwm.core.sharding import (
    DECODE,
    TRAINING,
    constrain,
    named_sharding,
    require_divisible,
    shard_count,
)


def test_arrays_are_sharded_by_the_rules() -> None:
    x = jnp.arange(4 * 8 * 6.0).reshape(4, 8, 6)
    sharding = named_sharding(make_mesh("2,1,1,2"), ("batch", "position", "heads"), TRAINING)
    placed = jax.device_put(x, sharding)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 4, 6)}
    assert (placed == x).all()


@pytest.mark.parametrize(
    ("axis", "parts"),
    [("batch", 4), ("position", 1), ("embed", 2), ("heads", 1), ("norm", 1), ("activation", 1)],
)
def test_shard_count_multiplies_the_mesh_axes(axis: str, parts: int) -> None:
    assert shard_count(make_mesh("2,2,1,1"), axis, TRAINING) == parts


def test_constrain_shards_inside_a_compiled_function() -> None:
    mesh, x = make_mesh("1,1,1,4"), jnp.ones((2, 8, 3))

    def double(x: jax.Array) -> jax.Array:
        return constrain(x * 2, mesh, ("batch", "position", "activation"), TRAINING)

    out = jax.jit(double)(x)
    assert {shard.data.shape for shard in out.addressable_shards} == {(2, 2, 3)}
    assert constrain(x, None, ("batch", "position", "activation"), TRAINING) is x


def test_sizes_that_do_not_divide_are_refused_by_name_with_both_numbers() -> None:
    mesh = make_mesh("1,1,4,1")
    require_divisible(mesh, {"heads": 8, "kv_heads": 4, "norm": 7}, DECODE)
    with pytest.raises(ConfigError, match=r"kv heads \(6\).* 4 parts"):
        require_divisible(mesh, {"heads": 8, "kv_heads": 6}, DECODE)
