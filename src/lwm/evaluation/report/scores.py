"""Rows of results as numbers: points of length, depth and score, their means, and tables of them.

Takes every kind of row: the original's, with nothing but `correct`; several needles' in one row;
a suite's with its `task`; a video's with `frames`. Knows no task, no model and no files, and draws
nothing.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lwm.core.errors import InputError

Kind = Literal["length", "frames", "suite"]
"""What rows are of: prompts of some tokens, videos of some frames, or a suite's tasks."""

_LENGTHS = ("context_length", "frames")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One thing that was asked.

    Args:
        length: tokens of the context, or frames of the video.
        depth: per cent; None where nothing was hidden, or several things with one verdict.
        value: from 0 to 1.
        task: of a suite, else empty.
    """

    length: int
    depth: float | None
    value: float
    task: str = ""

    @property
    def cell(self) -> tuple[str, int, float | None]:
        return self.task, self.length, self.depth


def is_scored(row: Mapping[str, Any]) -> bool:
    """Whether a row says how good its response is."""
    return "score" in row or "correct" in row


def value_of(row: Mapping[str, Any]) -> float:
    """How good the response of a row is, from 0 to 1; from its verdicts where it has no score.

    Raises:
        InputError: it has neither, or they are no such numbers.
    """
    value = row.get("score", row.get("correct"))
    values: list[Any] = value if isinstance(value, list) and value else [value]
    if not all(isinstance(one, int | float) and 0 <= one <= 1 for one in values):
        raise InputError(
            f"a row of the results has the score {row.get('score')!r} and the verdict "
            f"{row.get('correct')!r}; a score from 0 to 1, or true or false, is needed"
        )
    return _mean(map(float, values))


def points_of(rows: Iterable[Mapping[str, Any]]) -> list[Point]:
    """All that the rows were asked; a row with a verdict for each of several depths gives as many
    points.

    Raises:
        InputError: a row says no length, or no score, or its depths are no numbers.
    """
    points = []
    for row in rows:
        length, task = _length(row), str(row.get("task", ""))
        depths, correct = row.get("depth_percent"), row.get("correct")
        value = value_of(row)
        if isinstance(depths, list) and isinstance(correct, list) and len(depths) == len(correct):
            told = [
                (_depth(d), value_of({"correct": c})) for d, c in zip(depths, correct, strict=True)
            ]
        else:
            told = [(None if isinstance(depths, list) else _depth(depths), value)]
        points += [Point(length=length, depth=d, value=v, task=task) for d, v in told]
    return points


def cells_of(keys: Iterable[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Length and depth of what is to be asked, as far as its keys tell."""
    return [
        (_length(key), depth)
        for key in keys
        if any(name in key for name in _LENGTHS)
        and not isinstance(key.get("depth_percent"), list)
        and (depth := _depth(key.get("depth_percent"))) is not None
    ]


def kind_of(rows: Sequence[Mapping[str, Any]]) -> Kind:
    """What the rows are of."""
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
    if depth is None:
        return None
    if not isinstance(depth, int | float) or not 0 <= depth <= 100:
        raise InputError(
            f"a row of the results has the depth {depth!r}; per cent from 0 to 100 are needed"
        )
    return float(depth)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)


def by_task(points: Iterable[Point]) -> dict[tuple[str, int], float]:
    """Mean of each task at each length, tasks in the order they come in."""
    values: dict[tuple[str, int], list[float]] = defaultdict(list)
    for point in points:
        values[point.task, point.length].append(point.value)
    return {key: _mean(found) for key, found in values.items()}


def by_length(points: Iterable[Point]) -> dict[int, float]:
    """Mean at each length: of tasks, each of which weighs the same however many rows it has."""
    means: dict[int, list[float]] = defaultdict(list)
    for (_, length), value in by_task(points).items():
        means[length].append(value)
    return {length: _mean(found) for length, found in sorted(means.items())}


def by_cell(points: Iterable[Point]) -> dict[tuple[int, float], float]:
    """Mean of each length and depth."""
    values: dict[tuple[int, float], list[float]] = defaultdict(list)
    for point in points:
        if point.depth is not None:
            values[point.length, point.depth].append(point.value)
    return {cell: _mean(found) for cell, found in sorted(values.items())}


def overall(points: Sequence[Point]) -> float:
    """Mean of all that was asked; of a suite, of its lengths' means."""
    if any(point.task for point in points):
        return _mean(by_length(points).values())
    return _mean(point.value for point in points)


def effective_length(points: Iterable[Point], threshold: float) -> int | None:
    """The greatest length whose mean reaches a threshold in per cent; None where none does.
    RULER's rule (arXiv 2404.06654, section 4)."""
    # 85.6 per cent are not quite 0.856 when their tasks' means are added up.
    reached = [n for n, mean in by_length(points).items() if 100.0 * mean >= threshold - 1e-9]
    return max(reached, default=None)


def rounds(rows: Iterable[Mapping[str, Any]]) -> int:
    """How often that was asked which was asked most often."""
    cells = (
        (row.get("task"), _length(row), None if isinstance(depth, list) else depth)
        for row in rows
        for depth in [row.get("depth_percent")]
    )
    return max(Counter(cells).values())


def length_label(length: int) -> str:
    """As in 4K for 4,096 and 1M for 1,048,576."""
    if length >= 1 << 20 and length % (1 << 20) == 0:
        return f"{length >> 20}M"
    return f"{length >> 10}K" if length and length % 1024 == 0 else f"{length:,}"


def percent(value: float | None) -> str:
    """One place behind the point; nothing for nothing."""
    return "" if value is None else f"{100 * value:.1f}"


@dataclass(frozen=True)
class Table:
    """Texts in columns, the first of which names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        """As Markdown, padded so that it reads well as it is."""
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


def length_table(points: Sequence[Point], kind: Kind) -> Table:
    """Scores in per cent of each length and over all."""
    counts = Counter(point.length for point in points)
    rows = [
        [length_label(length), f"{counts[length]:,}", percent(value)]
        for length, value in by_length(points).items()
    ]
    unit = "frames" if kind == "frames" else "context"
    whole = ["overall", f"{len(points):,}", percent(overall(points))]
    return Table([unit, "asked", "score, %"], [*rows, whole])


def task_table(points: Sequence[Point]) -> Table:
    """Scores in per cent of each task at each length."""
    means, lengths = by_task(points), by_length(points)
    tasks = dict.fromkeys(point.task for point in points)
    rows = [[task, *(percent(means.get((task, length))) for length in lengths)] for task in tasks]
    header = ["task", *map(length_label, lengths)]
    return Table(header, [*rows, ["mean", *map(percent, lengths.values())]])
