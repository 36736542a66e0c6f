"""Compare several runs in one table and one figure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure

from lwm.core.errors import InputError
from lwm.core.files import readable
from lwm.evaluation.perplexity import comparison_table, curves_of_runs, perplexity_figure
from lwm.evaluation.report.page import title_of, write_page
from lwm.evaluation.report.plots import save_figure, score_by_length
from lwm.evaluation.report.scores import (
    Point,
    RowKind,
    Table,
    by_length,
    by_task,
    is_scored,
    kind_of_rows,
    length_label,
    overall,
    percent,
    points_of,
)
from lwm.evaluation.results import Rows, read_results


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Hold named runs as one table, and a function that plots them under a title."""

    runs: Sequence[str]
    table: Table
    figure: Callable[[str], Figure]


def compare_runs(paths: Sequence[Path]) -> Comparison:
    """Compare directories of runs or files of rows; raise InputError if they have nothing in
    common: another kind of rows, no shared task, perplexities of different tokens."""
    if not paths:
        raise InputError("there are no results to compare; name directories of runs, or files")
    runs = [read_results(path) for path in paths]
    kind = _kind_of_run(paths[0], runs[0][1])
    for path, (_, rows) in zip(paths, runs, strict=True):
        if (other := _kind_of_run(path, rows)) != kind:
            raise InputError(
                f"{path} has results by {other} and {paths[0]} by {kind}; compare runs of one kind"
            )
    named = dict(zip(_names(paths, runs), runs, strict=True))
    if kind == "perplexity":
        series = curves_of_runs(named)
        figure = partial(perplexity_figure, series, longest_only=True)
        return Comparison(runs=list(named), table=comparison_table(series), figure=figure)
    rows_of = {name: rows for name, (_, rows) in named.items()}
    table = _score_table({name: points_of(rows) for name, rows in rows_of.items()}, kind)
    return Comparison(runs=list(named), table=table, figure=partial(score_by_length, rows_of))


def _kind_of_run(path: Path, rows: Rows) -> RowKind | Literal["perplexity"]:
    if any("nll" in row for row in rows):
        return "perplexity"
    if not all(map(is_scored, rows)):
        raise InputError(
            f"{path} has rows without a score or a verdict; name results of needles, suites, "
            "videos or perplexity"
        )
    return kind_of_rows(rows)


def _score_table(runs: Mapping[str, Sequence[Point]], kind: RowKind) -> Table:
    """Tabulate scores by task and length, overall, and over the cells that all runs share."""
    if not set.intersection(*({point.task for point in points} for points in runs.values())):
        first, *others = runs
        raise InputError(
            f"{first} and {', '.join(others)} share no task; compare runs of one suite"
        )
    suite = kind == "suite"
    rows = _task_rows(runs) if suite else []
    means = [by_length(points) for points in runs.values()]
    for length in sorted({n for run in means for n in run}):
        name = f"{'mean at ' if suite else ''}{length_label(length)}"
        rows.append([name, *(percent(run.get(length)) for run in means)])
    rows.append(["overall", *(percent(overall(points)) for points in runs.values())])
    cells = set.intersection(*({point.cell for point in points} for points in runs.values()))
    shared = [[point for point in points if point.cell in cells] for points in runs.values()]
    if cells and shared != list(runs.values()):
        rows.append(["where all answered", *(percent(overall(points)) for points in shared)])
    unit = "task" if suite else "frames" if kind == "frames" else "context"
    return Table([unit, *runs], rows)


def _task_rows(runs: Mapping[str, Sequence[Point]]) -> list[list[str]]:
    means = [by_task(points) for points in runs.values()]
    cells = dict.fromkeys(cell for run in means for cell in run)
    order = list(dict.fromkeys(task for task, _ in cells))
    return [
        [f"{task} at {length_label(n)}", *(percent(run.get((task, n))) for run in means)]
        for task, n in sorted(cells, key=lambda cell: (order.index(cell[0]), cell[1]))
    ]


def write_comparison(comparison: Comparison, directory: Path, title: str) -> list[Path]:
    """Write compare.png, compare.svg and compare.html, and return their paths."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{directory} cannot be created: {error.strerror}; name another --out"
        ) from error
    figure, page = comparison.figure(title), directory / "compare.html"
    notes = [", ".join(comparison.runs)]
    write_page(page, title, {"compare": figure}, notes=notes, table=comparison.table)
    return [*save_figure(figure, directory / "compare"), page]


def _names(paths: Sequence[Path], runs: Sequence[tuple[Mapping[str, Any], Rows]]) -> list[str]:
    titles = [
        title_of(settings, readable(path.name if path.is_dir() else str(path)))
        for path, (settings, _) in zip(paths, runs, strict=True)
    ]
    names = [
        title if titles.count(title) == 1 else f"{title} ({readable(str(path))})"
        for title, path in zip(titles, paths, strict=True)
    ]
    return [
        name if names.count(name) == 1 else f"{name} {number}"
        for number, name in enumerate(names, 1)
    ]
