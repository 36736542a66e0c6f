"""Whole sequences scored without a cache: logits, or how likely each token is.

Sequences are padded to a few lengths so that little is compiled, laid out in zigzag over the
`sequence` axis, and put back in order on the host. Log-likelihoods are taken a chunk of positions
at a time, so that a row may be as long as its hidden states allow: nothing as large as [seq,
vocab] exists.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

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
from lwm.core.mesh import SEQUENCE
from lwm.core.sharding import TRAINING, constrain, shard_count
from lwm.models.llama import Llama, LlamaConfig, hidden_states, text_logits

_CHUNK = 512
"""Positions of one device whose scores over the vocabulary exist at a time."""


class Logits(NamedTuple):
    """Scores of the next token, numpy float32; `vision` is None where the model does not see."""

    text: np.ndarray  # [batch, seq, vocab]
    vision: np.ndarray | None = None  # [batch, seq, vision_vocab]


class TokenScores(NamedTuple):
    """Of each token behind the first of its row, numpy."""

    log_likelihood: Float[np.ndarray, "batch targets"]
    """Given all tokens before it, in nats, float32."""
    likeliest: Bool[np.ndarray, "batch targets"]
    """Whether no other token is likelier."""


def _hidden(
    weights: Llama,
    tokens: Int[Array, "batch seq"],
    positions: Int[Array, "batch seq"],
    segments: Int[Array, "batch seq"],
    *,
    config: LlamaConfig,
    attention_config: AttentionConfig,
    mesh: Mesh | None,
) -> Float[Array, "batch seq embed"]:
    where = side(positions, segments)

    def attend(query: Array, key: Array, value: Array, _: None) -> tuple[Array, None]:
        out = attention(query, key, value, where, where, config=attention_config, mesh=mesh)
        return out, None

    return hidden_states(weights, tokens, positions, config, attend, mesh=mesh, rules=TRAINING)


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
    hidden = _hidden(
        weights, tokens, positions, segments,
        config=config, attention_config=attention_config, mesh=mesh,
    )  # fmt: skip
    return text_logits(weights, hidden)


def forward_scores(
    weights: Llama,
    tokens: Int[Array, "batch seq"],
    positions: Int[Array, "batch seq"],
    segments: Int[Array, "batch seq"],
    targets: Int[Array, "batch seq"],
    *,
    config: LlamaConfig,
    attention_config: AttentionConfig = AttentionConfig(),
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "batch seq"], Bool[Array, "batch seq"]]:
    """Log-likelihood of each position's target, and whether it is the likeliest, in the order the
    tokens come in. A target is scored against the ids of its own kind, text or vision."""
    hidden = _hidden(
        weights, tokens, positions, segments,
        config=config, attention_config=attention_config, mesh=mesh,
    )  # fmt: skip
    rows, length = targets.shape
    shards = 1 if mesh is None else mesh.shape[SEQUENCE]
    groups = 1 if mesh is None else shard_count(mesh, "batch", TRAINING)
    own = length // shards
    size = min(own, max(1, _CHUNK * groups // rows))
    chunks = -(-own // size)

    def cut(x: Array) -> Array:
        """[chunks, batch, shards, size, ...]: every device has a part of each chunk."""
        x = x.reshape(rows, shards, own, *x.shape[2:])
        rest = [(0, 0)] * (x.ndim - 3)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, chunks * size - own), *rest))
        x = jnp.moveaxis(x.reshape(rows, shards, chunks, size, *x.shape[3:]), 2, 0)
        axes = (None, "batch", "position", None, *[None] * len(rest))
        return constrain(x, mesh, axes, TRAINING)

    def score(part: tuple[Array, Array]) -> tuple[Array, Array]:
        states, target = part
        merged = states.reshape(rows, shards * size, -1)
        logits = text_logits(weights, merged).reshape(rows, shards, size, -1)
        columns = jnp.arange(logits.shape[-1], dtype=target.dtype)
        if config.vision is not None:
            sees = columns >= config.vocab_size
            logits = jnp.where(sees == (target >= config.vocab_size)[..., None], logits, -jnp.inf)
        # A sum instead of a look-up: the vocabulary may be cut over devices.
        found = jnp.where(columns == target[..., None], logits, 0.0).sum(axis=-1)
        return found - jax.nn.logsumexp(logits, axis=-1), found >= logits.max(axis=-1)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 2).reshape(rows, shards, -1)[:, :, :own].reshape(rows, length)

    likelihood, likeliest = jax.lax.map(score, (cut(hidden), cut(targets)))
    return join(likelihood), join(likeliest)


def padded_length(length: int) -> int:
    """The length to compute at: at most a quarter more, so that many lengths share one compiled
    step."""
    unit = max(16, 1 << max(0, length.bit_length() - 3))
    return -(-length // unit) * unit


class Scorer:
    """A model's forward pass, compiled once a length."""

    def __init__(self, weights: Llama, config: LlamaConfig, mesh: Mesh | None) -> None:
        self._weights, self._mesh = weights, mesh
        self._logits = jax.jit(partial(forward_logits, config=config, mesh=mesh))
        # Every process reads all of them.
        whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        self._scores = jax.jit(
            partial(forward_scores, config=config, mesh=mesh), out_shardings=whole
        )

    def logits(self, tokens: Int[np.ndarray, "batch seq"]) -> Float[np.ndarray, "batch seq vocab"]:
        laid = self._lay(np.full(len(tokens), tokens.shape[1]), tokens)
        return on_host(self._logits(self._weights, *laid.arrays))[: len(tokens)][:, laid.back]

    def log_likelihoods(
        self, tokens: Int[np.ndarray, "batch seq"], lengths: Sequence[int] | None = None
    ) -> TokenScores:
        """How likely each token behind the first is, given those before it.

        Args:
            tokens: ids, at least two a row.
            lengths: tokens of each row, where some are filled up behind; what is told of the rest
                means nothing.
        """
        counts = np.full(len(tokens), tokens.shape[1]) if lengths is None else np.array(lengths)
        laid = self._lay(counts - 1, tokens[:, :-1], tokens[:, 1:])
        likelihood, likeliest = (
            on_host(x)[: len(tokens)][:, laid.back]
            for x in self._scores(self._weights, *laid.arrays)
        )
        return TokenScores(likelihood, likeliest)

    def _lay(self, lengths: np.ndarray, tokens: np.ndarray, *others: np.ndarray) -> "_Laid":
        """Fills rows up and puts them into the order of the mesh."""
        batch, length = tokens.shape
        shards, groups = 1, 1
        if self._mesh is not None:
            shards = self._mesh.shape[SEQUENCE]
            groups = shard_count(self._mesh, "batch", TRAINING)
        padded = zigzag_length(padded_length(length), shards)
        rows = -(-batch // groups) * groups

        def full(x: np.ndarray) -> np.ndarray:
            return np.pad(x.astype(np.int32), ((0, rows - batch), (0, padded - length)))

        positions = np.broadcast_to(np.arange(padded, dtype=np.int32), (rows, padded))
        held = np.pad(lengths, (0, rows - batch))[:, None]
        segments = np.where(positions < held, 0, PADDING).astype(np.int32)
        order = zigzag(padded, shards) if shards > 1 else np.arange(padded)
        arrays = (full(tokens), positions, segments, *map(full, others))
        return _Laid(tuple(x[:, order] for x in arrays), np.argsort(order)[:length])


class _Laid(NamedTuple):
    """Arrays as they are computed, and where each position of a row went."""

    arrays: tuple[np.ndarray, ...]
    back: np.ndarray


def require_ids(ids: np.ndarray, count: int, what: str) -> None:
    """Raises:
    InputError: ids are not among those of a vocabulary of `count`.
    """
    if ids.size and (ids.min() < 0 or ids.max() >= count):
        raise InputError(
            f"{what} run from {ids.min()} to {ids.max()}; the vocabulary has ids 0 to {count - 1}"
        )
