"""Score whole sequences without a cache: compute logits, or how likely each token is.

Sequences are padded to a few lengths, so that few programs are compiled, and laid out in zigzag
order over the `sequence` axis. Log-likelihoods are computed one chunk of positions at a time, so
no array as large as [seq, vocab] exists.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from lwm.attention.api import AttentionConfig, attention
from lwm.attention.mask import PADDING, side
from lwm.attention.order import zigzag, zigzag_length
from lwm.core.distributed import on_host
from lwm.core.errors import InputError
from lwm.core.hardware import precise
from lwm.core.mesh import SEQUENCE
from lwm.core.sharding import TRAINING, constrain, shard_count
from lwm.models.forward import hidden_states, text_logits
from lwm.models.llama import Llama, LlamaConfig

_CHUNK = 512
"""Positions per device whose logits exist at a time."""


class Logits(NamedTuple):
    """Hold logits of the next token, numpy float32; `vision` is None for text models."""

    text: np.ndarray  # [batch, seq, vocab]
    vision: np.ndarray | None = None  # [batch, seq, vision_vocab]


class TokenScores(NamedTuple):
    """Hold scores of each token after the first of its row, given all tokens before it."""

    log_likelihood: Float[np.ndarray, "batch targets"]
    likeliest: Bool[np.ndarray, "batch targets"]  # whether no other token is likelier
    top_tokens: Int[np.ndarray, "batch targets top"]  # the likeliest, in order
    top_logprobs: Float[np.ndarray, "batch targets top"]


class TokenRows(NamedTuple):
    """Hold tokens as the model computes them: positions count from 0 in each segment."""

    tokens: Int[Array, "batch seq"]
    positions: Int[Array, "batch seq"]
    segments: Int[Array, "batch seq"]


def _hidden(
    weights: Llama,
    rows: TokenRows,
    config: LlamaConfig,
    mesh: Mesh | None,
    attention_config: AttentionConfig = AttentionConfig(),
) -> Float[Array, "batch seq embed"]:
    place = side(rows.positions, rows.segments)

    def attend(query: Array, key: Array, value: Array, _: None) -> tuple[Array, None]:
        out = attention(query, key, value, place, place, config=attention_config, mesh=mesh)
        return out, None

    return hidden_states(
        weights, rows.tokens, rows.positions, config, attend, mesh=mesh, rules=TRAINING
    )


def forward_logits(
    weights: Llama,
    rows: TokenRows,
    *,
    config: LlamaConfig,
    mesh: Mesh | None = None,
    attention_config: AttentionConfig = AttentionConfig(),
) -> Float[Array, "batch seq vocab"]:
    """Compute the logits of each position's next token, float32, in the order of the rows."""
    return text_logits(weights, _hidden(weights, rows, config, mesh, attention_config))


def forward_scores(
    weights: Llama,
    rows: TokenRows,
    targets: Int[Array, "batch seq"],
    *,
    config: LlamaConfig,
    mesh: Mesh | None = None,
    top: int = 0,
) -> tuple[
    Float[Array, "batch seq"],
    Bool[Array, "batch seq"],
    Int[Array, "batch seq top"],
    Float[Array, "batch seq top"],
]:
    """Compute the log-likelihood of each position's target, whether it is the likeliest, and the
    `top` likeliest ids with their log-likelihoods.

    A target is scored among the ids of its own kind, text or vision.
    """
    hidden = _hidden(weights, rows, config, mesh)
    count, length = targets.shape
    shards = 1 if mesh is None else mesh.shape[SEQUENCE]
    groups = 1 if mesh is None else shard_count(mesh, "batch", TRAINING)
    part = length // shards
    size = min(part, max(1, _CHUNK * groups // count))
    chunks = -(-part // size)

    def cut(x: Array) -> Array:
        """Reshape to [chunks, batch, shards, size, ...], so that each chunk uses all devices."""
        x = x.reshape(count, shards, part, *x.shape[2:])
        rest = [(0, 0)] * (x.ndim - 3)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, chunks * size - part), *rest))
        x = jnp.moveaxis(x.reshape(count, shards, chunks, size, *x.shape[3:]), 2, 0)
        axes = (None, "batch", "position", None, *[None] * len(rest))
        return constrain(x, mesh, axes, TRAINING)

    def score(chunk: tuple[Array, Array]) -> tuple[Array, Array, Array, Array]:
        states, target = chunk
        merged = states.reshape(count, shards * size, -1)
        logits = text_logits(weights, merged).reshape(count, shards, size, -1)
        ids = jnp.arange(logits.shape[-1], dtype=target.dtype)
        if config.vision is not None:
            is_vision = ids >= config.vocab_size
            same_kind = is_vision == (target >= config.vocab_size)[..., None]
            logits = jnp.where(same_kind, logits, -jnp.inf)
        # A sum and not a lookup, because the vocabulary may be sharded.
        value = jnp.where(ids == target[..., None], logits, 0.0).sum(axis=-1)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        likelihood, likeliest = value - normalizer, value >= logits.max(axis=-1)
        top_values, top_ids = jax.lax.top_k(logits, top) if top else (logits[..., :0],) * 2
        return likelihood, likeliest, top_ids.astype(jnp.int32), top_values - normalizer[..., None]

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 2).reshape(count, shards, chunks * size, *x.shape[4:])
        return x[:, :, :part].reshape(count, length, *x.shape[3:])

    likelihood, likeliest, top_ids, top_values = jax.lax.map(score, (cut(hidden), cut(targets)))
    return join(likelihood), join(likeliest), join(top_ids), join(top_values)


