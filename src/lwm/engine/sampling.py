"""Choose the next token of every slot from its logits, in one compiled function.

Settings are arrays over slots, so requests with different settings share a step and none of them
compiles anything. Work that no slot needs, such as sorting, is skipped at run time.

The rules apply in this order: guidance, the range of ids that a slot may take, and then those of
Hugging Face's transformers in its order: repetition penalty, temperature, top-k, top-p, min-p.
The presence and frequency penalties of OpenAI's API come after the repetition penalty.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Gt, Le, Lt
from jaxtyping import Array, Bool, Float, Int, UInt32

from lwm.core.config import Checked
from lwm.core.errors import ConfigError
from lwm.core.pytree import pytree

MAX_ALTERNATIVES = 20
"""Alternatives that a step can return for each token."""


@dataclass(frozen=True, kw_only=True)
class Sampling(Checked):
    """Set how one request chooses its tokens.

    Args:
        temperature: 0 takes the likeliest token; 1 samples from the model's distribution.
        top_k: keep the k likeliest ids; 0 keeps all.
        top_p: keep the likeliest ids whose probabilities sum to p (arXiv 1904.09751).
        min_p: keep ids at least this fraction as likely as the likeliest one (arXiv 2407.01082).
        repetition_penalty: divides the logits of ids that the text contains (arXiv 1909.05858).
        presence_penalty: subtracted from the logits of ids that the answer contains.
        frequency_penalty: subtracted for each time that the answer contains an id.
        guidance: scale of classifier-free guidance, `u + guidance * (c - u)`.
        seed: the same seed gives the same tokens whatever other requests run.
    """

    temperature: Annotated[float, Ge(0), Lt(math.inf)] = 1.0
    top_k: Annotated[int, Ge(0), Lt(2**31)] = 0
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    min_p: Annotated[float, Ge(0), Le(1)] = 0.0
    repetition_penalty: Annotated[float, Gt(0), Lt(math.inf)] = 1.0
    presence_penalty: Annotated[float, Gt(-math.inf), Lt(math.inf)] = 0.0
    frequency_penalty: Annotated[float, Gt(-math.inf), Lt(math.inf)] = 0.0
    guidance: Annotated[float, Gt(-math.inf), Lt(math.inf)] = 1.0
    seed: Annotated[int, Ge(0), Lt(2**32)] = 0

    @property
    def counts_answer(self) -> bool:
        """Return whether a penalty depends on how often the answer contains an id."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    def updated(self, settings: Mapping[str, Any]) -> "Sampling":
        """Return a copy with some settings changed; refuse unknown names and wrong values."""
        names = [field.name for field in fields(self)]
        for name in settings:
            if name not in names:
                raise ConfigError(
                    f"the setting {name!r} is unknown; the settings are {', '.join(names)}"
                )
        return replace(self, **settings)


GREEDY = Sampling(temperature=0.0)
"""Take the likeliest token."""


@pytree
class SlotSampling:
    """Hold the `Sampling` of every slot, as arrays.

    Args:
        conditional: the slot whose token this one takes; differs for a request's second slot.
        unconditional: the slot of the request's second prompt; itself where there is none.
        logprobs: whether the slot's request needs alternatives.
        answer: position where the slot's answer begins.
        low, high: range of the ids allowed; later rules and log-probabilities count only these.
    """

    temperature: Float[Array, " slots"]
    top_k: Int[Array, " slots"]
    top_p: Float[Array, " slots"]
    min_p: Float[Array, " slots"]
    repetition_penalty: Float[Array, " slots"]
    presence_penalty: Float[Array, " slots"]
    frequency_penalty: Float[Array, " slots"]
    guidance: Float[Array, " slots"]
    seed: UInt32[Array, " slots"]
    conditional: Int[Array, " slots"]
    unconditional: Int[Array, " slots"]
    logprobs: Bool[Array, " slots"]
    answer: Int[Array, " slots"]
    low: Int[Array, " slots"]
    high: Int[Array, " slots"]


_TYPES = {"top_k": np.int32, "seed": np.uint32}  # the other settings are float32


def slot_sampling(rows: Sequence[Sampling], **slots: Any) -> SlotSampling:
    """Stack the settings of all slots, and add the fields that `Sampling` does not have."""
    columns: dict[str, Any] = {}
    for name in (field.name for field in fields(Sampling)):
        dtype = _TYPES.get(name, np.float32)
        columns[name] = np.array([getattr(row, name) for row in rows], dtype)
    return SlotSampling(**columns, **slots)


@pytree
class History:
    """Hold what penalties depend on: the ids in each row's text, and in each slot's answer, how
    often."""

    present: Bool[Array, "rows vocab"]
    answered: Int[Array, "slots vocab"]


@pytree
class Sampled:
    """Hold a token per row, its log-probability, and alternatives (zeros if none are needed)."""

    tokens: Int[Array, "*rows"]
    logprobs: Float[Array, "*rows"]
    top_tokens: Int[Array, "*rows top"]
    top_logprobs: Float[Array, "*rows top"]


def penalize(
    logits: Float[Array, "slots vocab"],
    present: Bool[Array, "slots vocab"],
    penalty: Float[Array, " slots"],
) -> Float[Array, "slots vocab"]:
    """Apply the repetition penalty to the ids that are present in a slot's text."""
    factor = penalty[:, None]
    return jnp.where(present, jnp.where(logits > 0, logits / factor, logits * factor), logits)


