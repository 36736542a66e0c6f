"""Compute dense attention as textbooks define it, to check every other implementation against.

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
    """Compute softmax attention in float32; a query without any allowed key gives zeros."""
    batch, queries, heads, dim = query.shape
    grouped = query.reshape(batch, queries, key.shape[2], -1, dim).astype(jnp.float32)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, key.astype(jnp.float32)) * dim**-0.5
    mask = allowed(query_side, key_side, causal=causal)[:, None, None]
    # A row without any allowed key would be 0/0, in the gradient too: compute it unmasked, then
    # set its weights to zero.
    nonempty = mask.any(axis=-1, keepdims=True)
    softmax = jax.nn.softmax(jnp.where(mask | ~nonempty, scores, -jnp.inf))
    weights = jnp.where(mask, softmax, 0.0)
    out = jnp.einsum("bkgqs,bskd->bqkgd", weights, value.astype(jnp.float32))
    return out.reshape(batch, queries, heads, dim).astype(query.dtype)
