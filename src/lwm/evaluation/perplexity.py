"""Measure the perplexity of a text by position, at several context lengths and RoPE thetas.

Rows of every length end at the same tokens of the text, so that only the context differs. Each row
of results is one bucket of positions in one row of text; `nll` is a mean in nats per token.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from textwrap import shorten
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge
from jaxtyping import Int
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, ScalarFormatter

from lwm.core.config import Checked
from lwm.core.errors import CapacityError, ConfigError, InputError
from lwm.core.progress import progress
from lwm.data.text.tokenizer import Tokenizer
from lwm.engine.scoring import Scorer
from lwm.evaluation.report.scores import Table
from lwm.evaluation.results import Results, Rows
from lwm.evaluation.tasks.haystack import read_haystack
from lwm.generation.model import Model

KEYS = ("theta", "length", "row", "bucket_from")
MAX_THETAS = 8  # colors of the plot
_FIRST_EDGE = 64


@dataclass(frozen=True, kw_only=True)
class PerplexityConfig(Checked):
    """Set the ascending context lengths, rows at each, and thetas besides the model's."""

    lengths: Sequence[int]
    thetas: Sequence[float] = ()
    rows: Annotated[int, Ge(1)] = 4
    batch_tokens: Annotated[int, Ge(1)] = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.thetas) > MAX_THETAS:
            raise ConfigError(
                f"{len(self.thetas)} thetas do not fit a plot; give at most {MAX_THETAS}"
            )
        for theta in self.thetas:
            if not 0 < theta < float("inf"):
                raise ConfigError(f"theta is {theta:g}; it must be a positive number")


