"""Pass keys and values around the devices of a mesh axis, while queries stay.

These functions run inside `shard_map`: every array is one device's part. Positions and segments
travel with the keys, because a balanced order has no fixed offset per device. An axis of None
stands for one device.

Source: Liu, Zaharia & Abbeel 2023 (arXiv 2310.01889).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lwm.attention.blocks import Keys, Queries, Sums
from lwm.attention.blockwise import OutputGradients, accumulate, gradients


def _send_to_next(tree: Any, axis: str) -> Any:
    size = jax.lax.axis_size(axis)
    return jax.lax.ppermute(tree, axis, [(i, (i + 1) % size) for i in range(size)])


def ring_accumulate(
    sums: Sums, queries: Queries, keys: Keys, axis: str | None, *, causal: bool
) -> Sums:
    """Add the keys of every device in turn; each set is sent on before it is used."""
    if axis is None:
        return accumulate(sums, queries, keys, causal=causal)

    def step(carry: tuple[Sums, Keys], _: None) -> tuple[tuple[Sums, Keys], None]:
        sums, keys = carry
        incoming = _send_to_next(keys, axis)
        return (accumulate(sums, queries, keys, causal=causal), incoming), None

    hops = jax.lax.axis_size(axis) - 1
    (sums, keys), _ = jax.lax.scan(step, (sums, keys), length=hops)
    return accumulate(sums, queries, keys, causal=causal)


def ring_gradients(
    queries: Queries, outputs: OutputGradients, keys: Keys, axis: str | None, *, causal: bool
) -> tuple[Array, Array, Array]:
    """Return the gradients of the scaled queries, of keys and of values, all float32."""
    query_gradient = jnp.zeros(queries.data.shape, jnp.float32)
    if axis is None:
        return gradients(query_gradient, queries, outputs, keys, causal=causal)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        dq, keys, sums = carry
        incoming = _send_to_next(keys, axis)
        # The earlier devices' sums for the present keys arrive while our own part is computed.
        arrived = _send_to_next(sums, axis)
        dq, *part = gradients(dq, queries, outputs, keys, causal=causal)
        return (dq, incoming, jax.tree.map(jnp.add, arrived, tuple(part))), None

    zeros = jnp.zeros(keys.key.shape, jnp.float32)
    carry = (query_gradient, keys, (zeros, zeros))
    (dq, _, sums), _ = jax.lax.scan(step, carry, length=jax.lax.axis_size(axis))
    return dq, *_send_to_next(sums, axis)  # one more hop returns each gradient to its device
