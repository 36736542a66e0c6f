"""Check everything that derives from `ParamSpec` against the arrays it describes."""

import jax
import jax.numpy as jnp
import numpy as np

from lwm.core.mesh import make_mesh
from lwm.core.params import (
    ParamSpec,
    abstract,
    cast,
    count,
    initialize,
    normal,
    ones,
    shardings,
    stack,
)
from lwm.core.sharding import TRAINING

SPECS = {
    "kernel": ParamSpec((64, 32), ("embed", "mlp"), normal(0.5)),
    "norm": ParamSpec((64,), ("norm",), ones()),
}


def test_count_is_the_number_of_elements_created() -> None:
    weights = initialize(SPECS, jax.random.key(0), jnp.float32)
    assert count(SPECS) == sum(x.size for x in jax.tree.leaves(weights)) == 64 * 32 + 64


def test_initializers_give_the_declared_shapes_and_distributions() -> None:
    weights = initialize(SPECS, jax.random.key(0), jnp.bfloat16)
    assert weights["kernel"].shape == (64, 32)
    assert weights["kernel"].dtype == weights["norm"].dtype == jnp.bfloat16
    kernel = np.asarray(weights["kernel"], np.float32)
    # 2,048 draws: the standard error of the deviation is 0.5 / sqrt(4096).
    assert abs(kernel.std() - 0.5) < 0.04
    assert abs(kernel.mean()) < 0.06
    assert (weights["norm"] == 1).all()


def test_keys_decide_and_leaves_differ() -> None:
    twice = {"a": SPECS["kernel"], "b": SPECS["kernel"]}
    first, again, other = (
        initialize(twice, jax.random.key(seed), jnp.float32) for seed in (1, 1, 2)
    )
    assert (first["a"] == again["a"]).all()
    assert not (first["a"] == other["a"]).any()
    assert not (first["a"] == first["b"]).any()


def test_stack_adds_an_axis_that_is_never_sharded() -> None:
    stacked = stack(SPECS, 3)
    assert stacked["kernel"].shape == (3, 64, 32)
    assert stacked["norm"].axes == ("layers", "norm")
    assert count(stacked) == 3 * count(SPECS)
    weights = initialize(stacked, jax.random.key(0), jnp.float32)
    assert not (weights["kernel"][0] == weights["kernel"][1]).any()


def test_abstract_trees_have_shapes_without_data() -> None:
    tree = abstract(SPECS, jnp.bfloat16)
    assert tree["kernel"] == jax.ShapeDtypeStruct((64, 32), jnp.bfloat16)


def test_sharded_initialization_is_the_same_numbers_in_parts() -> None:
    mesh = make_mesh("1,2,2,1")
    whole = initialize(SPECS, jax.random.key(3), jnp.float32)
    parts = initialize(SPECS, jax.random.key(3), jnp.float32, mesh=mesh, rules=TRAINING)
    assert parts["kernel"].sharding == shardings(SPECS, mesh, TRAINING)["kernel"]
    assert {s.data.shape for s in parts["kernel"].addressable_shards} == {(32, 16)}
    assert {s.data.shape for s in parts["norm"].addressable_shards} == {(64,)}
    np.testing.assert_array_equal(parts["kernel"], whole["kernel"])


def test_cast_names_the_types_of_parameters() -> None:
    assert np.dtype(cast("float32")).itemsize == 4
    assert np.dtype(cast("bfloat16")).name == "bfloat16"
