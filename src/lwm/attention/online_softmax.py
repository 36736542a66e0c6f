"""Where an online softmax stands: what rows of queries carry from one set of keys to the next.

Source: Milakov & Gimelshein 2018 (arXiv 1805.02867).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Finite, so that a row that has seen nothing yet yields exp(-inf - START) = 0 and never inf - inf.
_START = -1e30


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Sums:
    """Running maximum, sum of exponentials, weighted values, all float32."""

    maximum: Float[Array, "*batch kv_heads group block"]
    total: Float[Array, "*batch kv_heads group block"]
    values: Float[Array, "*batch kv_heads group block dim"]


def start(rows: tuple[int, ...], dim: int) -> Sums:
    """Sums before any key is seen, for rows [..., kv_heads, group, block]."""
    return Sums(
        maximum=jnp.full(rows, _START, jnp.float32),
        total=jnp.zeros(rows, jnp.float32),
        values=jnp.zeros((*rows, dim), jnp.float32),
    )


def finish(sums: Sums) -> tuple[Array, Array]:
    """Attention and its log-sum-exp; -inf and zeros where nothing was seen."""
    seen = sums.total > 0
    total = jnp.where(seen, sums.total, 1.0)
    out = sums.values / total[..., None]
    return out, jnp.where(seen, sums.maximum + jnp.log(total), -jnp.inf)
