"""Blockwise attention: exact, in memory linear in the sequence, skipping every block that is
wholly masked.

Queries and keys come in blocks (`blocks`); each query block meets its key blocks one after another
under an online softmax, and the backward pass recomputes the scores from the saved log-sum-exp.
Blocks that causality or segments rule out are never computed: loops run over the needed range
alone, and inside it a condition passes over the rest.

`forward` and `backward` handle one set of keys and carry their sums on, so that a ring can call
them for each set that comes round. On a CPU `forward` is a kernel in C where that can be compiled.
Knows arrays and masks; knows nothing of devices, caches or models.

Sources: Milakov & Gimelshein 2018 (arXiv 1805.02867) for the online softmax; Dao 2023 (arXiv
2307.08691) for the backward pass; Liu & Abbeel 2023 (arXiv 2305.19370) for the blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from lwm.attention.blocks import Cut, Keys, Queries, cut_keys, cut_queries
from lwm.attention.kernels import cpu
from lwm.attention.mask import Ranges, Side, allowed, needed, ranges
from lwm.attention.online_softmax import Sums, finish, start

CHECKPOINT_NAME = "attention"
"""Name under which a rematerialisation policy may keep an output and its log-sum-exp, all that the
backward pass needs of the forward pass besides queries, keys and values."""


def update(
    sums: Sums,
    query: Float[Array, "kv_heads group block dim"],
    key: Float[Array, "kv_heads keys dim"],
    value: Float[Array, "kv_heads keys dim"],
    mask: Bool[Array, "block keys"] | None,
) -> Sums:
    """One query block meets one key block; without a mask, every query sees every key."""

    def heads(sums: Sums, query: Array, key: Array, value: Array) -> Sums:
        scores = jnp.einsum("kgqd,ksd->kgqs", query, key, preferred_element_type=jnp.float32)
        if mask is not None:
            scores = jnp.where(mask, scores, -jnp.inf)
        maximum = jnp.maximum(sums.maximum, scores.max(axis=-1))
        weights = jnp.exp(scores - maximum[..., None])
        shrink = jnp.exp(sums.maximum - maximum)
        values = jnp.einsum(
            "kgqs,ksd->kgqd",
            weights.astype(value.dtype),
            value,
            preferred_element_type=jnp.float32,
        )
        return Sums(
            maximum=maximum,
            total=sums.total * shrink + weights.sum(axis=-1),
            values=sums.values * shrink[..., None] + values,
        )

    return _by_heads(heads, sums, query, key, value)


def _by_heads(function: Callable[..., Any], *arguments: Any) -> Any:
    """Applies a function to a few groups of kv heads on their own and joins the results.

    The groups are independent chains of operations: XLA's CPU backend runs them side by side, and
    the scores of a group stay in the cache, which made prefill a fifth to a third faster there
    (docs/log.md, 22 November 2026).
    """
    kv_heads = jax.tree.leaves(arguments)[0].shape[0]
    groups = max(n for n in range(1, 5) if kv_heads % n == 0)
    leaves, tree = jax.tree.flatten(arguments)
    parts = zip(*(jnp.split(leaf, groups) for leaf in leaves), strict=True)
    results = [function(*tree.unflatten(part)) for part in parts]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *results)


def _at(tree: Any, index: Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _over_needed(wanted: Array, step: Callable[[Array, Any], Any], carry: Any) -> Any:
    """Runs `step` over the indices that are wanted, in order; the rest costs nothing or a
    condition."""
    indices = jnp.arange(wanted.shape[0])
    first = jnp.where(wanted, indices, wanted.shape[0]).min()
    last = jnp.where(wanted, indices, -1).max() + 1
    return jax.lax.fori_loop(
        first,
        last,
        lambda i, carry: jax.lax.cond(wanted[i], lambda c: step(i, c), lambda c: c, carry),
        carry,
    )


def _map_rows(function: Callable[..., Any], *arguments: Any) -> Any:
    """Row by row, because each row has blocks of its own to skip."""
    if jax.tree.leaves(arguments)[0].shape[0] == 1:
        first = jax.tree.map(lambda x: x[0], arguments)
        return jax.tree.map(lambda x: x[None], function(*first))
    return jax.lax.map(lambda row: function(*row), arguments)


def forward(sums: Sums, queries: Queries, keys: Keys, *, causal: bool) -> Sums:
    """Lets every query block meet every key block it needs; all have a batch axis in front."""
    plain = partial(forward_in_xla, causal=causal)
    if not cpu.serves(queries, keys):
        return plain(sums, queries, keys)
    # A program may be compiled here for another machine.
    kernel = partial(cpu.forward, causal=causal)
    return jax.lax.platform_dependent(sums, queries, keys, cpu=kernel, default=plain)


def forward_in_xla(sums: Sums, queries: Queries, keys: Keys, *, causal: bool) -> Sums:
    """The same, as XLA compiles it for any device."""

    def row(sums: Sums, queries: Queries, keys: Keys) -> Sums:
        key_ranges = ranges(keys.side)

        def query_block(_: None, block: tuple[Sums, Queries]) -> tuple[None, Sums]:
            sums, query = block

            def meet(j: Array, sums: Sums) -> Sums:
                other: Keys = _at(keys, j)
                mask = allowed(query.side, other.side, causal=causal)
                blocks = (sums, query.data, other.key, other.value)
                # Most blocks of a long text are seen whole, and masking costs a pass over the
                # scores.
                return jax.lax.cond(
                    mask.all(), partial(update, mask=None), partial(update, mask=mask), *blocks
                )

            wanted = needed(query.ranges, key_ranges, causal=causal)
            return None, _over_needed(wanted, meet, sums)

        return jax.lax.scan(query_block, None, (sums, queries))[1]

    return _map_rows(row, sums, queries, keys)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Saved:
    """What the backward pass needs of each query block besides the queries themselves."""

    gradient: Float[Array, "*batch kv_heads group block dim"]  # of the output
    logsumexp: Float[Array, "*batch kv_heads group block"]
    product: Float[
        Array, "*batch kv_heads group block"
    ]  # sum over dim of output times its gradient


def save(
    output: Float[Array, "batch blocks kv_heads group block dim"],
    logsumexp: Float[Array, "batch blocks kv_heads group block"],
    gradient: Float[Array, "batch blocks kv_heads group block dim"],
) -> Saved:
    product = jnp.sum(output.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1)
    # Rows that saw nothing have -inf; any finite value keeps exp(-inf - x) at 0 for them.
    finite = jnp.where(jnp.isneginf(logsumexp), 0.0, logsumexp)
    return Saved(gradient=gradient, logsumexp=finite, product=product)


def backward(
    query_gradient: Float[Array, "batch blocks kv_heads group block dim"],
    queries: Queries,
    saved: Saved,
    keys: Keys,
    *,
    causal: bool,
) -> tuple[Array, Array, Array]:
    """Adds these keys' part to the gradient of the queries; returns it and the gradients of keys
    and values.

    All gradients are float32; that of the queries is of the scaled ones.
    """

    def row(query_gradient: Array, queries: Queries, saved: Saved, keys: Keys) -> Any:
        def key_block(query_gradient: Array, block: tuple[Keys, Ranges]) -> Any:
            keys, key_ranges = block

            def meet(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                dq, dk, dv = carry
                query, kept = _at((queries, saved), i)
                mask = allowed(query.side, keys.side, causal=causal)

                def heads(
                    query: Array, kept: Saved, key: Array, value: Array, mask: Array | None
                ) -> Any:
                    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
                    scores = product("kgqd,ksd->kgqs", query, key)
                    weights = jnp.exp(scores - kept.logsumexp[..., None])
                    if mask is not None:
                        weights = jnp.where(mask, weights, 0.0)
                    change = product("kgqd,ksd->kgqs", kept.gradient, value)
                    change = (weights * (change - kept.product[..., None])).astype(key.dtype)
                    weights = weights.astype(value.dtype)
                    return (
                        product("kgqs,ksd->kgqd", change, key),
                        product("kgqd,kgqs->kds", query, change),
                        product("kgqd,kgqs->kds", kept.gradient, weights),
                    )

                def step(mask: Array | None, *blocks: Any) -> Any:
                    return _by_heads(partial(heads, mask=mask), *blocks)

                blocks = (query.data, kept, keys.key, keys.value)
                add_q, add_k, add_v = jax.lax.cond(
                    mask.all(), partial(step, None), partial(step, mask), *blocks
                )
                dq = jax.lax.dynamic_update_index_in_dim(dq, _at(dq, i) + add_q, i, 0)
                return dq, dk + add_k, dv + add_v

            # Gradients of keys and values are summed with their positions last: then the small
            # side of each product is turned round on a CPU, and not the block of weights.
            zeros = jnp.zeros(keys.key.swapaxes(-1, -2).shape, jnp.float32)
            wanted = needed(queries.ranges, key_ranges, causal=causal)
            query_gradient, dk, dv = _over_needed(wanted, meet, (query_gradient, zeros, zeros))
            return query_gradient, (dk.swapaxes(-1, -2), dv.swapaxes(-1, -2))

        return jax.lax.scan(key_block, query_gradient, (keys, ranges(keys.side)))

    query_gradient, (dk, dv) = _map_rows(row, query_gradient, queries, saved, keys)
    return query_gradient, dk, dv


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(
    query: Array, key: Array, value: Array, query_side: Side, key_side: Side,
    causal: bool, query_cut: Cut, key_cut: Cut,
) -> Array:  # fmt: skip
    return _attention_forward(query, key, value, query_side, key_side, causal, query_cut, key_cut)[
        0
    ]


def _attention_forward(
    query: Array, key: Array, value: Array, query_side: Side, key_side: Side,
    causal: bool, query_cut: Cut, key_cut: Cut,
) -> tuple[Array, Any]:  # fmt: skip
    queries = cut_queries(query, query_side, key.shape[2], query_cut)
    keys = cut_keys(key, value, key_side, key_cut)
    sums = forward(start(queries.data.shape[:-1], query.shape[-1]), queries, keys, causal=causal)
    blocks, logsumexp = finish(sums)
    out = checkpoint_name(query_cut.undo_queries(blocks).astype(query.dtype), CHECKPOINT_NAME)
    logsumexp = checkpoint_name(logsumexp, CHECKPOINT_NAME)
    return out, (query, key, value, query_side, key_side, out, logsumexp)


def _attention_backward(
    causal: bool, query_cut: Cut, key_cut: Cut, residuals: Any, gradient: Array
) -> tuple[Any, ...]:
    query, key, value, query_side, key_side, out, logsumexp = residuals
    kv_heads = key.shape[2]
    queries = cut_queries(query, query_side, kv_heads, query_cut)
    keys = cut_keys(key, value, key_side, key_cut)
    saved = save(
        query_cut.queries(out, kv_heads), logsumexp, query_cut.queries(gradient, kv_heads)
    )
    zeros = jnp.zeros(queries.data.shape, jnp.float32)
    dq, dk, dv = backward(zeros, queries, saved, keys, causal=causal)
    dq = query_cut.undo_queries(dq) * query.shape[-1] ** -0.5
    dk, dv = key_cut.undo_keys(dk), key_cut.undo_keys(dv)
    return dq.astype(query.dtype), dk.astype(key.dtype), dv.astype(value.dtype), None, None


_attention.defvjp(_attention_forward, _attention_backward)


def blockwise_attention(
    query: Float[Array, "batch queries heads dim"],
    key: Float[Array, "batch keys kv_heads dim"],
    value: Float[Array, "batch keys kv_heads dim"],
    query_side: Side,
    key_side: Side,
    *,
    causal: bool,
    query_block: int,
    key_block: int,
    chunks: tuple[int, int] = (1, 1),
) -> Float[Array, "batch queries heads dim"]:
    """Attention over one device's queries and keys, in blocks of at most the given sizes.

    Args:
        chunks: equal runs that blocks must not straddle, of queries and of keys (see `Cut`).
    """
    query_cut = Cut.of(query.shape[1], query_block, chunks[0])
    key_cut = Cut.of(key.shape[1], key_block, chunks[1])
    return _attention(query, key, value, query_side, key_side, causal, query_cut, key_cut)
