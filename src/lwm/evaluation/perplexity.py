"""How well a model foresees a text, by the position in its context, at several context lengths and
with other RoPE thetas.

Rows of every length end at the same places of the text: what more context gives is told apart from
how hard the text is there. Knows a model's weights and configuration, and runs' results; knows no
command line.
"""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int

from lwm.core.errors import CapacityError, ConfigError, InputError
from lwm.core.progress import progress
from lwm.data.text.tokenizer import Tokenizer
from lwm.engine.scoring import Scorer
from lwm.evaluation.report.curves import Curve, curves
from lwm.evaluation.results import Results
from lwm.evaluation.tasks.haystack import read_haystack
from lwm.generation.model import Model

KEYS = ("theta", "length", "row", "bucket_from")
_FIRST_EDGE = 64
MOST_THETAS = 8


@dataclass(frozen=True, kw_only=True)
class PerplexityConfig:
    """What is measured.

    Args:
        lengths: tokens that are read, ascending.
        thetas: RoPE thetas beside the model's own.
        rows: of each length.
        batch_tokens: tokens that are read together, at least one row.
    """

    lengths: Sequence[int]
    thetas: Sequence[float] = ()
    rows: int = 4
    batch_tokens: int = 8192

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ConfigError(f"rows is {self.rows}; it must be at least 1")
        if self.batch_tokens < 1:
            raise ConfigError(f"batch_tokens is {self.batch_tokens}; it must be at least 1")
        if len(self.thetas) > MOST_THETAS:
            raise ConfigError(
                f"{len(self.thetas)} thetas are given; a picture holds {MOST_THETAS} at most"
            )
        wrong = [theta for theta in self.thetas if not 0 < theta < float("inf")]
        if wrong:
            raise ConfigError(f"theta is {wrong[0]:g}; it must be a positive number")


def edges_of(length: int, shortest: int) -> list[int]:
    """Bounds of the buckets of a row, closer together where positions are few: 0, 64, 96, 128,
    192, ..., `length`, and where the last `shortest` tokens begin."""
    doubled = itertools.takewhile(lambda x: x < length, (_FIRST_EDGE << n for n in range(64)))
    inner = {edge for low in doubled for edge in (low, low * 3 // 2) if edge < length}
    return sorted({0, *inner, length - shortest, length})


def require_lengths(config: PerplexityConfig, context: int, source: str) -> None:
    """Raises:
    CapacityError: a length is beyond the model's context and no theta is given.
    """
    longest = max(config.lengths)
    if longest > context and not config.thetas:
        raise CapacityError(
            f"the length {longest:,} is beyond the context of {source}, which is {context:,}; "
            "shorten the lengths, or go beyond it with --theta"
        )


def read_rows(data: str, tokenizer: Tokenizer, longest: int, rows: int) -> np.ndarray:
    """Rows of running text for the longest length, one token more than is read: the last is but a
    target.

    Args:
        data: as `lwm.evaluation.tasks.haystack.texts` takes it.

    Raises:
        InputError: there is too little text.
    """
    size = longest + 1
    ids = read_haystack(data, tokenizer, rows * size).ids
    if len(ids) < rows * size:
        raise InputError(
            f"{data} has {len(ids):,} tokens and {rows} rows of {longest:,} need {rows * size:,}; "
            "ask for fewer --rows or shorter --lengths, or name a longer --data"
        )
    return ids[: rows * size].reshape(rows, size)


def measure(
    model: Model,
    text: Int[np.ndarray, "rows tokens"],
    config: PerplexityConfig,
    results: Results,
    told: Callable[[Curve], None] = lambda curve: None,
) -> list[Curve]:
    """Rows of results, written as they come, and what they say.

    Each row of `results` is a bucket of a row of text: `theta, length, row, bucket_from,
    bucket_to, nll` (mean, in nats a token) and `tokens`.

    Args:
        text: from `read_rows`, for the longest length.
        told: called with each curve that is done.

    Raises:
        CapacityError: as `require_lengths`.
    """
    require_lengths(config, model.config.max_sequence_length, model.source)
    plan, shortest = _plan(model, config), min(config.lengths)
    opening = _opening(model.tokenizer)
    counted = sum(length * config.rows for _, length in plan)
    with progress("reading", counted) as advance:
        for theta, group in itertools.groupby(plan, key=lambda part: part[0]):
            scorer: Scorer | None = None
            for _, length in group:
                edges = edges_of(length, shortest)
                size = max(1, config.batch_tokens // length)
                for first in range(0, config.rows, size):
                    picked = list(range(first, min(first + size, config.rows)))
                    # Read together again if one is missing: how sums round hangs on the batch.
                    if all(
                        _key(theta, length, row, low) in results
                        for row in picked
                        for low in edges[:-1]
                    ):
                        advance(length * len(picked))
                        continue
                    if scorer is None:
                        longest = max(model.config.max_sequence_length, length)
                        changed = replace(
                            model.config, rope_theta=theta, max_sequence_length=longest
                        )
                        scorer = Scorer(model.weights, changed, model.mesh)
                    read = _end_with(text[picked], length, opening)
                    nll = -scorer.log_likelihoods(read).log_likelihood.astype(np.float64)
                    for row, values in zip(picked, nll, strict=True):
                        _append(results, theta, length, row, edges, values)
                        advance(length)
                done = [
                    row for row in results.rows
                    if (row["theta"], row["length"]) == (theta, length)
                ]  # fmt: skip
                told(curves(done, shortest)[0])
    return curves(results.rows, shortest)


def settings_of(
    model: Model, data: str, text: np.ndarray, config: PerplexityConfig
) -> dict[str, Any]:
    """What the rows of a run depend on. Thetas, and lengths between the shortest and the longest,
    may be added later: rows that are there stay right."""
    return {
        "evaluation": "perplexity",
        "model": model.source,
        "dtype": model.dtype,
        "data": data,
        "rows": len(text),
        "shortest": min(config.lengths),
        "longest": max(config.lengths),
        "text": hashlib.sha256(text.astype("<i8").tobytes()).hexdigest()[:16],
    }


def _plan(model: Model, config: PerplexityConfig) -> list[tuple[float, int]]:
    """Thetas and lengths to measure, the model's own theta first, within its context."""
    own, limit = float(model.config.rope_theta), model.config.max_sequence_length
    others = [float(theta) for theta in dict.fromkeys(config.thetas)]
    plan = [(own, length) for length in config.lengths if own in others or length <= limit]
    return plan + [
        (theta, length) for theta in others if theta != own for length in config.lengths
    ]


def _opening(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before a text."""
    return [token for token in tokenizer.encode("") if token == tokenizer.bos_id][:1]


def _end_with(text: np.ndarray, length: int, opening: Sequence[int]) -> np.ndarray:
    """The last `length` tokens of each row and what stands before them, [rows, length + 1]."""
    if not opening:
        return text[:, -(length + 1) :]
    return np.concatenate([np.full((len(text), 1), opening[0]), text[:, -length:]], axis=1)


def _key(theta: float, length: int, row: int, low: int) -> dict[str, Any]:
    return {"theta": theta, "length": length, "row": row, "bucket_from": low}


def _append(
    results: Results, theta: float, length: int, row: int, edges: Sequence[int], nll: np.ndarray
) -> None:
    for low, high in itertools.pairwise(edges):
        key = _key(theta, length, row, low)
        if key not in results:
            mean = float(nll[low:high].mean())
            results.append({**key, "bucket_to": high, "nll": mean, "tokens": high - low})
