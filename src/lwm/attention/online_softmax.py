"""Compute softmax-weighted sums over keys that arrive in several sets.

Source: Milakov & Gimelshein 2018 (arXiv 1805.02867).
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Finite, so that rows without any key yet give exp(-inf - _LOWEST) = 0 and never inf - inf.
_LOWEST = -1e30


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Sums:
    """Hold running maxima, sums of exponentials and weighted values of rows, all float32."""

    maximum: Float[Array, "*batch kv_heads group block"]
    total: Float[Array, "*batch kv_heads group block"]
    values: Float[Array, "*batch kv_heads group block dim"]


def initial_sums(rows: tuple[int, ...], dim: int) -> Sums:
    """Return the sums over no keys, for rows [..., kv_heads, group, block]."""
    return Sums(
        maximum=jnp.full(rows, _LOWEST, jnp.float32),
        total=jnp.zeros(rows, jnp.float32),
        values=jnp.zeros((*rows, dim), jnp.float32),
    )


def add_scores(
    sums: Sums,
    scores: Float[Array, "*batch kv_heads group block keys"],
    weighted_values: Callable[[Array], Array],
) -> Sums:
    """Add a set of keys to the sums.

    Args:
        scores: of the new keys; -inf where masked.
        weighted_values: function from weights, in the shape of the scores, to their sum over
            the values of the new keys.
    """
    maximum = jnp.maximum(sums.maximum, scores.max(axis=-1))
    weights = jnp.exp(scores - maximum[..., None])
    shrink = jnp.exp(sums.maximum - maximum)
    values = weighted_values(weights)
    return Sums(
        maximum=maximum,
        total=sums.total * shrink + weights.sum(axis=-1),
        values=sums.values * shrink[..., None] + values,
    )


def normalize(sums: Sums) -> tuple[Array, Array]:
    """Return attention and its log-sum-exp; zeros and -inf for rows without keys."""
    nonempty = sums.total > 0
    total = jnp.where(nonempty, sums.total, 1.0)
    out = sums.values / total[..., None]
    return out, jnp.where(nonempty, sums.maximum + jnp.log(total), -jnp.inf)
