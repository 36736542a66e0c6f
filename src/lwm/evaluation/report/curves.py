"""Perplexity by position and by length, from rows that were measured: one run, or several side by
side.

Knows rows of results; knows no model, no text and no files.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, ScalarFormatter

from lwm.core.errors import InputError
from lwm.evaluation.report.scores import Table

Rows = Sequence[Mapping[str, Any]]


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


def by_theta(found: Sequence[Curve], own: float) -> dict[str, list[Curve]]:
    """Curves of one run by their theta, the model's own first and marked by a star."""
    thetas = sorted({curve.theta for curve in found}, key=lambda theta: (theta != own, theta))
    return {f"{_name(theta)}{'*' if theta == own else ''}": _of(found, theta) for theta in thetas}


def of_runs(runs: Mapping[str, tuple[Mapping[str, Any], Rows]]) -> dict[str, list[Curve]]:
    """Curves of several runs, by the run and its theta.

    Args:
        runs: settings and rows by name.

    Raises:
        InputError: rows are no rows of perplexity, or of other tokens than the first run's.
    """
    found, first = {}, next(iter(runs))
    wanted = runs[first][0]
    for run, (settings, rows) in runs.items():
        for name in ("text", "shortest"):
            if name not in settings:
                raise InputError(
                    f"{run} does not say what text was measured; name the whole directory that "
                    "'lwm eval perplexity' wrote"
                )
            if settings[name] != wanted[name]:
                raise InputError(
                    f"{run} was not measured on the tokens of {first}; measure both with one "
                    "tokenizer and the same --data, --rows and --lengths"
                )
        own = curves(rows, int(settings["shortest"]))
        for theta in sorted({curve.theta for curve in own}):
            found[f"{run}, {_name(theta)}"] = _of(own, theta)
    return found


def table(series: Mapping[str, Sequence[Curve]]) -> Table:
    """Perplexities by position: a column for each curve, at each length."""
    shown = [(f"{name} {curve.length:,}", curve) for name, own in series.items() for curve in own]
    found = [curve for _, curve in shown]
    shortest = min(curve.length for curve in found)
    last = _line(f"last {shortest:,}", [curve.last for curve in found])
    whole = _line("all", [curve.whole for curve in found])
    return Table(["positions", *(name for name, _ in shown)], [*_buckets(found), whole, last])


def table_side_by_side(series: Mapping[str, Sequence[Curve]]) -> Table:
    """Perplexities by position in the longest context, and below of the tokens that contexts of
    all lengths end with: a column for each run."""
    longest = [own[-1] for own in series.values()]
    shortest = min(curve.length for own in series.values() for curve in own)
    lasts = [{curve.length: curve.last for curve in own} for own in series.values()]
    lines = [
        _line(f"last {shortest:,} of {length:,}", [last.get(length) for last in lasts])
        for length in sorted({length for last in lasts for length in last})
    ]
    return Table(["positions", *series], [*_buckets(longest), *lines])


def picture(
    series: Mapping[str, Sequence[Curve]], title: str, *, longest_alone: bool = False
) -> Figure:
    """On the left perplexity by position, on the right over the last tokens of the rows, which all
    lengths share, by how much is read before them.

    Args:
        longest_alone: show no positions of shorter contexts.
    """
    lengths = sorted({curve.length for own in series.values() for curve in own})
    several = len(lengths) > 1
    figure = Figure(figsize=(12 if several else 7, 4.5), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, 2 if several else 1, sharey=False))
    for number, (name, own) in enumerate(series.items()):
        shown = own[-1:] if longest_alone else own
        for place, curve in enumerate(shown, 1):
            panels[0].plot(
                curve.edges[1:], curve.values, "o-", markersize=3, color=f"C{number}",
                alpha=0.35 + 0.65 * place / len(shown), label=f"{name}, {curve.length:,} tokens",
            )  # fmt: skip
        if several:
            panels[1].plot(
                [curve.length for curve in own], [curve.last for curve in own], "o-",
                color=f"C{number}", label=name,
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


def _buckets(found: Sequence[Curve]) -> list[list[str]]:
    """A line for each bucket of positions that one of the curves has."""
    columns = [
        dict(zip(itertools.pairwise(curve.edges), curve.values, strict=True)) for curve in found
    ]
    return [
        _line(f"{low:,}-{high:,}", [column.get((low, high)) for column in columns])
        for low, high in sorted({bucket for column in columns for bucket in column})
    ]


def _line(name: str, cells: Iterable[float | None]) -> list[str]:
    return [name, *("" if cell is None else f"{cell:.4g}" for cell in cells)]


def _of(found: Iterable[Curve], theta: float) -> list[Curve]:
    return sorted((c for c in found if c.theta == theta), key=lambda curve: curve.length)


def _perplexity(nll: float, tokens: float) -> float:
    return float(np.exp(min(nll / tokens, 100.0)))


def _name(theta: float) -> str:
    return f"theta {theta:.4g}"
