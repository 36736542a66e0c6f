"""Compute attention and its gradients one block at a time, skipping every masked block.

Memory is linear in the sequence: the backward pass recomputes the scores from the saved
log-sum-exp. `accumulate` and `gradients` handle one set of keys and continue sums, so that a ring
calls them once for each set that arrives.

Sources: Dao 2023 (arXiv 2307.08691) for the backward pass; Liu & Abbeel 2023 (arXiv 2305.19370)
for the blocks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lwm.attention.blocks import Keys, Queries, Sums, add_scores
from lwm.attention.kernels import cpu
from lwm.attention.mask import Ranges, allowed, needed, ranges
from lwm.core.pytree import pytree

_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def accumulate(sums: Sums, queries: Queries, keys: Keys, *, causal: bool) -> Sums:
    """Add to each query block the key blocks that it needs; all arrays have a batch axis."""
    in_xla = partial(accumulate_in_xla, causal=causal)
    if not cpu.supports(queries, keys):
        return in_xla(sums, queries, keys)
    # The program may be compiled for another platform than the default one.
    in_c = partial(cpu.accumulate_in_c, causal=causal)
    return jax.lax.platform_dependent(sums, queries, keys, cpu=in_c, default=in_xla)


def accumulate_in_xla(sums: Sums, queries: Queries, keys: Keys, *, causal: bool) -> Sums:
    """Compute the same as `accumulate`, on any device."""

    def row(sums: Sums, queries: Queries, keys: Keys) -> Sums:
        key_ranges = ranges(keys.side)

        def query_block(_: None, block: tuple[Sums, Queries]) -> tuple[None, Sums]:
            sums, query = block

            def add(j: Array, sums: Sums) -> Sums:
                other: Keys = _at(keys, j)
                mask = allowed(query.side, other.side, causal=causal)
                return _by_heads(_add_block, mask, sums, query.data, other.key, other.value)

            return None, _over(needed(query.ranges, key_ranges, causal=causal), add, sums)

        return jax.lax.scan(query_block, None, (sums, queries))[1]

    return _map_rows(row, sums, queries, keys)


def _add_block(
    sums: Sums,
    query: Float[Array, "kv_heads group block dim"],
    key: Float[Array, "kv_heads keys dim"],
    value: Float[Array, "kv_heads keys dim"],
    mask: Bool[Array, "block keys"] | None,
) -> Sums:
    scores = _product("kgqd,ksd->kgqs", query, key)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    return add_scores(
        sums, scores, lambda w: _product("kgqs,ksd->kgqd", w.astype(value.dtype), value)
    )


@pytree
class OutputGradients:
    """Hold what the backward pass needs of each query block, besides the queries."""

    gradient: Float[Array, "*batch kv_heads group block dim"]  # of the output
    logsumexp: Float[Array, "*batch kv_heads group block"]
    product: Float[Array, "*batch kv_heads group block"]  # of output and gradient, over dim


def gradients(
    query_gradient: Float[Array, "batch blocks kv_heads group block dim"],
    queries: Queries,
    outputs: OutputGradients,
    keys: Keys,
    *,
    causal: bool,
) -> tuple[Array, Array, Array]:
    """Add these keys' part to the gradient of the scaled queries, and differentiate keys and
    values; all are float32."""

    def row(query_gradient: Array, queries: Queries, outputs: OutputGradients, keys: Keys) -> Any:
        def key_block(query_gradient: Array, block: tuple[Keys, Ranges]) -> Any:
            keys, key_ranges = block

            def add(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                dq, dk, dv = carry
                query, output = _at((queries, outputs), i)
                mask = allowed(query.side, keys.side, causal=causal)
                blocks = (query.data, output, keys.key, keys.value)
                add_q, add_k, add_v = _by_heads(_block_gradients, mask, *blocks)
                dq = jax.lax.dynamic_update_index_in_dim(dq, _at(dq, i) + add_q, i, 0)
                return dq, dk + add_k, dv + add_v

            # Gradients of keys and values are summed with their positions last, so that a CPU
            # transposes the small operand of each product and not the block of weights.
            zeros = jnp.zeros(keys.key.swapaxes(-1, -2).shape, jnp.float32)
            indices = needed(queries.ranges, key_ranges, causal=causal)
            query_gradient, dk, dv = _over(indices, add, (query_gradient, zeros, zeros))
            return query_gradient, (dk.swapaxes(-1, -2), dv.swapaxes(-1, -2))

        return jax.lax.scan(key_block, query_gradient, (keys, ranges(keys.side)))

    query_gradient, (dk, dv) = _map_rows(row, query_gradient, queries, outputs, keys)
    return query_gradient, dk, dv


def _block_gradients(
    query: Array, output: OutputGradients, key: Array, value: Array, mask: Array | None
) -> tuple[Array, Array, Array]:
    scores = _product("kgqd,ksd->kgqs", query, key)
    weights = jnp.exp(scores - output.logsumexp[..., None])
    if mask is not None:
        weights = jnp.where(mask, weights, 0.0)
    change = _product("kgqd,ksd->kgqs", output.gradient, value)
    change = (weights * (change - output.product[..., None])).astype(key.dtype)
    weights = weights.astype(value.dtype)
    return (
        _product("kgqs,ksd->kgqd", change, key),
        _product("kgqd,kgqs->kds", query, change),
        _product("kgqd,kgqs->kds", output.gradient, weights),
    )


def _by_heads(function: Callable[..., Any], mask: Array, *arguments: Any) -> Any:
    """Apply a function to groups of key-value heads separately and concatenate the results.

    XLA's CPU backend runs these independent chains in parallel, and the scores of one group fit
    into a core's cache, which made prefill a fifth to a third faster (docs/log.md, 22 November
    2026). Most blocks of a long text are not masked at all; they get no mask, which would cost a
    pass over the scores.
    """

    def apply(mask: Array | None, *arguments: Any) -> Any:
        kv_heads = jax.tree.leaves(arguments)[0].shape[0]
        groups = max(n for n in range(1, 5) if kv_heads % n == 0)
        leaves, tree = jax.tree.flatten(arguments)
        parts = zip(*(jnp.split(leaf, groups) for leaf in leaves), strict=True)
        results = [function(*tree.unflatten(part), mask=mask) for part in parts]
        return jax.tree.map(lambda *x: jnp.concatenate(x), *results)

    return jax.lax.cond(mask.all(), partial(apply, None), partial(apply, mask), *arguments)


def _at(tree: Any, index: Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _over(needed: Array, step: Callable[[Array, Any], Any], carry: Any) -> Any:
    """Run `step` over the indices that are true, in order: a loop over their range only."""
    indices = jnp.arange(needed.shape[0])
    first = jnp.where(needed, indices, needed.shape[0]).min()
    last = jnp.where(needed, indices, -1).max() + 1

    def one(i: Array, carry: Any) -> Any:
        return jax.lax.cond(needed[i], lambda c: step(i, c), lambda c: c, carry)

    return jax.lax.fori_loop(first, last, one, carry)


def _map_rows(function: Callable[..., Any], *arguments: Any) -> Any:
    """Apply a function to each row of the batch, because each row skips other blocks."""
    if jax.tree.leaves(arguments)[0].shape[0] == 1:
        first = jax.tree.map(lambda x: x[0], arguments)
        return jax.tree.map(lambda x: x[None], function(*first))
    return jax.lax.map(lambda row: function(*row), arguments)
