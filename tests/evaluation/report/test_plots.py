"""Check plots: their content, that labels fit, and that the same rows give the same bytes."""

import io
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from PIL import Image
from sample_rows import FOUR, SEVERAL, needle, suite

from lwm.evaluation.report.plots import (
    figures_of,
    frame_sheet,
    headline,
    heat_map,
    png,
    save_figure,
    score_by_length,
    svg,
    task_bars,
)


def texts(figure: Figure) -> list[tuple[float, float, str]]:
    return sorted((*text.get_position(), text.get_text()) for text in figure.axes[0].texts)


def labels(figure: Figure, axis: str) -> list[str]:
    return [tick.get_text() for tick in getattr(figure.axes[0], f"get_{axis}ticklabels")()]


def test_a_heat_map_labels_cells_and_leaves_missing_ones_empty() -> None:
    figure = heat_map(FOUR, headline("smollm2", FOUR), [*FOUR, needle(8192, 100.0, False)])
    # Columns are lengths, rows are depths; the center of the first cell is at 0.5.
    assert texts(figure) == [(0.5, 0.5, "50"), (0.5, 1.5, "100"), (1.5, 0.5, "0")]
    axes = figure.axes[0]
    assert labels(figure, "x") == ["1K", "4K", "8K"]
    assert labels(figure, "y") == ["0", "50", "100"]
    assert axes.yaxis_inverted()
    assert axes.get_title(loc="left") == "smollm2\n2 rounds, score 50.0%"
    assert "gray: not answered yet" in axes.get_xlabel()
    (mesh,) = [part for part in axes.collections if isinstance(part, QuadMesh)]
    assert mesh.get_clim() == (0, 100)
    values = mesh.get_array()
    assert values is not None
    assert np.ma.getmaskarray(values).sum() == 9 - 3
    red, green = mesh.cmap(0.0), mesh.cmap(1.0)
    assert red[0] > 2 * red[1]
    assert green[1] > 2 * green[0]


def test_several_needles_are_plotted_at_their_depths() -> None:
    assert texts(heat_map(SEVERAL, "x")) == [(0.5, 0.5, "100"), (0.5, 1.5, "0")]


def test_many_depths_are_grouped_by_tenths() -> None:
    rows = [needle(1024, depth / 2, depth < 20) for depth in range(201)]
    figure = heat_map(rows, "x")
    assert labels(figure, "y")[0] == "0–10"
    assert len(labels(figure, "y")) == 10
    assert texts(figure)[:2] == [(0.5, 0.5, "100"), (0.5, 1.5, "0")]


@pytest.mark.parametrize("columns", [2, 40])
def test_labels_fit_a_heat_map_of_any_width(columns: int) -> None:
    lengths = np.linspace(1000, 1 << 20, columns).astype(int).tolist()
    rows = [needle(n, depth, True) for n in lengths for depth in (0.0, 33.3, 66.7, 100.0)]
    figure = heat_map(rows, headline("hf:SOMEBODY/a-model-of-a-long-name · needle", rows))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axes, renderer = figure.axes[0], canvas.get_renderer()
    cell = axes.get_window_extent(renderer).width / columns
    assert all(text.get_window_extent(renderer).width < 0.9 * cell for text in axes.texts)
    ticks = [label.get_window_extent(renderer) for label in axes.get_xticklabels()]
    assert all(a.x1 <= b.x0 for a, b in pairwise(ticks))
    assert all(tick.y0 >= 0 for tick in ticks)
    assert figure.get_figwidth() <= 24


def test_several_runs_are_lines() -> None:
    other = [needle(1024, 0.0, True), needle(2048, 0.0, False), needle(8192, 0.0, True)]
    figure = score_by_length({"a": FOUR, "b": other}, "two")
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert np.asarray(lines["a"].get_xdata()).tolist() == [1024, 4096]
    assert np.asarray(lines["a"].get_ydata()).tolist() == [75, 0]
    assert np.asarray(lines["b"].get_ydata()).tolist() == [100, 0, 100]
    assert figure.axes[0].get_xscale() == "log"
    even = score_by_length({"a": [needle(n, 0.0, True) for n in range(1000, 9000, 1000)]}, "one")
    assert even.axes[0].get_xscale() == "linear"


def test_tasks_and_their_mean_are_bars() -> None:
    rows = [
        suite("b", 1024, 1.0), suite("b", 1024, 0.5, 1), suite("a", 1024, 0.25),
        suite("b", 4096, 0.0),
    ]  # fmt: skip
    figure = task_bars(rows, "x", 85.6)
    assert labels(figure, "x") == ["b", "a", "mean"]
    short, long = (
        [bar.get_height() for bar in bars]
        for bars in figure.axes[0].containers  # type: ignore[attr-defined]
    )
    assert short == [75, 25, 50]
    assert long[0] == long[2] == 0
    assert np.isnan(long[1])
    assert any(np.allclose(line.get_ydata(), 85.6) for line in figure.axes[0].lines)


def test_figures_suit_the_kind_of_rows() -> None:
    assert list(figures_of(FOUR, "x")) == ["heat_map", "by_length"]
    assert list(figures_of(SEVERAL, "x")) == ["heat_map"]
    assert list(figures_of([suite("a", 10, 1.0), suite("a", 20, 1.0)], "x")) == [
        "tasks", "by_length"
    ]  # fmt: skip
    assert list(figures_of([{"frames": 8, "depth_percent": 5.0, "score": 1.0}], "x")) == [
        "heat_map"
    ]


def test_the_same_rows_give_the_same_bytes_and_leave_rcparams_alone(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    name = "a model of $3^x$ <&> 大"  # no formula, no markup, and a character that the font lacks
    first, again = (heat_map(FOUR, name) for _ in range(2))
    assert svg(first) == svg(again)
    assert png(first) == png(again)
    assert "<dc:date>" not in svg(first)
    assert dict(matplotlib.rcParams) == before
    (tmp_path / "map.svg").write_text("old", encoding="utf-8")
    assert save_figure(first, tmp_path / "map") == [tmp_path / "map.png", tmp_path / "map.svg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.png", "map.svg"]
    assert (tmp_path / "map.svg").read_text(encoding="utf-8") == svg(first)


def test_a_frame_sheet_shows_frames_with_captions() -> None:
    red = np.full((4, 4, 3), (255, 0, 0), np.uint8)
    figure = frame_sheet({"one": [red, red], "two": [red, red]}, ["a", "b"])
    assert [axes.get_title() for axes in figure.axes] == ["a", "b", "", ""]
    pixels = np.asarray(Image.open(io.BytesIO(png(figure))).convert("RGB"))
    share = float((pixels == (255, 0, 0)).all(axis=-1).mean())
    assert share > 0.3
