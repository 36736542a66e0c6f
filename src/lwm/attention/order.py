"""Order a sequence over the devices of the `sequence` axis, so that causal attention is balanced.

With contiguous shards the ring would wait for its last device. Two orders balance it:
- zigzag: device r of R holds chunks r and 2R-1-r. For whole sequences (training, scoring).
- striped: position p is on device p mod R. For caches: the place of a token depends only on its
  position, whatever the size of the chunk that it came in, so every write is local.

Other modules use positions and do not depend on an order. Sources: zhuzilin/ring-flash-attention
(zigzag); Striped Attention, Brandon et al. 2023 (arXiv 2311.09431).
"""

import numpy as np
from jaxtyping import Int


def zigzag(length: int, shards: int) -> Int[np.ndarray, " length"]:
    """Return the token at each place: `x[:, zigzag(n, r)]` lays x out for r devices.

    Args:
        length: a multiple of 2 * shards; `zigzag_length` rounds up to one.
    """
    assert length % (2 * shards) == 0, (length, shards)
    chunks = np.arange(length).reshape(2 * shards, -1)
    order = [chunk for rank in range(shards) for chunk in (rank, 2 * shards - 1 - rank)]
    return chunks[order].reshape(-1)


def zigzag_length(length: int, shards: int) -> int:
    """Return the length to pad a sequence to."""
    return -(-length // (2 * shards)) * 2 * shards


def striped(length: int, shards: int) -> Int[np.ndarray, " length"]:
    """Return the token at each place when position p is on device p mod `shards`."""
    assert length % shards == 0, (length, shards)
    return np.arange(length).reshape(-1, shards).T.reshape(-1)
