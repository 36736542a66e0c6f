"""From logits to the next token: one compiled function for slots that each sample in their own
way.

Settings are arrays over slots, so requests with different settings share a step and nothing is
compiled anew when one joins. What no slot asks for (sorting, top log-probabilities) is passed
over. Knows logits; knows nothing of models or requests.

The order is guidance, then the range of ids that a slot may take, then Hugging Face's: repetition
penalty, temperature, top-k, top-p, min-p.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from lwm.core.errors import ConfigError

MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one request chooses its tokens.

    Args:
        temperature: 0 takes the likeliest token; 1 samples from the model's distribution.
        top_k: keep the k likeliest; 0 keeps all.
        top_p: keep the likeliest whose probabilities sum to p (Holtzman et al. 2020, arXiv
            1904.09751).
        min_p: keep those at least this fraction as likely as the likeliest (Nguyen et al. 2024,
            arXiv 2407.01082).
        repetition_penalty: divides the scores of tokens seen before (Keskar et al. 2019, arXiv
            1909.05858); 1 leaves them.
        guidance: classifier-free guidance, `u + guidance * (c - u)`, for requests with a second
            prompt.
        seed: of this request's draws; the same seed gives the same tokens whatever else runs.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    guidance: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", 0 <= self.top_k < 2**31, "0 (all) or more, below 2147483648"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("guidance", math.isfinite(self.guidance), "a finite number"),
            ("seed", 0 <= self.seed < 2**32, "from 0 to 4294967295"),
        )
        for name, good, range_ in checks:
            if not good:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be {range_}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SlotSampling:
    """`Sampling` of every slot, as arrays.

    Args:
        conditional: slot whose token this one takes; itself, but for a guided request's second
            row.
        unconditional: slot of the request's second row; itself where there is none.
        logprobs: whether the slot wants the likeliest alternatives.
        low, high: the ids that may be drawn, `high` excluded. To what follows the others do not
            exist: top-k counts among these alone, and so do log-probabilities.
    """

    temperature: Float[Array, " slots"]
    top_k: Int[Array, " slots"]
    top_p: Float[Array, " slots"]
    min_p: Float[Array, " slots"]
    repetition_penalty: Float[Array, " slots"]
    guidance: Float[Array, " slots"]
    seed: UInt32[Array, " slots"]
    conditional: Int[Array, " slots"]
    unconditional: Int[Array, " slots"]
    logprobs: Bool[Array, " slots"]
    low: Int[Array, " slots"]
    high: Int[Array, " slots"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Sampled:
    """One token a row, its log-probability under the model, and the likeliest alternatives (zeros
    if nobody asked). Rows are slots, or [slots, width] where drafts were fed."""

    tokens: Int[Array, "*rows"]
    logprobs: Float[Array, "*rows"]
    top_tokens: Int[Array, "*rows top"]
    top_logprobs: Float[Array, "*rows top"]


def penalize(
    logits: Float[Array, "slots vocab"],
    seen: Bool[Array, "slots vocab"],
    penalty: Float[Array, " slots"],
) -> Float[Array, "slots vocab"]:
    factor = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / factor, logits * factor), logits)


def keep(
    logits: Float[Array, "slots vocab"],
    top_k: Int[Array, " slots"],
    top_p: Float[Array, " slots"],
    min_p: Float[Array, " slots"],
) -> Float[Array, "slots vocab"]:
    """Logits with everything that top-k, top-p and min-p rule out at -inf; the likeliest always
    stays."""
    vocab = logits.shape[-1]
    ordered = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(vocab)
    within = rank < jnp.where(top_k > 0, top_k, vocab)[:, None]
    probabilities = jax.nn.softmax(jnp.where(within, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    within &= (before < top_p[:, None]) | (rank == 0)
    least = jnp.min(jnp.where(within, ordered, jnp.inf), axis=-1, keepdims=True)
    # A probability relative to the likeliest does not depend on what else was ruled out.
    relative = jnp.exp(logits - ordered[:, :1])
    return jnp.where((logits >= least) & (relative >= min_p[:, None]), logits, -jnp.inf)


def sample(
    logits: Float[Array, "slots vocab"],
    seen: Bool[Array, "slots vocab"],
    step: Int[Array, " slots"],
    how: SlotSampling,
) -> Sampled:
    """The next token of every slot.

    Args:
        seen: tokens of each slot's text so far, for the repetition penalty.
        step: position of the token drawn, which makes each draw of a seed a new one.
    """
    unconditional = logits[how.unconditional]
    guided = unconditional + how.guidance[:, None] * (logits - unconditional)
    logits = jnp.where((how.unconditional != jnp.arange(len(step)))[:, None], guided, logits)
    ids = jnp.arange(logits.shape[-1])
    allowed = (ids >= how.low[:, None]) & (ids < how.high[:, None])
    logits = jnp.where(allowed, logits, -jnp.inf)
    scores = penalize(logits, seen, how.repetition_penalty)

    def draw(scores: Array) -> Array:
        # Below the least temperature, scores would overflow; it is as good as 0.
        scaled = scores / jnp.maximum(how.temperature, 1e-5)[:, None]
        narrowed = jnp.any((how.top_k > 0) | (how.top_p < 1) | (how.min_p > 0))
        scaled = jax.lax.cond(
            narrowed, lambda x: keep(x, how.top_k, how.top_p, how.min_p), lambda x: x, scaled
        )
        keys = jax.vmap(lambda seed, i: jax.random.fold_in(jax.random.key(seed), i))(
            how.seed, step
        )
        drawn = jax.vmap(jax.random.categorical)(keys, scaled)
        return jnp.where(how.temperature > 0, drawn, scores.argmax(axis=-1)).astype(jnp.int32)

    def likeliest(scores: Array) -> Array:
        return scores.argmax(axis=-1).astype(jnp.int32)

    tokens = jax.lax.cond(jnp.any(how.temperature > 0), draw, likeliest, scores)
    tokens = tokens[how.conditional]
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - normaliser
    count = min(MAX_TOP_LOGPROBS, logits.shape[-1])

    def alternatives(logits: Array) -> tuple[Array, Array]:
        values, found = jax.lax.top_k(logits, count)
        return found.astype(jnp.int32), values - normaliser[:, None]

    def none(logits: Array) -> tuple[Array, Array]:
        return jnp.zeros((len(step), count), jnp.int32), jnp.zeros((len(step), count))

    top_tokens, top = jax.lax.cond(jnp.any(how.logprobs), alternatives, none, logits)
    return Sampled(tokens=tokens, logprobs=chosen, top_tokens=top_tokens, top_logprobs=top)