def penalize_answered(
    logits: Float[Array, "rows vocab"],
    answered: Int[Array, "slots vocab"],
    presence: Float[Array, " rows"],
    frequency: Float[Array, " rows"],
) -> Float[Array, "rows vocab"]:
    """Apply OpenAI's two penalties to the ids that a slot's answer contains."""
    answered = jnp.repeat(answered, len(logits) // len(answered), axis=0)
    return logits - presence[:, None] * (answered > 0) - frequency[:, None] * answered


def filter_top(
    logits: Float[Array, "slots vocab"],
    top_k: Int[Array, " slots"],
    top_p: Float[Array, " slots"],
) -> Float[Array, "slots vocab"]:
    """Set everything that top-k and top-p rule out to -inf; the likeliest id always stays."""
    vocab = logits.shape[-1]
    ordered = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(vocab)
    within = rank < jnp.where(top_k > 0, top_k, vocab)[:, None]
    probabilities = jax.nn.softmax(jnp.where(within, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # Sums round to 1 before the last id, which a top-p of 1 must still keep.
    limit = jnp.where(top_p < 1, top_p, jnp.inf)[:, None]
    within &= (before < limit) | (rank == 0)
    least = jnp.min(jnp.where(within, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def filter_min_p(
    logits: Float[Array, "slots vocab"], min_p: Float[Array, " slots"]
) -> Float[Array, "slots vocab"]:
    """Set ids that are less than `min_p` times as likely as the likeliest one to -inf."""
    relative = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    return jnp.where(relative >= min_p[:, None], logits, -jnp.inf)


def sample(
    logits: Float[Array, "slots vocab"],
    history: History,
    step: Int[Array, " slots"],
    settings: SlotSampling,
) -> Sampled:
    """Choose the next token of every slot.

    Args:
        history: of each slot so far, for the penalties.
        step: position of the new token; each position of a seed has its own random numbers.
    """
    unconditional = logits[settings.unconditional]
    guided = unconditional + settings.guidance[:, None] * (logits - unconditional)
    is_guided = settings.unconditional != jnp.arange(len(step))
    logits = jnp.where(is_guided[:, None], guided, logits)
    ids = jnp.arange(logits.shape[-1])
    allowed = (ids >= settings.low[:, None]) & (ids < settings.high[:, None])
    logits = jnp.where(allowed, logits, -jnp.inf)
    scores = penalize(logits, history.present, settings.repetition_penalty)
    penalties = settings.presence_penalty, settings.frequency_penalty
    scores = jax.lax.cond(
        jnp.any(jnp.stack(penalties) != 0), penalize_answered, lambda x, *_: x,
        scores, history.answered, *penalties,
    )  # fmt: skip

    def likeliest(scores: Array) -> Array:
        return scores.argmax(axis=-1).astype(jnp.int32)

    def random(scores: Array) -> Array:
        chosen = _random_tokens(scores, step, settings)
        return jnp.where(settings.temperature > 0, chosen, likeliest(scores)).astype(jnp.int32)

    tokens = jax.lax.cond(jnp.any(settings.temperature > 0), random, likeliest, scores)
    tokens = tokens[settings.conditional]
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    logprobs = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - normalizer
    count = min(MAX_ALTERNATIVES, logits.shape[-1])

    def alternatives(logits: Array) -> tuple[Array, Array]:
        values, indices = jax.lax.top_k(logits, count)
        return indices.astype(jnp.int32), values - normalizer[:, None]

    def none(logits: Array) -> tuple[Array, Array]:
        return jnp.zeros((len(step), count), jnp.int32), jnp.zeros((len(step), count))

    top_tokens, top = jax.lax.cond(jnp.any(settings.logprobs), alternatives, none, logits)
    return Sampled(tokens=tokens, logprobs=logprobs, top_tokens=top_tokens, top_logprobs=top)


def _random_tokens(
    scores: Float[Array, "slots vocab"], step: Int[Array, " slots"], settings: SlotSampling
) -> Int[Array, " slots"]:
    """Sample every slot after temperature, top-k, top-p and min-p."""
    # Below this temperature, scores would overflow; it is as good as 0.
    scores = scores / jnp.maximum(settings.temperature, 1e-5)[:, None]
    # A filter runs only if it rules something out of a slot that samples among several ids.
    count = settings.high - settings.low
    filtered = (settings.temperature > 0) & (count > 1)
    top_k = jnp.where(filtered & (settings.top_k < count), settings.top_k, 0)
    top_p = jnp.where(filtered, settings.top_p, 1.0)
    min_p = jnp.where(filtered, settings.min_p, 0.0)
    scores = jax.lax.cond(
        jnp.any((top_k > 0) | (top_p < 1)), filter_top, lambda x, *_: x, scores, top_k, top_p
    )
    scores = jax.lax.cond(jnp.any(min_p > 0), filter_min_p, lambda x, *_: x, scores, min_p)
    keys = jax.vmap(lambda seed, i: jax.random.fold_in(jax.random.key(seed), i))(
        settings.seed, step
    )
    return jax.vmap(jax.random.categorical)(keys, scores)
