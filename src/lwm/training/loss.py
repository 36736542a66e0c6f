"""Cross-entropy over a large vocabulary, in chunks of positions.

No logits outlive their chunk: each chunk's scores give its part of the loss and, where gradients
are wanted, its part of theirs at once, so that the backward pass neither stores nor computes the
logits again. On a mesh every device works on its own positions and its own part of the
vocabulary. Where text and vision share the head, a target is scored against its own kind alone, as
by two heads. Knows hidden states and a head; knows no model.

Sources: the loss of a packed row, LargeWorldModel paper (arXiv 2402.08268, section 4.2); gradients
in the forward pass, Wijmans et al. 2024 (arXiv 2411.09009) and Hsu et al. 2024 (arXiv 2410.10989).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from lwm.core.mesh import AXES, FSDP, TENSOR
from lwm.core.sharding import TRAINING, partition_spec


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Counts:
    """Sums over the targets of one kind whose weight is above 0, as in `LossSums`."""

    nll: Float[Array, ""]
    correct: Float[Array, ""]
    targets: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LossSums:
    """Sums over a batch, float32 scalars; only `loss` carries a gradient.

    Args:
        loss: of weight times negative log-likelihood.
        weight: of the weights.
        nll: of the negative log-likelihood of each target whose weight is above 0.
        correct: of those targets that no other token (of their kind) outscores.
        targets: number of those targets.
        vision: the last three for targets of vision alone; None where the head has text alone.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    nll: Float[Array, ""]
    correct: Float[Array, ""]
    targets: Float[Array, ""]
    vision: Counts | None = None

    @classmethod
    def of(cls, value: Any, *, vision: bool) -> "LossSums":
        """The same in every place."""
        counts = Counts(nll=value, correct=value, targets=value) if vision else None
        return cls(
            loss=value, weight=value, nll=value, correct=value, targets=value, vision=counts
        )


def cross_entropy(
    hidden: Float[Array, "batch seq embed"],
    head: Float[Array, "embed vocab"],
    targets: Int[Array, "batch seq"],
    weights: Float[Array, "batch seq"],
    *,
    chunk: int,
    mesh: Mesh | None = None,
    text_vocab: int | None = None,
) -> LossSums:
    """Weighted negative log-likelihood of the targets, in nats.

    Args:
        hidden: the type the products are computed in.
        head: the master weights; they are cast to the type of `hidden` where they are used.
        chunk: positions of one device whose logits exist at a time.
        text_vocab: ids from here on are of vision: a target's softmax runs over the ids of its own
            kind. All ids are text if None.
    """
    if mesh is not None and mesh.size == 1:
        mesh = None
    return _sums(hidden, head, targets, weights, _How(chunk, mesh, text_vocab))


class _How(NamedTuple):
    chunk: int
    mesh: Mesh | None
    text_vocab: int | None


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sums(hidden: Array, head: Array, targets: Array, weights: Array, how: _How) -> LossSums:
    return _run(hidden, head, targets, weights, how, gradients=False)[0]


def _forward(
    hidden: Array, head: Array, targets: Array, weights: Array, how: _How
) -> tuple[LossSums, Any]:
    sums, *gradients = _run(hidden, head, targets, weights, how, gradients=True)
    return sums, gradients


def _backward(how: _How, gradients: Any, cotangent: LossSums) -> tuple[Array, Array, None, None]:
    hidden, head = gradients
    scale = cotangent.loss
    return (hidden * scale.astype(hidden.dtype), head * scale, None, None)


_sums.defvjp(_forward, _backward)


def _run(
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array,
    how: _How,
    *,
    gradients: bool,
) -> tuple[Any, ...]:
    """The sums and, where wanted, the gradients of `loss` by hidden states and head."""
    chunk, mesh, text_vocab = how
    local = partial(
        _local,
        chunk=chunk,
        gradients=gradients,
        sharded=mesh is not None,
        text_vocab=text_vocab,
    )
    if mesh is None:
        return local(hidden, head, targets, weights)
    batch = partition_spec(("batch", "position"), TRAINING)
    states = partition_spec(("batch", "position", None), TRAINING)
    scalars = LossSums.of(PartitionSpec(), vision=text_vocab is not None)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(states, PartitionSpec(None, TENSOR), batch, batch),
        out_specs=(scalars, states, PartitionSpec(FSDP, TENSOR)) if gradients else (scalars,),
        check_vma=False,
    )(hidden, head, targets, weights)


