"""How well a model foresees a text, by the position in its context, at several context lengths and
with other RoPE thetas.

Rows of every length end at the same places of the text: what more context gives is told apart from
how hard the text is there. Knows a model's weights and configuration, and runs' results; knows no
command line.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, ScalarFormatter

from lwm.core.errors import CapacityError, ConfigError, InputError
from lwm.core.progress import progress
from lwm.data.tokenizer import Tokenizer
from lwm.evaluation.haystack import read_haystack
from lwm.evaluation.results import Results
from lwm.evaluation.scores import Table
from lwm.inference.model import Model
from lwm.inference.scoring import Scorer

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


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Perplexity of one theta at one length, a value for each bucket of positions."""

    theta: float
    length: int
    edges: Sequence[int]
    """Where buckets begin, and where the last ends."""
    values: Sequence[float]
    whole: float
    """Over all positions."""
    last: float
    """Over the tokens that rows of all lengths end with."""


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
        data: as `lwm.evaluation.haystack.texts` takes it.

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


def curves(rows: Iterable[Mapping[str, Any]], shortest: int) -> list[Curve]:
    """Perplexities of all rows of a run, by theta and length.

    Args:
        shortest: length of the run.

    Raises:
        InputError: a row is no row of perplexity.
    """
    sums: dict[tuple[float, int], dict[tuple[int, int], np.ndarray]] = {}
    for row in rows:
        try:
            own = sums.setdefault((float(row["theta"]), int(row["length"])), {})
            bucket = (int(row["bucket_from"]), int(row["bucket_to"]))
            tokens = int(row["tokens"])
            part = np.array([float(row["nll"]) * tokens, tokens])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{dict(row)!r} is no row of perplexity; name results that 'lwm eval perplexity' "
                "wrote"
            ) from error
        own[bucket] = own.get(bucket, np.zeros(2)) + part
    found = []
    for (theta, length), own in sorted(sums.items()):
        buckets = sorted(own)
        ends = [own[bucket] for bucket in buckets if bucket[0] >= length - shortest]
        found.append(
            Curve(
                theta=theta,
                length=length,
                edges=[buckets[0][0], *(high for _, high in buckets)],
                values=[_perplexity(*own[bucket]) for bucket in buckets],
                whole=_perplexity(*sum(own.values(), np.zeros(2))),
                last=_perplexity(*sum(ends, np.zeros(2))),
            )
        )
    return found


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


def table(found: Sequence[Curve], own: float) -> Table:
    """Perplexities by position: a column for each theta and length.

    Args:
        own: the model's theta, marked by a star.
    """
    found = sorted(found, key=lambda curve: (curve.theta != own, curve.theta, curve.length))
    columns = [
        dict(zip(itertools.pairwise(curve.edges), curve.values, strict=True)) for curve in found
    ]
    heads = [f"{_name(curve.theta, own)} {curve.length:,}" for curve in found]
    shortest = min(curve.length for curve in found)

    def line(name: str, cells: Iterable[float | None]) -> list[str]:
        return [name, *("" if cell is None else f"{cell:.4g}" for cell in cells)]

    lines = [
        line(f"{low:,}-{high:,}", (column.get((low, high)) for column in columns))
        for low, high in sorted({bucket for column in columns for bucket in column})
    ]
    lines.append(line("all", [curve.whole for curve in found]))
    lines.append(line(f"last {shortest:,}", [curve.last for curve in found]))
    return Table(["positions", *heads], lines)


def picture(found: Sequence[Curve], own: float, title: str) -> Figure:
    """On the left perplexity by position, on the right over the last tokens of the rows, which all
    lengths share, by how much is read before them."""
    lengths = sorted({curve.length for curve in found})
    thetas = sorted({curve.theta for curve in found}, key=lambda theta: (theta != own, theta))
    several = len(lengths) > 1
    figure = Figure(figsize=(12 if several else 7, 4.5), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, 2 if several else 1, sharey=False))
    for number, theta in enumerate(thetas):
        mine = [curve for curve in found if curve.theta == theta]
        for curve in mine:
            share = 1 if len(mine) == 1 else 0.35 + 0.65 * mine.index(curve) / (len(mine) - 1)
            panels[0].plot(
                curve.edges[1:], curve.values, "o-", markersize=3, color=f"C{number}", alpha=share,
                label=f"{_name(theta, own)}, {curve.length:,} tokens",
            )  # fmt: skip
        if several:
            panels[1].plot(
                [curve.length for curve in mine], [curve.last for curve in mine], "o-",
                color=f"C{number}", label=_name(theta, own),
            )  # fmt: skip
    panels[0].set_xlabel("position in the context, up to")
    if several:
        panels[1].set_xlabel("tokens of the context")
        panels[1].set_title(f"the last {lengths[0]:,} tokens, the same text in all", fontsize=10)
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        axes.set_ylabel("perplexity")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.suptitle(title)
    return figure


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


def _perplexity(nll: float, tokens: float) -> float:
    return float(np.exp(min(nll / tokens, 100.0)))


def _name(theta: float, own: float) -> str:
    return f"theta {theta:.4g}{'*' if theta == own else ''}"
