"""The one entry point to attention over whole sequences.

Chooses an implementation by configuration and, on a mesh whose `sequence` axis is longer than 1, a
strategy. Attention that reads a cache is in `cached`. Knows the logical axes of its own arrays;
knows nothing of models.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from lwm.attention.blockwise import blockwise_attention
from lwm.attention.mask import Side, pad
from lwm.attention.order import zigzag_length
from lwm.attention.reference import reference_attention
from lwm.attention.ring import all_gather_attention, ring_attention, ulysses_attention
from lwm.core.errors import ConfigError
from lwm.core.mesh import SEQUENCE
from lwm.core.sharding import TRAINING, partition_spec

_STRATEGIES = {
    "ring": ring_attention,
    "all_gather": all_gather_attention,
    "ulysses": ulysses_attention,
}


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """How attention is computed; what it computes is the same for every setting."""

    implementation: Literal["blockwise", "reference"] = "blockwise"
    strategy: Literal["ring", "all_gather", "ulysses"] = "ring"  # over the sequence axis
    query_block: int = 512
    key_block: int = 512

    def __post_init__(self) -> None:
        for name in ("query_block", "key_block"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"attention.{name} is {getattr(self, name)}; it must be at least 1 position"
                )


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
    """Attention of queries to the keys their positions and segments allow.

    On a mesh the arrays are global and sharded by the training rules. The order of the sequence is
    the caller's: any gives the right answer, the zigzag of `order` gives it in balance. Lengths
    need not be multiples of anything.

    Raises:
        ConfigError: the strategy cannot serve these heads on this mesh.
    """
    if config.implementation == "reference":
        return reference_attention(query, key, value, query_side, key_side, causal=causal)
    blockwise = partial(
        blockwise_attention,
        causal=causal,
        query_block=config.query_block,
        key_block=config.key_block,
    )
    if mesh is None or mesh.size == 1:
        return blockwise(query, key, value, query_side, key_side)
    shards = mesh.shape[SEQUENCE]
    if shards == 1:
        local = blockwise
    else:
        local = partial(
            _STRATEGIES[config.strategy],
            axis=SEQUENCE,
            causal=causal,
            query_block=config.query_block,
            key_block=config.key_block,
        )
    queries, keys = query.shape[1], key.shape[1]
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
