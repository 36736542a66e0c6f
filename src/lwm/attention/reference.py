"""Dense attention, as the textbook has it: the yardstick for every other path, and the only one
that builds the square.

Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.1; grouped heads, Ainslie et al. 2023
(arXiv 2305.13245).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lwm.attention.mask import Side, allowed


def reference_attention(
    query: Float[Array, "batch queries heads dim"],
    key: Float[Array, "batch keys kv_heads dim"],
    value: Float[Array, "batch keys kv_heads dim"],
    query_side: Side,
    key_side: Side,
    *,
    causal: bool,
) -> Float[Array, "batch queries heads dim"]:
    """Softmax attention in float32; a query that may see nothing gives zeros."""
    batch, queries, heads, dim = query.shape
    grouped = query.reshape(batch, queries, key.shape[2], -1, dim).astype(jnp.float32)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, key.astype(jnp.float32)) * dim**-0.5
    mask = allowed(query_side, key_side, causal=causal)[:, None, None]
    # A row without any allowed key would be 0/0, in the gradient too; it gets a harmless row, then
    # zero weights.
    seen = mask.any(axis=-1, keepdims=True)
    weights = jnp.where(mask, jax.nn.softmax(jnp.where(mask | ~seen, scores, -jnp.inf)), 0.0)
    out = jnp.einsum("bkgqs,bskd->bqkgd", weights, value.astype(jnp.float32))
    return out.reshape(batch, queries, heads, dim).astype(query.dtype)
