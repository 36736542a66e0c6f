"""Several runs side by side: one table, one picture.

Knows results files; knows no model and no task.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lwm.core.errors import InputError
from lwm.evaluation.plots import Rows, save, score_by_length
from lwm.evaluation.report import title_of, write_page
from lwm.evaluation.results import read_results
from lwm.evaluation.scores import (
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

_KINDS: dict[Kind, str] = {
    "length": "prompts of some tokens",
    "frames": "videos of some frames",
    "suite": "a suite's tasks",
}


class Comparison:
    """Runs of one kind, each under a name of its own.

    Args:
        paths: directories of runs, or files of rows; the original's, too.

    Raises:
        InputError: a path holds no results, rows without scores, or those of another kind than
            the first's; or suites share no task.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        if not paths:
            raise InputError("no results are given; name directories of runs, or their files")
        read = [read_results(path) for path in paths]
        self.runs: dict[str, Rows] = dict(
            zip(_names(paths, read), [r for _, r in read], strict=True)
        )
        for path, (_, rows) in zip(paths, read, strict=True):
            if not all(map(is_scored, rows)):
                raise InputError(
                    f"{path} has rows without a score or a verdict, which cannot be compared; "
                    "name results of needles, suites or videos"
                )
        kinds: list[Kind] = [kind_of(rows) for rows in self.runs.values()]
        for path, kind in zip(paths, kinds, strict=True):
            if kind != kinds[0]:
                raise InputError(
                    f"{path} is of {_KINDS[kind]} and {paths[0]} of {_KINDS[kinds[0]]}, which "
                    "have nothing in common; compare runs of one kind"
                )
        self.kind = kinds[0]
        self._points = {name: points_of(rows) for name, rows in self.runs.items()}
        shared = set.intersection(*({p.task for p in found} for found in self._points.values()))
        if not shared:
            raise InputError(
                f"{paths[0]} and the other results share no task; compare runs of one suite"
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

    def write(self, directory: Path, title: str) -> list[Path]:
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
        figure = self.figure(title)
        page = directory / "compare.html"
        written = save(figure, directory / "compare")
        write_page(
            page, title=title, notes=[", ".join(self.runs)], pictures={"compare": figure},
            table=self.table,
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
