"""Order a sequence over the devices of the `sequence` axis, so that causal attention is balanced.

With contiguous shards the ring would wait for its last device. Zigzag, for whole sequences, gives
device r of R the chunks r and 2R-1-r. Striped, for caches, gives it the positions p with p mod R =
r: a token's place depends only on its position, so every write is local.

Sources: zhuzilin/ring-flash-attention (zigzag); Brandon et al. 2023 (arXiv 2311.09431, striped).
"""

import numpy as np
from jaxtyping import Int


def zigzag(length: int, shards: int) -> Int[np.ndarray, " length"]:
    """Return the token at each place: `x[:, zigzag(n, r)]` lays x out for r devices."""
    assert length % (2 * shards) == 0, (length, shards)
    chunks = np.arange(length).reshape(2 * shards, -1)
    order = [chunk for rank in range(shards) for chunk in (rank, 2 * shards - 1 - rank)]
    return chunks[order].reshape(-1)


def zigzag_length(length: int, shards: int) -> int:
    """Return the next length that `zigzag` accepts, a multiple of 2 * shards."""
    return -(-length // (2 * shards)) * 2 * shards


def striped(length: int, shards: int) -> Int[np.ndarray, " length"]:
    """Return the token at each place when position p is on device p mod `shards`."""
    assert length % shards == 0, (length, shards)
    return np.arange(length).reshape(-1, shards).T.reshape(-1)
