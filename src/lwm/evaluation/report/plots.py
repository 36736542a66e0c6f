"""Plot results: a heat map of length and depth, scores by length, bars of a suite's tasks.

The same rows give the same bytes. pyplot is not used, and the style applies within each call only.

Source: the form of the heat map (context to the right, depth downwards, red to green) is that of
gkamradt/LLMTest_NeedleInAHaystack.
"""

import io
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from lwm.core.files import new_file
from lwm.evaluation.report.scores import (
    by_cell,
    by_length,
    by_task,
    cells_of,
    count_rounds,
    kind_of_rows,
    length_label,
    overall,
    points_of,
)
from lwm.evaluation.results import Rows

# Names of models may contain $, which is not a formula; SVG ids are random without a salt.
_style = matplotlib.rc_context(
    {
        "text.parse_math": False, "svg.hashsalt": "lwm", "font.family": "DejaVu Sans",
        "font.size": 10, "axes.titlesize": 12, "axes.edgecolor": "#808080",
        "figure.facecolor": "white", "legend.frameon": False,
    }
)  # fmt: skip
_RED_TO_GREEN = LinearSegmentedColormap.from_list(
    "score", ["#d9363e", "#f08a4b", "#f7dd72", "#9fcf6b", "#2e9e5b"]
)
_MAX_DEPTHS = 21  # more are grouped by tenths
_COLORS = ("#1f4e79", "#c55a11", "#3a7d44", "#7b4b94", "#b8860b", "#4a4a4a", "#c2185b", "#00838f")
_MARKERS = "osD^vP*X"


def headline(name: str, rows: Rows) -> str:
    """Format a title: what was measured, the number of rounds, and the overall score."""
    rounds = count_rounds(rows)
    score = f"score {100 * overall(points_of(rows)):.1f}%"
    return f"{name}\n{rounds} round{'s' if rounds > 1 else ''}, {score}"


@_style
def heat_map(rows: Rows, title: str, keys: Iterable[Mapping[str, Any]] = ()) -> Figure:
    """Plot the mean score of each length and depth; cells of `keys` without rows stay empty."""
    lengths, depths, grid = _depth_grid(rows, keys)
    cell = float(np.clip(13 / len(lengths), 0.42, 0.95))
    figure = Figure(
        figsize=(max(5.6, 2.0 + cell * len(lengths)), max(3.2, 1.9 + 0.42 * len(depths))),
        layout="constrained",
    )
    axes = figure.subplots()
    axes.set_facecolor("#eeeeee")
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(grid), cmap=_RED_TO_GREEN, vmin=0, vmax=100, edgecolors="none"
    )
    for place in range(len(lengths) + 1):
        axes.axvline(place, color="white", linewidth=1.2)
    for place in range(len(depths) + 1):
        axes.axhline(place, color="white", linewidth=1.2)
    size = 7.5 if cell < 0.55 else 9.5
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            axes.text(
                column + 0.5, row + 0.5, f"{value:.0f}", ha="center", va="center", fontsize=size,
                color="#202020" if 10 < value < 90 else "white",
            )  # fmt: skip
    labels = [length_label(n) for n in lengths]
    axes.set_xticks(np.arange(len(lengths)) + 0.5, labels, rotation=_rotation(labels, cell))
    axes.set_yticks(np.arange(len(depths)) + 0.5, depths)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    empty = "; gray: not answered yet" if np.isnan(grid).any() else ""
    axes.set(xlabel=f"{_unit(rows)}{empty}", ylabel="depth, %")
    bar = figure.colorbar(mesh, ax=axes, ticks=[0, 25, 50, 75, 100], pad=0.02)
    bar.set_label("score, %")
    bar.outline.set_visible(False)  # type: ignore[operator]
    return _finish(figure, axes, title)


