"""Compute cross-entropy over a large vocabulary, one chunk of positions at a time.

Logits exist for one chunk only. In training, each chunk yields its part of the loss and of the
gradients together, so that the backward pass neither stores nor recomputes logits. Where text and
vision share the head, the softmax of a target runs over the ids of the target's kind only.

Sources: the loss of a packed row, LargeWorldModel paper (arXiv 2402.08268, section 4.2); gradients
in the forward pass, Wijmans et al. 2024 (arXiv 2411.09009) and Hsu et al. 2024 (arXiv 2410.10989).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from lwm.core.mesh import AXES, FSDP, TENSOR
from lwm.core.sharding import TRAINING, partition_spec

LossSums = dict[str, Float[Array, ""]]
"""Sums over a batch, float32 scalars; only `loss` carries a gradient.

`loss` is weight times negative log-likelihood in nats, and `weight` sums the weights. Over the
targets whose weight is above 0, `nll` sums the negative log-likelihood, `correct` counts those
that no other token of their kind outscores, and `targets` counts them all. For a model with
vision, `vision_nll`, `vision_correct` and `vision_targets` are the same over vision targets only.
"""

_TARGET_SUMS = ("nll", "correct", "targets")


def means_by_kind(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Return mean loss, accuracy and number of text targets and of vision targets.

    The result has names such as `vision_loss`, and is empty for a text model.
    """
    if "vision_nll" not in sums:
        return {}
    vision = {name: sums[f"vision_{name}"] for name in _TARGET_SUMS}
    text = {name: sums[name] - vision[name] for name in _TARGET_SUMS}
    means = {}
    for kind, part in {"text": text, "vision": vision}.items():
        count = jnp.maximum(part["targets"], 1.0)
        means[f"{kind}_loss"] = part["nll"] / count
        means[f"{kind}_accuracy"] = part["correct"] / count
        means[f"{kind}_targets"] = part["targets"]
    return means


class _Options(NamedTuple):
    chunk: int
    mesh: Mesh | None
    text_vocab: int | None


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
    """Compute the weighted negative log-likelihood of the targets, in nats.

    Args:
        hidden: hidden states, in the type that products are computed in.
        head: the float32 weights; they are cast to the type of `hidden` where they are used.
        chunk: positions per device whose logits exist at a time.
        text_vocab: the first vision id; None if all ids are text.
    """
    if mesh is not None and mesh.size == 1:
        mesh = None
    return _sums(hidden, head, targets, weights, _Options(chunk, mesh, text_vocab))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sums(
    hidden: Array, head: Array, targets: Array, weights: Array, options: _Options
) -> LossSums:
    scalars = _filled(PartitionSpec(), options)
    return _on_mesh(_local_sums, options, scalars)(hidden, head, targets, weights)


def _forward(
    hidden: Array, head: Array, targets: Array, weights: Array, options: _Options
) -> tuple[LossSums, tuple[Array, Array]]:
    outputs = (_filled(PartitionSpec(), options), _STATES, PartitionSpec(FSDP, TENSOR))
    local = _on_mesh(_local_gradients, options, outputs)
    sums, by_hidden, by_head = local(hidden, head, targets, weights)
    return sums, (by_hidden, by_head)


def _backward(
    options: _Options, gradients: tuple[Array, Array], cotangent: LossSums
) -> tuple[Array, Array, None, None]:
    by_hidden, by_head = gradients
    scale = cotangent["loss"]
    return by_hidden * scale.astype(by_hidden.dtype), by_head * scale, None, None


_sums.defvjp(_forward, _backward)

_BATCH = partition_spec(("batch", "position"), TRAINING)
_STATES = partition_spec(("batch", "position", None), TRAINING)
_POSITION_AXES = tuple(axis for axis in AXES if axis != TENSOR)


def _on_mesh(local: Callable[..., Any], options: _Options, outputs: Any) -> Callable[..., Any]:
    """Run `local` on every device, with its positions and its part of the vocabulary."""
    local = partial(local, options=options)
    if options.mesh is None:
        return local
    return jax.shard_map(
        local,
        mesh=options.mesh,
        in_specs=(_STATES, PartitionSpec(None, TENSOR), _BATCH, _BATCH),
        out_specs=outputs,
        check_vma=False,
    )


def _local_sums(
    hidden: Array, head: Array, targets: Array, weights: Array, *, options: _Options
) -> LossSums:
    kernel = head.astype(hidden.dtype)

    def forward_chunk(sums: LossSums, chunk: Any) -> tuple[LossSums, None]:
        return jax.tree.map(jnp.add, sums, _score(kernel, chunk, options).sums), None

    zeros = _filled(jnp.zeros((), jnp.float32), options)
    sums, _ = jax.lax.scan(forward_chunk, zeros, _chunks(options, hidden, targets, weights))
    return _reduce(jax.lax.psum, sums, options, _POSITION_AXES)


