"""Compute scores from rows of results: points by length and depth, their means, and tables.

Rows may have only `correct`, as the original LWM scripts write them, verdicts for several needles,
the `task` of a suite, or the `frames` of a video.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lwm.core.errors import InputError
from lwm.evaluation.results import Rows

RowKind = Literal["length", "frames", "suite"]

_LENGTHS = ("context_length", "frames")


@dataclass(frozen=True, kw_only=True)
class Point:
    """Hold the score of one item."""

    length: int  # tokens of the context, or frames
    depth: float | None  # in percent; None if several items share a verdict
    value: float  # from 0 to 1
    task: str = ""

    @property
    def cell(self) -> tuple[str, int, float | None]:
        """Identify the item across runs."""
        return self.task, self.length, self.depth


def is_scored(row: Mapping[str, Any]) -> bool:
    """Return whether a row has a score or a verdict."""
    return "score" in row or "correct" in row


def score_of(row: Mapping[str, Any]) -> float:
    """Return the score of a row, or the mean of its verdicts; raise InputError without either."""
    value = row.get("score", row.get("correct"))
    values: list[Any] = value if isinstance(value, list) and value else [value]
    if not all(isinstance(one, int | float) and 0 <= one <= 1 for one in values):
        raise InputError(
            f"a row of the results has the score {row.get('score')!r} and the verdict "
            f"{row.get('correct')!r}; a score from 0 to 1, or true or false, is needed"
        )
    return _mean(map(float, values))


def points_of(rows: Iterable[Mapping[str, Any]]) -> list[Point]:
    """Return the points of rows, one for each verdict; raise InputError if a row is broken."""
    points = []
    for row in rows:
        length, task, value = _length(row), str(row.get("task", "")), score_of(row)
        depths, correct = row.get("depth_percent"), row.get("correct")
        if isinstance(depths, list) and isinstance(correct, list) and len(depths) == len(correct):
            values = [
                (_depth(depth), score_of({"correct": verdict}))
                for depth, verdict in zip(depths, correct, strict=True)
            ]
        else:
            values = [(None if isinstance(depths, list) else _depth(depths), value)]
        points += [Point(length=length, depth=d, value=v, task=task) for d, v in values]
    return points


def cells_of(keys: Iterable[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Return the length and depth of each key that has both."""
    return [
        (_length(key), depth)
        for key in keys
        if any(name in key for name in _LENGTHS)
        and not isinstance(key.get("depth_percent"), list)
        and (depth := _depth(key.get("depth_percent"))) is not None
    ]


def kind_of_rows(rows: Rows) -> RowKind:
    """Return what the rows were measured over."""
    if any("task" in row for row in rows):
        return "suite"
    return "frames" if any("frames" in row for row in rows) else "length"


def _length(row: Mapping[str, Any]) -> int:
    length = next((row[name] for name in _LENGTHS if name in row), None)
    if not isinstance(length, int) or isinstance(length, bool) or length < 0:
        raise InputError(
            f"a row of the results has the length {length!r}; a whole number in 'context_length' "
            "or 'frames' is needed"
        )
    return length


def _depth(depth: Any) -> float | None:
    if depth is not None and not (isinstance(depth, int | float) and 0 <= depth <= 100):
        raise InputError(
            f"a row of the results has the depth {depth!r}; a percentage from 0 to 100 is needed"
        )
    return None if depth is None else float(depth)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def _means(pairs: Iterable[tuple[Any, float]]) -> dict[Any, float]:
    values: dict[Any, list[float]] = defaultdict(list)
    for group, value in pairs:
        values[group].append(value)
    return {group: _mean(several) for group, several in values.items()}


def by_task(points: Iterable[Point]) -> dict[tuple[str, int], float]:
    """Return the mean of each task at each length, in the order of the points."""
    return _means(((point.task, point.length), point.value) for point in points)


def by_length(points: Iterable[Point]) -> dict[int, float]:
    """Return the mean at each length, with the same weight for every task of a suite."""
    means = _means((length, mean) for (_, length), mean in by_task(points).items())
    return dict(sorted(means.items()))


def by_cell(points: Iterable[Point]) -> dict[tuple[int, float], float]:
    """Return the mean of each length and depth."""
    means = _means(
        ((point.length, point.depth), point.value) for point in points if point.depth is not None
    )
    return dict(sorted(means.items()))


def overall(points: Sequence[Point]) -> float:
    """Return the mean of all points; for a suite, of the means by length."""
    if any(point.task for point in points):
        return _mean(by_length(points).values())
    return _mean(point.value for point in points)


def effective_length(points: Iterable[Point], threshold: float) -> int | None:
    """Return the greatest length whose mean reaches a threshold in percent, as RULER does."""
    # The mean of tasks that average 85.6 percent may round to slightly less than 0.856.
    reached = [n for n, mean in by_length(points).items() if 100.0 * mean >= threshold - 1e-9]
    return max(reached, default=None)


def count_rounds(rows: Iterable[Mapping[str, Any]]) -> int:
    """Return the number of rounds: rows of the cell that has most."""
    cells = (
        (row.get("task"), _length(row), None if isinstance(depth, list) else depth)
        for row in rows
        for depth in [row.get("depth_percent")]
    )
    return max(Counter(cells).values())


def length_label(length: int) -> str:
    """Format a length: 4K for 4,096 and 1M for 1,048,576."""
    if length >= 1 << 20 and length % (1 << 20) == 0:
        return f"{length >> 20}M"
    return f"{length >> 10}K" if length and length % 1024 == 0 else f"{length:,}"


def percent(value: float | None) -> str:
    """Format a score in percent with one decimal; None is empty."""
    return "" if value is None else f"{100 * value:.1f}"


@dataclass(frozen=True)
class Table:
    """Hold texts in columns, the first of which names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        """Format as Markdown with aligned columns."""
        lines = [
            [cell.replace("|", "\\|").replace("\n", " ") for cell in line]
            for line in (self.header, *self.rows)
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

        def text(cells: Sequence[str]) -> str:
            first = cells[0].ljust(widths[0])
            rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
            return f"| {' | '.join([first, *rest])} |"

        return "\n".join(map(text, [lines[0], rule, *lines[1:]]))


def length_table(points: Sequence[Point], kind: RowKind) -> Table:
    """Tabulate scores in percent by length, and overall."""
    counts = Counter(point.length for point in points)
    rows = [
        [length_label(length), f"{counts[length]:,}", percent(value)]
        for length, value in by_length(points).items()
    ]
    unit = "frames" if kind == "frames" else "context"
    total = ["overall", f"{len(points):,}", percent(overall(points))]
    return Table([unit, "asked", "score, %"], [*rows, total])


def task_table(points: Sequence[Point]) -> Table:
    """Tabulate scores in percent of each task at each length."""
    means, lengths = by_task(points), by_length(points)
    tasks = dict.fromkeys(point.task for point in points)
    rows = [[task, *(percent(means.get((task, length))) for length in lengths)] for task in tasks]
    header = ["task", *map(length_label, lengths)]
    return Table(header, [*rows, ["mean", *map(percent, lengths.values())]])