def padded_length(length: int) -> int:
    """Return the length to compute at: one of a few, at most a quarter larger."""
    unit = max(16, 1 << max(0, length.bit_length() - 3))
    return -(-length // unit) * unit


class Scorer:
    """Score sequences with a model; each padded length compiles once."""

    def __init__(self, weights: Llama, config: LlamaConfig, mesh: Mesh | None) -> None:
        self._weights, self._mesh = weights, mesh

        def jit(function: Callable[..., Any], **options: Any) -> Any:
            function = partial(function, config=config, mesh=mesh)
            return jax.jit(precise(function, weights.norm.dtype), **options)

        self._logits = jit(forward_logits)
        # Every process reads all of the scores.
        whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        self._scores = jit(forward_scores, out_shardings=whole, static_argnames="top")

    def logits(self, tokens: Int[np.ndarray, "batch seq"]) -> Float[np.ndarray, "batch seq vocab"]:
        """Compute the logits of the next token at every position."""
        rows, _, index = self._lay_out(tokens, np.full(len(tokens), tokens.shape[1]))
        return on_host(self._logits(self._weights, rows))[: len(tokens)][:, index]

    def log_likelihoods(
        self,
        tokens: Int[np.ndarray, "batch seq"],
        lengths: Sequence[int] | None = None,
        top: int = 0,
    ) -> TokenScores:
        """Compute how likely each token after the first is.

        Args:
            lengths: tokens of each row, if rows are padded; scores of the padding have no meaning.
            top: how many of the likeliest tokens to return at each place.
        """
        counts = np.full(len(tokens), tokens.shape[1]) if lengths is None else np.array(lengths)
        rows, targets, index = self._lay_out(tokens[:, :-1], counts - 1, tokens[:, 1:])
        scores = self._scores(self._weights, rows, targets, top=top)
        return TokenScores(*(on_host(x)[: len(tokens)][:, index] for x in scores))

    def _lay_out(
        self, tokens: np.ndarray, lengths: np.ndarray, targets: np.ndarray | None = None
    ) -> tuple[TokenRows, np.ndarray, np.ndarray]:
        """Put rows and targets into the mesh's order; return also the index that restores it."""
        batch, length = tokens.shape
        shards, groups = 1, 1
        if self._mesh is not None:
            shards = self._mesh.shape[SEQUENCE]
            groups = shard_count(self._mesh, "batch", TRAINING)
        padded = zigzag_length(padded_length(length), shards)
        count = -(-batch // groups) * groups
        order = zigzag(padded, shards) if shards > 1 else np.arange(padded)

        def lay(x: np.ndarray) -> Any:
            x = np.pad(x.astype(np.int32), ((0, count - batch), (0, padded - length)))
            return x[:, order]

        places: Any = np.broadcast_to(order.astype(np.int32), (count, padded))
        # Dynamic scaling takes the largest position as the length, which padding does not raise.
        positions = np.minimum(places, max(1, lengths.max()) - 1)
        within = places < np.pad(lengths, (0, count - batch))[:, None]
        segments: Any = np.where(within, 0, PADDING).astype(np.int32)
        rows = TokenRows(lay(tokens), positions, segments)
        return rows, lay(tokens if targets is None else targets), np.argsort(order)[:length]


def require_ids(ids: np.ndarray, count: int, what: str) -> None:
    """Refuse ids outside a vocabulary of `count` ids."""
    if ids.size and (ids.min() < 0 or ids.max() >= count):
        raise InputError(
            f"{what} run from {ids.min()} to {ids.max()}; the vocabulary has ids 0 to {count - 1}"
        )