def _depth_grid(
    rows: Rows, keys: Iterable[Mapping[str, Any]]
) -> tuple[list[int], list[str], np.ndarray]:
    """Return lengths, labels of depths, and percentages, [depths, lengths]."""
    values = by_cell(points_of(rows))
    cells = {*values, *cells_of(keys)}
    assert cells, "rows without depths have no heat map"
    lengths = sorted({length for length, _ in cells})
    depths = sorted({depth for _, depth in cells})
    labels = [f"{depth:g}" for depth in depths]
    if len(depths) > _MAX_DEPTHS:
        tenths = [(n, min(9, int(depth // 10)), value) for (n, depth), value in values.items()]
        values = {
            (n, float(tenth)): float(np.mean([v for *cell, v in tenths if cell == [n, tenth]]))
            for n, tenth, _ in tenths
        }
        depths = [float(tenth) for tenth in range(10)]
        labels = [f"{10 * tenth}–{10 * tenth + 10}" for tenth in range(10)]
    grid = [[values.get((n, depth), np.nan) for n in lengths] for depth in depths]
    return lengths, labels, np.array(grid) * 100


@_style
def score_by_length(runs: Mapping[str, Rows], title: str) -> Figure:
    """Plot a line for each named run: its mean score at each length."""
    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axes = figure.subplots()
    lengths: set[int] = set()
    for number, (name, rows) in enumerate(runs.items()):
        means = by_length(points_of(rows))
        lengths |= means.keys()
        axes.plot(
            list(means), [100 * value for value in means.values()], label=fill(name, 48),
            color=_COLORS[number % len(_COLORS)], marker=_MARKERS[number % len(_MARKERS)],
            markersize=5.5, linewidth=1.8, clip_on=False, alpha=0.9,
            linestyle="-" if number < len(_COLORS) else "--",
        )  # fmt: skip
    ticks = sorted(lengths)
    if ticks[0] > 0 and _unevenness(np.log(ticks)) < _unevenness(np.array(ticks)):
        axes.set_xscale("log", base=2)
    step = max(1, -(-len(ticks) // 12))
    shown = ticks[::-1][::step][::-1]
    labels = [length_label(n) for n in shown]
    axes.set_xticks(shown, labels, rotation=_rotation(labels, 6.6 / len(shown)))
    axes.minorticks_off()
    axes.set_ylim(0, 100)
    axes.set(xlabel=_unit(next(iter(runs.values()))), ylabel="score, %")
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=1 + (len(runs) > 3))
    return _finish(figure, axes, title)


@_style
def task_bars(rows: Rows, title: str, threshold: float | None = None) -> Figure:
    """Plot a bar for each task and length, the mean of tasks, and a line at the threshold."""
    points = points_of(rows)
    tasks, means = by_task(points), by_length(points)
    names = list(dict.fromkeys(task for task, _ in tasks))
    figure = Figure(
        figsize=(float(np.clip(2.5 + 0.8 * len(names), 6.5, 16)), 4.6), layout="constrained"
    )
    axes = figure.subplots()
    width = 0.84 / len(means)
    shades = matplotlib.colormaps["viridis"](np.linspace(0.08, 0.85, len(means)))
    for number, (length, mean) in enumerate(means.items()):
        heights = [100 * tasks.get((name, length), np.nan) for name in names] + [100 * mean]
        places = np.arange(len(names) + 1) - 0.42 + width * (number + 0.5)
        axes.bar(places, heights, width * 0.94, color=shades[number], label=length_label(length))
        for place, height in zip(places, heights, strict=True) if width > 0.25 else ():
            if np.isfinite(height):
                axes.text(
                    place, height + 1, f"{height:.0f}", ha="center", va="bottom", fontsize=7.5
                )
    if threshold is not None:
        axes.axhline(
            threshold, color="#b00020", linewidth=1, linestyle="--", label=f"{threshold:g}%"
        )
    axes.axvline(len(names) - 0.5, color="#bbbbbb", linewidth=1)
    labels = [*names, "mean"]
    axes.set_xticks(
        range(len(labels)), labels, rotation=35 if len(labels) > 5 else 0,
        ha="right" if len(labels) > 5 else "center", rotation_mode="anchor",
    )  # fmt: skip
    axes.set(xlim=(-0.55, len(names) + 0.55), ylim=(0, 106), ylabel="score, %")
    axes.set_yticks(range(0, 101, 20))
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title=_unit(rows), loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _finish(figure, axes, title)


@_style
def frame_sheet(rows: Mapping[str, Sequence[np.ndarray]], captions: Sequence[str]) -> Figure:
    """Show frames, uint8 [height, width, 3], by the label of their row, with column captions."""
    figure = Figure(
        figsize=(1.2 + 1.1 * len(captions), 0.5 + 1.15 * len(rows)), layout="constrained"
    )
    panels = figure.subplots(len(rows), len(captions), squeeze=False)
    for row, (name, frames) in zip(panels, rows.items(), strict=True):
        row[0].set_ylabel(fill(name, 14), rotation=0, ha="right", va="center")
        for axes, pixels in zip(row, frames, strict=True):
            axes.imshow(pixels, interpolation="nearest")
            axes.set_xticks([], [])
            axes.set_yticks([], [])
    for axes, caption in zip(panels[0], captions, strict=True):
        axes.set_title(caption, fontsize=10)
    return _fix_layout(figure)


def figures_of(
    rows: Rows, title: str, keys: Sequence[Mapping[str, Any]] = (), threshold: float | None = None
) -> dict[str, Figure]:
    """Plot rows in the ways that suit their kind; figures by file name."""
    points = points_of(rows)
    figures = {}
    if kind_of_rows(rows) == "suite":
        figures["tasks"] = task_bars(rows, title, threshold)
    elif any(point.depth is not None for point in points) or cells_of(keys):
        figures["heat_map"] = heat_map(rows, title, keys)
    if len(by_length(points)) > 1:
        figures["by_length"] = score_by_length({title: rows}, title)
    return figures


def svg(figure: Figure) -> str:
    """Render a figure as SVG, without a date."""
    return _render(figure, format="svg", metadata={"Date": None}).decode()


def png(figure: Figure) -> bytes:
    """Render a figure as PNG, at 192 dots per inch."""
    return _render(figure, format="png", dpi=192)


@_style
def _render(figure: Figure, **settings: Any) -> bytes:
    file = io.BytesIO()
    with _missing_glyphs_allowed():
        figure.savefig(file, **settings)
    return file.getvalue()


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write PATH.png and PATH.svg, replacing existing files, and return both paths."""
    written = []
    for suffix, data in ((".png", png(figure)), (".svg", svg(figure).encode())):
        destination = path.with_name(path.name + suffix)
        with new_file(destination, replace=True) as partial:
            partial.write_bytes(data)
        written.append(destination)
    return written


@contextmanager
def _missing_glyphs_allowed() -> Iterator[None]:
    """Show characters that the font lacks as boxes, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def _finish(figure: Figure, axes: Axes, title: str) -> Figure:
    columns = int(figure.get_figwidth() * 9)
    lines = [fill(line, columns) for line in title.splitlines()]
    axes.set_title("\n".join(lines), loc="left", pad=12, linespacing=1.35)
    return _fix_layout(figure)


def _fix_layout(figure: Figure) -> Figure:
    """Lay out the figure once; otherwise each rendering moves it slightly."""
    with _missing_glyphs_allowed():
        figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def _unit(rows: Rows) -> str:
    return "frames" if kind_of_rows(rows) == "frames" else "context length, tokens"


def _unevenness(places: np.ndarray) -> float:
    steps = np.diff(places)
    return float(np.std(steps) / np.mean(steps)) if len(steps) else 0.0


def _rotation(labels: Sequence[str], room: float) -> int:
    widest = max(map(len, labels)) * 0.085
    return 0 if widest < room else 45 if widest < 1.6 * room else 90
