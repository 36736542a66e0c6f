"""Logits of whole sequences, without a cache: for scoring and for comparing models.

Sequences are padded to a few lengths so that little is compiled, laid out in zigzag over the
`sequence` axis, and put back in order on the host.
"""

from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from lwm.attention.api import AttentionConfig, attention
from lwm.attention.mask import PADDING, side
from lwm.attention.order import zigzag, zigzag_length
from lwm.core.distributed import on_host
from lwm.core.errors import InputError
from lwm.core.mesh import SEQUENCE
from lwm.core.sharding import TRAINING, shard_count
from lwm.models.llama import Llama, LlamaConfig, hidden_states, text_logits


class Logits(NamedTuple):
    """Scores of the next token, numpy float32; `vision` is None where the model does not see."""

    text: np.ndarray  # [batch, seq, vocab]
    vision: np.ndarray | None = None  # [batch, seq, vision_vocab]


def forward_logits(
    weights: Llama,
    tokens: Int[Array, "batch seq"],
    positions: Int[Array, "batch seq"],
    segments: Int[Array, "batch seq"],
    *,
    config: LlamaConfig,
    attention_config: AttentionConfig = AttentionConfig(),
    mesh: Mesh | None = None,
) -> Float[Array, "batch seq vocab"]:
    """Scores of each position's next token, float32, in the order the tokens come in."""
    where = side(positions, segments)

    def attend(query: Array, key: Array, value: Array, _: None) -> tuple[Array, None]:
        out = attention(query, key, value, where, where, config=attention_config, mesh=mesh)
        return out, None

    hidden = hidden_states(weights, tokens, positions, config, attend, mesh=mesh, rules=TRAINING)
    return text_logits(weights, hidden)


def padded_length(length: int) -> int:
    """The length to compute at: at most a quarter more, so that many lengths share one compiled
    step."""
    unit = max(16, 1 << max(0, length.bit_length() - 3))
    return -(-length // unit) * unit


class Scorer:
    """A model's forward pass, compiled once a length."""

    def __init__(self, weights: Llama, config: LlamaConfig, mesh: Mesh | None) -> None:
        self._weights, self._mesh = weights, mesh
        self._forward = jax.jit(partial(forward_logits, config=config, mesh=mesh))

    def logits(self, tokens: Int[np.ndarray, "batch seq"]) -> Float[np.ndarray, "batch seq vocab"]:
        batch, length = tokens.shape
        shards, groups = 1, 1
        if self._mesh is not None:
            shards = self._mesh.shape[SEQUENCE]
            groups = shard_count(self._mesh, "batch", TRAINING)
        padded = zigzag_length(padded_length(length), shards)
        rows = -(-batch // groups) * groups
        full = np.zeros((rows, padded), np.int32)
        full[:batch, :length] = tokens
        positions = np.broadcast_to(np.arange(padded, dtype=np.int32), full.shape)
        segments = np.full(full.shape, PADDING, np.int32)
        segments[:batch, :length] = 0
        order = zigzag(padded, shards) if shards > 1 else np.arange(padded)
        logits = self._forward(self._weights, *(x[:, order] for x in (full, positions, segments)))
        back = np.argsort(order)[:length]
        return on_host(logits)[:batch][:, back]


def require_ids(ids: np.ndarray, count: int, what: str) -> None:
    """Raises:
    InputError: ids are not among those of a vocabulary of `count`.
    """
    if ids.size and (ids.min() < 0 or ids.max() >= count):
        raise InputError(
            f"{what} run from {ids.min()} to {ids.max()}; the vocabulary has ids 0 to {count - 1}"
        )
