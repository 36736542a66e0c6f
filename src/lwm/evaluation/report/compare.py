"""Several runs side by side: one table, one picture.

Knows results files; knows no model and no task.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from matplotlib.figure import Figure

from lwm.core.errors import InputError
from lwm.evaluation.report.curves import of_runs, picture, table_side_by_side
from lwm.evaluation.report.page import title_of, write_page
from lwm.evaluation.report.plots import Rows, save, score_by_length
from lwm.evaluation.report.scores import (
    Kind,
    Point,
    Table,
    by_length,
    by_task,
    is_scored,
    kind_of,
    length_label,
    overall,
    percent,
    points_of,
)
from lwm.evaluation.results import read_results

_KINDS: dict[Kind | Literal["perplexity"], str] = {
    "length": "prompts of some tokens",
    "frames": "videos of some frames",
    "suite": "a suite's tasks",
    "perplexity": "perplexities",
}


@runtime_checkable
class Comparison(Protocol):
    """Several runs as one table and one picture."""

    runs: Mapping[str, Rows]

    @property
    def table(self) -> Table: ...

    def figure(self, title: str) -> Figure: ...


def compare(paths: Sequence[Path]) -> Comparison:
    """Runs of one kind, each under a name of its own.

    Args:
        paths: directories of runs, or files of rows; the original's, too.

    Raises:
        InputError: a path holds no results, or those of another kind than the first's; suites
            share no task; perplexities are of other tokens.
    """
    if not paths:
        raise InputError("no results are given; name directories of runs, or their files")
    read = [read_results(path) for path in paths]
    kind = _kind_of(paths[0], read[0][1])
    for path, (_, rows) in zip(paths, read, strict=True):
        if (other := _kind_of(path, rows)) != kind:
            raise InputError(
                f"{path} is of {_KINDS[other]} and {paths[0]} of {_KINDS[kind]}, which have "
                "nothing in common; compare runs of one kind"
            )
    runs = dict(zip(_names(paths, read), read, strict=True))
    if kind == "perplexity":
        return Perplexities(runs)
    return Scores({name: rows for name, (_, rows) in runs.items()}, kind)


def _kind_of(path: Path, rows: Rows) -> Kind | Literal["perplexity"]:
    if any("nll" in row for row in rows):
        return "perplexity"
    if not all(map(is_scored, rows)):
        raise InputError(
            f"{path} has rows without a score or a verdict, which cannot be compared; "
            "name results of needles, suites, videos or perplexity"
        )
    return kind_of(rows)


class Perplexities:
    """Runs of `lwm eval perplexity` on the same tokens.

    Args:
        runs: settings and rows by name.
    """

    def __init__(self, runs: Mapping[str, tuple[Mapping[str, Any], Rows]]) -> None:
        self.runs: Mapping[str, Rows] = {name: rows for name, (_, rows) in runs.items()}
        self._series = of_runs(runs)

    @property
    def table(self) -> Table:
        """A column for each run and theta: by position in the longest context, and of the tokens
        that contexts of all lengths end with."""
        return table_side_by_side(self._series)

    def figure(self, title: str) -> Figure:
        return picture(self._series, title, longest_alone=True)


class Scores:
    """Runs with scores."""

    def __init__(self, runs: Mapping[str, Rows], kind: Kind) -> None:
        self.runs, self.kind = runs, kind
        self._points = {name: points_of(rows) for name, rows in self.runs.items()}
        shared = set.intersection(*({p.task for p in found} for found in self._points.values()))
        if not shared:
            first, *others = self.runs
            raise InputError(
                f"{first} and {', '.join(others)} share no task; compare runs of one suite"
            )

    @property
    def table(self) -> Table:
        """A column for each run: scores in per cent at each length, of a suite's tasks there, too,
        over all, and over what every run was asked where that is less."""
        points = self._points
        unit = "frames" if self.kind == "frames" else "context"
        rows: list[list[str]] = []
        if self.kind == "suite":
            tasks = [by_task(found) for found in points.values()]
            names = dict.fromkeys(key for found in tasks for key in found)
            order = list(dict.fromkeys(task for task, _ in names))
            rows += [
                [
                    f"{task} at {length_label(n)}",
                    *(percent(found.get((task, n))) for found in tasks),
                ]
                for task, n in sorted(names, key=lambda key: (order.index(key[0]), key[1]))
            ]
        means = [by_length(found) for found in points.values()]
        label = "mean at " if self.kind == "suite" else ""
        for length in sorted({n for found in means for n in found}):
            cells = [percent(found.get(length)) for found in means]
            rows.append([f"{label}{length_label(length)}", *cells])
        rows.append(["overall", *(percent(overall(found)) for found in points.values())])
        both = self._shared()
        if both and any(len(both[name]) < len(found) for name, found in points.items()):
            rows.append(["where all answered", *(percent(overall(p)) for p in both.values())])
        return Table([unit if self.kind != "suite" else "task", *points], rows)

    def _shared(self) -> dict[str, list[Point]] | None:
        """The points of cells that every run has; None if there are none."""
        cells = set.intersection(*({p.cell for p in found} for found in self._points.values()))
        if not cells:
            return None
        return {
            name: [point for point in found if point.cell in cells]
            for name, found in self._points.items()
        }

    def figure(self, title: str) -> Figure:
        """A line for each run: score by length, of suites the mean of their tasks."""
        return score_by_length(self.runs, title)


def write(comparison: Comparison, directory: Path, title: str) -> list[Path]:
    """Writes compare.png, compare.svg and compare.html; the directory is made if missing.

    Raises:
        InputError: the directory cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{directory} cannot be made: {error.strerror}; name another --out"
        ) from error
    figure = comparison.figure(title)
    page = directory / "compare.html"
    written = save(figure, directory / "compare")
    write_page(
        page, title=title, notes=[", ".join(comparison.runs)], pictures={"compare": figure},
        table=comparison.table,
    )  # fmt: skip
    return [*written, page]


def _names(paths: Sequence[Path], read: Sequence[tuple[Mapping[str, Any], Any]]) -> list[str]:
    """What the runs are called: test and model, and the path where these are not enough."""
    plain = [path.name if path.is_dir() else str(path) for path in paths]
    names = [
        title_of(settings, otherwise) for (settings, _), otherwise in zip(read, plain, strict=True)
    ]
    told = [
        name if names.count(name) == 1 else f"{name} ({path})"
        for name, path in zip(names, paths, strict=True)
    ]
    return [name if told.count(name) == 1 else f"{name} {i}" for i, name in enumerate(told, 1)]