def _local(
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array,
    *,
    chunk: int,
    gradients: bool,
    sharded: bool,
    text_vocab: int | None,
) -> tuple[Any, ...]:
    """What one device does with its positions and its part of the vocabulary."""
    embed, vocab = head.shape
    kernel = head.astype(hidden.dtype)
    first = jax.lax.axis_index(TENSOR) * vocab if sharded else 0

    def over_vocabulary(reduce: Any, x: Array) -> Array:
        return reduce(x, TENSOR) if sharded else x

    def step(carry: tuple[LossSums, Any], part: Any) -> tuple[tuple[LossSums, Any], Any]:
        sums, head_gradient = carry
        states, target, weight = part
        logits = jnp.dot(states, kernel, preferred_element_type=jnp.float32)
        if text_vocab is not None:  # the other kind's columns lie in another head, so to say
            sees = first + jnp.arange(vocab, dtype=target.dtype) >= text_vocab
            logits = jnp.where(sees == (target >= text_vocab)[:, None], logits, -jnp.inf)
        maximum = over_vocabulary(jax.lax.pmax, logits.max(axis=-1))
        powers = jnp.exp(logits - maximum[:, None])
        total = over_vocabulary(jax.lax.psum, powers.sum(axis=-1))
        index = target - first
        here = (index >= 0) & (index < vocab)
        own = jnp.take_along_axis(logits, jnp.where(here, index, 0)[:, None], axis=-1)[:, 0]
        score = over_vocabulary(jax.lax.psum, jnp.where(here, own, 0.0))
        nll = maximum + jnp.log(total) - score
        counted = weight > 0
        seen = None if text_vocab is None else counted & (target >= text_vocab)

        def counts(of: Array) -> dict[str, Array]:
            # A target without weight may be anything, so nothing of it may reach a sum.
            return {
                "nll": jnp.where(of, nll, 0.0).sum(),
                "correct": (of & (score >= maximum)).sum(dtype=jnp.float32),
                "targets": of.sum(dtype=jnp.float32),
            }

        found = LossSums(
            loss=jnp.where(counted, nll * weight, 0.0).sum(),
            weight=weight.sum(),
            vision=None if seen is None else Counts(**counts(seen)),
            **counts(counted),
        )
        sums = jax.tree.map(jnp.add, sums, found)
        if not gradients:
            return (sums, head_gradient), None
        columns = jnp.arange(vocab, dtype=index.dtype)
        pull = powers * (weight / total)[:, None]
        pull -= jnp.where(columns == index[:, None], weight[:, None], 0.0)
        pull = pull.astype(hidden.dtype)
        head_gradient += jnp.dot(states.T, pull, preferred_element_type=jnp.float32)
        back = jnp.dot(pull, kernel.T, preferred_element_type=jnp.float32)
        return (sums, head_gradient), over_vocabulary(jax.lax.psum, back).astype(hidden.dtype)

    count = targets.size
    chunks = -(-count // min(chunk, count))
    size = -(-count // chunks)

    def cut(x: Array) -> Array:
        flat = x.reshape(count, *x.shape[2:])
        padded = jnp.pad(flat, ((0, chunks * size - count), *[(0, 0)] * (flat.ndim - 1)))
        return padded.reshape(chunks, size, *flat.shape[1:])

    zero = jnp.zeros((), jnp.float32)
    start = LossSums.of(zero, vision=text_vocab is not None)
    # Without gradients nothing as large as the head is carried along.
    begin = jnp.zeros((embed, vocab) if gradients else (), jnp.float32)
    (sums, head_gradient), back = jax.lax.scan(
        step, (start, begin), (cut(hidden), cut(targets), cut(weights))
    )
    if sharded:
        others = tuple(axis for axis in AXES if axis != TENSOR)
        sums = jax.tree.map(lambda x: jax.lax.psum(x, others), sums)
    if not gradients:
        return (sums,)
    if sharded:
        rest = tuple(axis for axis in AXES if axis not in (TENSOR, FSDP))
        head_gradient = jax.lax.psum(head_gradient, rest)
        head_gradient = jax.lax.psum_scatter(head_gradient, FSDP, tiled=True)
    return sums, back.reshape(-1, embed)[:count].reshape(hidden.shape), head_gradient
