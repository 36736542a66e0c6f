"""Compute attention over whole sequences, on one device or sharded along a mesh axis.

A strategy decides what the devices of the `sequence` axis exchange: keys and values around a ring,
all keys and values, or heads for sequence. It runs inside `shard_map`, where every array is one
device's part; its argument `attend` is `_blockwise` with block sizes and causality bound. To add a
strategy, write such a function and name it in `_STRATEGIES`. Attention to a key-value cache is in
`cached`.

Sources: Liu, Zaharia & Abbeel 2023 (arXiv 2310.01889) for the ring; Jacobs et al. 2023 (arXiv
2309.14509) for Ulysses.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from annotated_types import Ge
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float

from lwm.attention.blocks import (
    BlockLayout,
    Keys,
    Queries,
    initial_sums,
    make_keys,
    make_queries,
    normalize,
)
from lwm.attention.blockwise import OutputGradients
from lwm.attention.mask import Side, pad
from lwm.attention.order import zigzag_length
from lwm.attention.reference import reference_attention
from lwm.attention.ring import ring_accumulate, ring_gradients
from lwm.core.config import Checked
from lwm.core.errors import ConfigError
from lwm.core.mesh import SEQUENCE
from lwm.core.sharding import TRAINING, partition_spec

CHECKPOINT_NAME = "attention"
"""Name by which a rematerialization policy saves an output and its log-sum-exp: all that the
backward pass needs of the forward pass, besides queries, keys and values."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(Checked, section="attention"):
    """Configure how attention is computed; the result is the same for every setting."""

    implementation: Literal["blockwise", "reference"] = "blockwise"
    """Blocks with an online softmax, or the dense reference, which needs [seq, seq] scores."""
    strategy: Literal["ring", "all_gather", "ulysses"] = "ring"
    """How devices of the sequence axis exchange keys and values."""
    query_block: Annotated[int, Ge(1)] = 512
    """Queries computed at a time."""
    key_block: Annotated[int, Ge(1)] = 512
    """Keys computed at a time."""


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
    """
    if config.implementation == "reference":
        return reference_attention(query, key, value, query_side, key_side, causal=causal)
    blocks = (config.query_block, config.key_block)
    attend: Callable[..., Array] = partial(_blockwise, causal=causal, blocks=blocks)
    if mesh is None or mesh.size == 1:
        return attend(query, key, value, query_side, key_side)
    shards, queries, keys = mesh.shape[SEQUENCE], query.shape[1], key.shape[1]
    if shards > 1:
        attend = partial(_STRATEGIES[config.strategy], attend)
        query, query_side = _pad(query, query_side, zigzag_length(queries, shards))
        value, _ = _pad(value, key_side, zigzag_length(keys, shards))
        key, key_side = _pad(key, key_side, zigzag_length(keys, shards))
    heads = partition_spec(("batch", "position", "heads", None), TRAINING)
    kv_heads = partition_spec(("batch", "position", "kv_heads", None), TRAINING)
    sides = partition_spec(("batch", "position"), TRAINING)
    out = jax.shard_map(
        attend,
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


class _Plan(NamedTuple):
    """Hold what is constant in a program; on an axis, keys and values are passed around it."""

    query_layout: BlockLayout
    key_layout: BlockLayout
    causal: bool
    axis: str | None


def _split(
    plan: _Plan, query: Array, key: Array, value: Array, query_side: Side, key_side: Side
) -> tuple[Queries, Keys]:
    queries = make_queries(query, query_side, key.shape[2], plan.query_layout)
    return queries, make_keys(key, value, key_side, plan.key_layout)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: _Plan, *arrays: Any) -> Array:
    return _forward(plan, *arrays)[0]


def _forward(plan: _Plan, *arrays: Any) -> tuple[Array, Any]:
    query = arrays[0]
    queries, keys = _split(plan, *arrays)
    sums = initial_sums(queries.data.shape[:-1], query.shape[-1])
    sums = ring_accumulate(sums, queries, keys, plan.axis, causal=plan.causal)
    blocks, logsumexp = normalize(sums)
    out = plan.query_layout.join_queries(blocks).astype(query.dtype)
    out, logsumexp = (checkpoint_name(x, CHECKPOINT_NAME) for x in (out, logsumexp))
    return out, (arrays, out, logsumexp)


def _backward(plan: _Plan, residuals: Any, gradient: Array) -> tuple[Any, ...]:
    arrays, out, logsumexp = residuals
    query, key, value = arrays[:3]
    split = partial(plan.query_layout.split_queries, kv_heads=key.shape[2])
    queries, keys = _split(plan, *arrays)
    out, gradient = split(out), split(gradient)
    outputs = OutputGradients(
        gradient=gradient,
        product=jnp.sum(out.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1),
        # Rows without keys have -inf; any finite value keeps exp(-inf - x) at 0 for them.
        logsumexp=jnp.where(jnp.isneginf(logsumexp), 0.0, logsumexp),
    )
    dq, dk, dv = ring_gradients(queries, outputs, keys, plan.axis, causal=plan.causal)
    dq = plan.query_layout.join_queries(dq) * query.shape[-1] ** -0.5
    dk, dv = (plan.key_layout.join(x.swapaxes(2, 3)) for x in (dk, dv))
    return dq.astype(query.dtype), dk.astype(key.dtype), dv.astype(value.dtype), None, None


_attention.defvjp(_forward, _backward)


def _blockwise(
    query: Array,
    key: Array,
    *rest: Any,
    causal: bool,
    blocks: tuple[int, int],
    chunks: tuple[int, ...] = (1, 1),
    axis: str | None = None,
) -> Array:
    """Compute attention in blocks of at most these sizes, each inside one of `chunks` equal runs.

    Blocks and chunks are pairs, for queries and for keys (see `BlockLayout`).
    """
    lengths = (query.shape[1], key.shape[1])
    query_layout, key_layout = map(BlockLayout.of, lengths, blocks, chunks)
    return _attention(_Plan(query_layout, key_layout, causal, axis), query, key, *rest)


def _runs(x: Array) -> int:
    """Return how many runs of positions a shard has: a zigzag shard two, if its length is even."""
    return 2 if x.shape[1] % 2 == 0 else 1


def _ring(attend: Callable[..., Array], query: Array, key: Array, *rest: Any) -> Array:
    """Pass keys and values around the devices: the least memory."""
    return attend(query, key, *rest, chunks=(_runs(query), _runs(key)), axis=SEQUENCE)


def _all_gather(
    attend: Callable[..., Array], query: Array, key: Array, value: Array, *sides: Side
) -> Array:
    """Gather all keys and values on every device: the least latency, while they fit."""
    gather = partial(jax.lax.all_gather, axis_name=SEQUENCE, axis=1, tiled=True)
    chunks = (_runs(query), _runs(key) * jax.lax.axis_size(SEQUENCE))
    key, value, key_side = jax.tree.map(gather, (key, value, sides[1]))
    return attend(query, key, value, sides[0], key_side, chunks=chunks)


def _ulysses(
    attend: Callable[..., Array], query: Array, key: Array, value: Array, *sides: Side
) -> Array:
    """Exchange heads for sequence: each device computes a share of the heads over all positions.

    Raises ConfigError if the devices do not divide the heads.
    """
    size = jax.lax.axis_size(SEQUENCE)
    heads, kv_heads = query.shape[2], key.shape[2]
    require_heads(heads, size)
    # Repeat key-value heads until each device gets a whole one.
    repeats = size // math.gcd(kv_heads, size)
    key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
    exchange = partial(jax.lax.all_to_all, axis_name=SEQUENCE, tiled=True)
    gather = partial(jax.lax.all_gather, axis_name=SEQUENCE, axis=1, tiled=True)
    chunks = (_runs(query) * size, _runs(key) * size)
    arrays = (exchange(x, split_axis=2, concat_axis=1) for x in (query, key, value))
    out = attend(*arrays, *jax.tree.map(gather, sides), chunks=chunks)
    return exchange(out, split_axis=1, concat_axis=2)


_STRATEGIES = {"ring": _ring, "all_gather": _all_gather, "ulysses": _ulysses}


def require_heads(heads: int, devices: int) -> None:
    """Raise ConfigError if `ulysses` cannot divide a tensor shard's heads over the devices."""
    if heads % devices:
        raise ConfigError(
            f"ulysses divides heads over the sequence axis, but {heads} heads on each tensor "
            f"shard cannot be divided by {devices} devices; choose the strategy 'ring' or another "
            "mesh"
        )