def _local_gradients(
    hidden: Array, head: Array, targets: Array, weights: Array, *, options: _Options
) -> tuple[LossSums, Array, Array]:
    """Return the sums, and the gradients of `loss` by hidden states and by head."""
    kernel = head.astype(hidden.dtype)

    def gradient_chunk(carry: tuple[LossSums, Array], chunk: Any) -> tuple[Any, Array]:
        sums, by_head = carry
        states, _, weight = chunk
        scores = _score(kernel, chunk, options)
        columns = jnp.arange(kernel.shape[1], dtype=scores.column.dtype)
        by_logits = scores.powers * (weight / scores.total)[:, None]
        by_logits -= jnp.where(columns == scores.column[:, None], weight[:, None], 0.0)
        by_logits = by_logits.astype(hidden.dtype)
        by_head += jnp.dot(states.T, by_logits, preferred_element_type=jnp.float32)
        by_states = jnp.dot(by_logits, kernel.T, preferred_element_type=jnp.float32)
        by_states = _reduce(jax.lax.psum, by_states, options).astype(hidden.dtype)
        return (jax.tree.map(jnp.add, sums, scores.sums), by_head), by_states

    zeros = _filled(jnp.zeros((), jnp.float32), options)
    (sums, by_head), by_hidden = jax.lax.scan(
        gradient_chunk,
        (zeros, jnp.zeros(head.shape, jnp.float32)),
        _chunks(options, hidden, targets, weights),
    )
    if options.mesh is not None:
        by_head = jax.lax.psum(by_head, tuple(a for a in AXES if a not in (TENSOR, FSDP)))
        by_head = jax.lax.psum_scatter(by_head, FSDP, tiled=True)
    by_hidden = by_hidden.reshape(-1, head.shape[0])[: targets.size].reshape(hidden.shape)
    return _reduce(jax.lax.psum, sums, options, _POSITION_AXES), by_hidden, by_head


class _Scores(NamedTuple):
    sums: LossSums
    powers: Array  # [positions, columns], exponentials of the logits less their maximum
    total: Array  # [positions], the sum of `powers` over the whole vocabulary
    column: Array  # [positions], the target's index among this device's columns


def _score(kernel: Array, chunk: tuple[Array, Array, Array], options: _Options) -> _Scores:
    states, target, weight = chunk
    columns = kernel.shape[1]
    first = 0 if options.mesh is None else jax.lax.axis_index(TENSOR) * columns
    logits = jnp.dot(states, kernel, preferred_element_type=jnp.float32)
    counted = weight > 0
    vision = None
    if options.text_vocab is not None:
        # The ids of the other kind take no part in the softmax.
        is_vision = first + jnp.arange(columns, dtype=target.dtype) >= options.text_vocab
        logits = jnp.where(is_vision == (target >= options.text_vocab)[:, None], logits, -jnp.inf)
        vision = counted & (target >= options.text_vocab)
    maximum = _reduce(jax.lax.pmax, logits.max(axis=-1), options)
    powers = jnp.exp(logits - maximum[:, None])
    total = _reduce(jax.lax.psum, powers.sum(axis=-1), options)
    column = target - first
    here = (column >= 0) & (column < columns)
    local = jnp.take_along_axis(logits, jnp.where(here, column, 0)[:, None], axis=-1)[:, 0]
    score = _reduce(jax.lax.psum, jnp.where(here, local, 0.0), options)
    nll = maximum + jnp.log(total) - score

    def over(included: Array) -> LossSums:
        # A target without weight may be anything, even NaN, so it must not reach a sum.
        return {
            "nll": jnp.where(included, nll, 0.0).sum(),
            "correct": (included & (score >= maximum)).sum(dtype=jnp.float32),
            "targets": included.sum(dtype=jnp.float32),
        }

    sums = {"loss": jnp.where(counted, nll * weight, 0.0).sum(), "weight": weight.sum()}
    sums |= over(counted)
    if vision is not None:
        sums |= {f"vision_{name}": x for name, x in over(vision).items()}
    return _Scores(sums, powers, total, column)


def _reduce(
    reduce: Callable[..., Any], x: Any, options: _Options, axes: str | tuple[str, ...] = TENSOR
) -> Any:
    """Reduce over the vocabulary's axis by default."""
    return x if options.mesh is None else reduce(x, axes)


def _filled(value: Any, options: _Options) -> dict[str, Any]:
    names = ["loss", "weight", *_TARGET_SUMS]
    if options.text_vocab is not None:
        names += [f"vision_{name}" for name in _TARGET_SUMS]
    return dict.fromkeys(names, value)


def _chunks(options: _Options, *arrays: Array) -> tuple[Array, ...]:
    """Cut arrays [batch, seq, ...] into equal chunks [chunks, positions, ...], padded with 0."""
    count = arrays[0].shape[0] * arrays[0].shape[1]
    chunks = -(-count // min(options.chunk, count))
    size = -(-count // chunks)

    def cut(x: Array) -> Array:
        flat = x.reshape(count, *x.shape[2:])
        padded = jnp.pad(flat, ((0, chunks * size - count), *[(0, 0)] * (flat.ndim - 1)))
        return padded.reshape(chunks, size, *flat.shape[1:])

    return tuple(cut(x) for x in arrays)