def bucket_edges(length: int, shortest: int) -> list[int]:
    """Return the bounds of a row's buckets: 0, 64, 96, 128, ..., `length - shortest`, `length`."""
    doubled = itertools.takewhile(lambda x: x < length, (_FIRST_EDGE << n for n in range(64)))
    inner = {edge for low in doubled for edge in (low, low * 3 // 2) if edge < length}
    return sorted({0, *inner, length - shortest, length})


def require_lengths(config: PerplexityConfig, context: int, source: str) -> None:
    """Raise CapacityError if a length is beyond the context and no other theta is measured."""
    if max(config.lengths) > context and not config.thetas:
        raise CapacityError(
            f"the length {max(config.lengths):,} is beyond the context of {source}, which is "
            f"{context:,}; shorten the lengths, or extend the context with --theta"
        )


def read_rows(data: str, tokenizer: Tokenizer, longest: int, rows: int) -> np.ndarray:
    """Read rows of text, [rows, longest + 1], as `read_haystack` does; raise InputError if it is
    too short. The last token is only a target."""
    size = longest + 1
    ids = read_haystack(data, tokenizer, rows * size).ids
    if len(ids) < rows * size:
        raise InputError(
            f"{data} has {len(ids):,} tokens and {rows} rows of {longest:,} need {rows * size:,}; "
            "lower --rows or --lengths, or name a longer --data"
        )
    return ids[: rows * size].reshape(rows, size)


def run_settings(
    model: Model, data: str, text: np.ndarray, config: PerplexityConfig
) -> dict[str, Any]:
    """Return the settings that rows depend on; later calls may add thetas and middle lengths."""
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


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Hold the perplexity at one theta and length, for each bucket of positions."""

    theta: float
    length: int
    buckets: Mapping[tuple[int, int], float]
    mean: float  # over all positions
    last: float  # over the tokens that rows of all lengths end with


def measure(
    model: Model,
    text: Int[np.ndarray, "rows tokens"],
    config: PerplexityConfig,
    results: Results,
    on_curve: Callable[[Curve], None] = lambda curve: None,
) -> list[Curve]:
    """Measure what has no row of results yet, append the rows, and return all curves.

    Args:
        text: from `read_rows`, for the longest length.
    """
    limit = model.config.max_sequence_length
    require_lengths(config, limit, model.source)
    shortest = min(config.lengths)
    lengths_of = {float(model.config.rope_theta): [n for n in config.lengths if n <= limit]}
    lengths_of |= {float(theta): list(config.lengths) for theta in config.thetas}
    bos = [id for id in model.tokenizer.encode("") if id == model.tokenizer.bos_id][:1]
    with progress("reading", config.rows * sum(map(sum, lengths_of.values()))) as advance:
        for theta, lengths in lengths_of.items():
            longest = max(limit, *lengths, 0)
            changed = replace(model.config, rope_theta=theta, max_sequence_length=longest)
            scorer = cache(lambda changed=changed: Scorer(model.weights, changed, model.mesh))
            for length in lengths:
                size = max(1, config.batch_tokens // length)
                for first in range(0, config.rows, size):
                    batch = _last_tokens(text[first : first + size], length, bos)
                    _measure_batch(scorer, batch, first, theta, shortest, results)
                    advance(length * len(batch))
                curves = perplexity_curves(results.rows, shortest)
                on_curve(next(c for c in curves if (c.theta, c.length) == (theta, length)))
    return perplexity_curves(results.rows, shortest)


def _measure_batch(
    scorer: Callable[[], Scorer],
    tokens: np.ndarray,
    first: int,
    theta: float,
    shortest: int,
    results: Results,
) -> None:
    # A batch is computed as a whole if one row is missing, since rounding depends on it.
    length = tokens.shape[1] - 1
    buckets = list(itertools.pairwise(bucket_edges(length, shortest)))
    nll = None
    for row in range(len(tokens)):
        for low, high in buckets:
            key = {"theta": theta, "length": length, "row": first + row, "bucket_from": low}
            if key in results:
                continue
            if nll is None:
                nll = -scorer().log_likelihoods(tokens).log_likelihood.astype(np.float64)
            mean = float(nll[row, low:high].mean())
            results.append({**key, "bucket_to": high, "nll": mean, "tokens": high - low})


def _last_tokens(text: np.ndarray, length: int, bos: Sequence[int]) -> np.ndarray:
    if not bos:
        return text[:, -(length + 1) :]
    return np.concatenate([np.full((len(text), 1), bos[0]), text[:, -length:]], axis=1)


def perplexity_curves(rows: Iterable[Mapping[str, Any]], shortest: int) -> list[Curve]:
    """Compute curves from rows, by theta and length; raise InputError for rows of another kind.

    Args:
        shortest: shortest length of the run.
    """
    sums: dict[tuple[float, int], dict[tuple[int, int], np.ndarray]] = {}
    for row in rows:
        try:
            buckets = sums.setdefault((float(row["theta"]), int(row["length"])), {})
            bucket = (int(row["bucket_from"]), int(row["bucket_to"]))
            tokens = int(row["tokens"])
            part = np.array([float(row["nll"]) * tokens, tokens])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"{shorten(repr(dict(row)), 300)} is not a row of perplexity; name results of "
                "'lwm eval perplexity'"
            ) from error
        buckets[bucket] = buckets.get(bucket, 0) + part
    curves = []
    for (theta, length), buckets in sorted(sums.items()):
        last = [part for bucket, part in buckets.items() if bucket[0] >= length - shortest]
        curves.append(
            Curve(
                theta=theta,
                length=length,
                buckets={bucket: _perplexity([part]) for bucket, part in sorted(buckets.items())},
                mean=_perplexity(buckets.values()),
                last=_perplexity(last),
            )
        )
    return curves


def _perplexity(parts: Iterable[np.ndarray]) -> float:
    nll, tokens = sum(parts, np.zeros(2))
    return float(np.exp(min(nll / tokens, 100.0)))


Series = Mapping[str, Sequence[Curve]]  # by name in the legend, then length


def curves_by_theta(curves: Sequence[Curve], model_theta: float) -> Series:
    """Group the curves of one run by theta, the model's first and marked by a star."""
    series: dict[str, list[Curve]] = {}
    for curve in sorted(curves, key=lambda curve: curve.theta != model_theta):
        star = "*" if curve.theta == model_theta else ""
        series.setdefault(f"theta {curve.theta:.4g}{star}", []).append(curve)
    return series


def curves_of_runs(runs: Mapping[str, tuple[Mapping[str, Any], Rows]]) -> Series:
    """Compute curves by run and theta; raise InputError if runs measured different tokens."""
    series: dict[str, list[Curve]] = {}
    first, (expected, _) = next(iter(runs.items()))
    for run, (settings, rows) in runs.items():
        for name, kind in (("text", str), ("shortest", int)):
            if not isinstance(settings.get(name), kind):
                raise InputError(
                    f"{run} does not say what text was measured; name the whole directory that "
                    "'lwm eval perplexity' wrote"
                )
            if settings[name] != expected[name]:
                raise InputError(
                    f"{run} was not measured on the tokens of {first}; measure both with one "
                    "tokenizer and the same --data, --rows and --lengths"
                )
        for curve in perplexity_curves(rows, settings["shortest"]):
            series.setdefault(f"{run}, theta {curve.theta:.4g}", []).append(curve)
    return series


def curve_table(series: Series) -> Table:
    """Tabulate perplexities by position: a column for each curve."""
    columns = {f"{name} {c.length:,}": c for name, curves in series.items() for c in curves}
    curves = list(columns.values())
    last = f"last {min(curve.length for curve in curves):,}"
    totals = {"all": [curve.mean for curve in curves], last: [curve.last for curve in curves]}
    return _table(columns, curves, totals)


def comparison_table(series: Series) -> Table:
    """Tabulate runs: positions in the longest context, then the last tokens by length."""
    lasts = [{curve.length: curve.last for curve in curves} for curves in series.values()]
    lengths = sorted({length for last in lasts for length in last})
    totals = {
        f"last {lengths[0]:,} of {length:,}": [last.get(length) for last in lasts]
        for length in lengths
    }
    return _table(series, [curves[-1] for curves in series.values()], totals)


def _table(
    names: Iterable[str], curves: Sequence[Curve], totals: Mapping[str, Sequence[float | None]]
) -> Table:
    buckets = sorted({bucket for curve in curves for bucket in curve.buckets})
    lines = {
        f"{low:,}-{high:,}": [c.buckets.get((low, high)) for c in curves] for low, high in buckets
    }
    rows = [
        [name, *("" if cell is None else f"{cell:.4g}" for cell in cells)]
        for name, cells in {**lines, **totals}.items()
    ]
    return Table(["positions", *names], rows)


def perplexity_figure(series: Series, title: str, *, longest_only: bool = False) -> Figure:
    """Plot perplexity by position, and beside it over the last tokens by context length."""
    lengths = sorted({curve.length for curves in series.values() for curve in curves})
    several = len(lengths) > 1
    figure = Figure(figsize=(12 if several else 7, 4.5), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, 2 if several else 1, sharey=False))
    for number, (name, curves) in enumerate(series.items()):
        shown = curves[-1:] if longest_only else curves
        for place, curve in enumerate(shown, 1):
            panels[0].plot(
                [high for _, high in curve.buckets], list(curve.buckets.values()), "o-",
                markersize=3, color=f"C{number}",
                alpha=0.35 + 0.65 * place / len(shown), label=f"{name}, {curve.length:,} tokens",
            )  # fmt: skip
        if several:
            panels[1].plot(
                [curve.length for curve in curves], [curve.last for curve in curves], "o-",
                color=f"C{number}", label=name,
            )  # fmt: skip
    panels[0].set_xlabel("position in the context, up to")
    if several:
        panels[1].set_xlabel("tokens of the context")
        panels[1].set_title(f"the last {lengths[0]:,} tokens, the same text in all", fontsize=10)
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", ylabel="perplexity")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.suptitle(title)
    return figure
