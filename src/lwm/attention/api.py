"""Compute attention over whole sequences, by the implementation and strategy of a configuration.

Attention to a key-value cache is in `cached`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge
from jax.sharding import Mesh
from jaxtyping import Array, Float

from lwm.attention.mask import Side, pad
from lwm.attention.order import zigzag_length
from lwm.attention.reference import reference_attention
from lwm.attention.strategies import (
    all_gather_attention,
    blockwise_attention,
    ring_attention,
    ulysses_attention,
)
from lwm.core.config import Checked
from lwm.core.mesh import SEQUENCE
from lwm.core.sharding import TRAINING, partition_spec

_STRATEGIES = {
    "ring": ring_attention,
    "all_gather": all_gather_attention,
    "ulysses": ulysses_attention,
}


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(Checked, section="attention"):
    """Configure how attention is computed; the result is the same for every setting."""

    implementation: Literal["blockwise", "reference"] = "blockwise"
    strategy: Literal["ring", "all_gather", "ulysses"] = "ring"  # over the sequence axis
    query_block: Annotated[int, Ge(1)] = 512
    key_block: Annotated[int, Ge(1)] = 512


def attention(
    query: Float[Array, "batch queries heads dim"],
    key: Float[Array, "batch keys kv_heads dim"],
    value: Float[Array, "batch keys kv_heads dim"],
    query_side: Side,
    key_side: Side,
    *,
    causal: bool = True,
    config: AttentionConfig = AttentionConfig(),
    mesh: Mesh | None = None,
) -> Float[Array, "batch queries heads dim"]:
    """Compute attention of queries to the keys that their positions and segments allow.

    On a mesh the arrays are global and sharded by the training rules. The sequence may be in any
    order; the zigzag order of `order` balances the work. Lengths need not be multiples of
    anything.

    Raises:
        ConfigError: the strategy does not support these heads on this mesh.
    """
    arrays = (query, key, value, query_side, key_side)
    if config.implementation == "reference":
        return reference_attention(*arrays, causal=causal)
    attend = partial(
        blockwise_attention,
        causal=causal,
        query_block=config.query_block,
        key_block=config.key_block,
    )
    if mesh is None or mesh.size == 1:
        return attend(*arrays)
    if mesh.shape[SEQUENCE] > 1:
        attend = partial(_STRATEGIES[config.strategy], attend, axis=SEQUENCE)
    return _sharded(attend, *arrays, mesh=mesh)


def _sharded(
    local: Callable[..., Array], query: Array, key: Array, value: Array,
    query_side: Side, key_side: Side, *, mesh: Mesh,
) -> Array:  # fmt: skip
    """Pad the sequences to zigzag lengths and run `local` on each device's part."""
    shards, queries, keys = mesh.shape[SEQUENCE], query.shape[1], key.shape[1]
    if shards > 1:
        query, query_side = _pad(query, query_side, zigzag_length(queries, shards))
        value, _ = _pad(value, key_side, zigzag_length(keys, shards))
        key, key_side = _pad(key, key_side, zigzag_length(keys, shards))
    heads = partition_spec(("batch", "position", "heads", None), TRAINING)
    kv_heads = partition_spec(("batch", "position", "kv_heads", None), TRAINING)
    sides = partition_spec(("batch", "position"), TRAINING)
    out = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(heads, kv_heads, kv_heads, sides, sides),
        out_specs=heads,
        check_vma=False,
    )(query, key, value, query_side, key_side)
    return out[:, :queries]


def _pad(x: Array, side: Side, length: int) -> tuple[Array, Side]:
    if x.shape[1] == length:
        return x, side
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))), pad(side, length)
