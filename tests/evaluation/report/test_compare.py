"""Check comparisons of runs, also of the original LWM scripts."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro
from sample_rows import FOUR, needle, suite

from lwm.cli.evaluate import compare
from lwm.core.errors import InputError
from lwm.evaluation.report.compare import compare_runs, write_comparison


def run_of(directory: Path, rows: list[dict[str, Any]], **settings: Any) -> Path:
    directory.mkdir()
    (directory / "results.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    if settings:
        (directory / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


def test_runs_are_compared_by_length_and_on_shared_cells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = [needle(1024, 0.0, True), needle(16384, 0.0, True), needle(4096, 0.0, True)]
    ours = run_of(tmp_path / "ours", FOUR, evaluation="needle", model="smollm2")
    originals = run_of(tmp_path / "originals", longer) / "results.jsonl"
    out = tmp_path / "new" / "out"
    tyro.cli(compare, args=[str(ours), str(originals), "--out", str(out)])
    printed = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed]
    assert cells[0] == ["context", "needle · smollm2", str(originals)]
    assert cells[2:] == [
        ["1K", "75.0", "100.0"],
        ["4K", "0.0", "100.0"],
        ["16K", "", "100.0"],
        ["overall", "50.0", "100.0"],
        # Only depth 0 is shared: two rows at 1K, two at 4K.
        ["where all answered", "25.0", "100.0"],
    ]
    assert sorted(path.name for path in out.iterdir()) == [
        "compare.html", "compare.png", "compare.svg"
    ]  # fmt: skip
    page = (out / "compare.html").read_text(encoding="utf-8")
    assert "where all answered" in page
    assert "data:image/svg+xml;base64," in page


def test_suites_are_compared_by_task(tmp_path: Path) -> None:
    a = run_of(tmp_path / "a", [suite("x", 1024, 0.5), suite("y", 1024, 0.0)])
    b = run_of(tmp_path / "b", [suite("x", 1024, 1.0), suite("x", 2048, 1.0)])
    assert compare_runs([a, b]).table.rows == [
        ["x at 1K", "50.0", "100.0"],
        ["x at 2K", "", "100.0"],
        ["y at 1K", "0.0", ""],
        ["mean at 1K", "25.0", "100.0"],
        ["mean at 2K", "", "100.0"],
        ["overall", "25.0", "100.0"],
        ["where all answered", "50.0", "100.0"],
    ]


def perplexity_rows(
    theta: float, length: int, parts: dict[tuple[int, int], float]
) -> list[dict[str, Any]]:
    """Make rows of perplexity by bucket."""
    return [
        {
            "theta": theta, "length": length, "row": 0, "bucket_from": low, "bucket_to": high,
            "nll": math.log(value), "tokens": high - low,
        }
        for (low, high), value in parts.items()
    ]  # fmt: skip


def test_perplexities_are_compared_on_the_same_tokens(tmp_path: Path) -> None:
    same = {"evaluation": "perplexity", "text": "abc", "shortest": 10}
    short = perplexity_rows(1e4, 10, {(0, 10): 8.0})
    base = run_of(
        tmp_path / "a",
        short + perplexity_rows(1e4, 30, {(0, 20): 4.0, (20, 30): 16.0}),
        model="a",
        **same,
    )
    extended = run_of(
        tmp_path / "b",
        short + perplexity_rows(1e5, 30, {(0, 20): 5.0, (20, 30): 7.0}),
        model="b",
        **same,
    )
    comparison = compare_runs([base, extended])
    names = ["perplexity · a, theta 1e+04", "perplexity · b, theta 1e+04"]
    names.append("perplexity · b, theta 1e+05")
    assert list(comparison.table.header[1:]) == names
    assert comparison.table.rows == [
        ["0-10", "", "8", ""],
        ["0-20", "4", "", "5"],
        ["20-30", "16", "", "7"],
        ["last 10 of 10", "8", "8", ""],
        ["last 10 of 30", "16", "", "7"],
    ]
    by_position, by_length = comparison.figure("x").axes
    assert [np.size(line.get_xdata()) for line in by_position.lines] == [2, 1, 2]
    assert [np.asarray(line.get_xdata()).tolist() for line in by_length.lines] == [
        [10, 30],
        [10],
        [30],
    ]

    other = run_of(tmp_path / "c", short, model="c", **(same | {"text": "abd"}))
    bare = run_of(tmp_path / "d", short)
    scores = run_of(tmp_path / "e", FOUR)
    for paths, words in (
        ([base, other], "c was not measured on the tokens of perplexity · a"),
        ([base, bare], "d does not say what text"),
        ([bare, base], "d does not say what text"),
        ([base, scores], "e has results by length .* perplexity"),
    ):
        with pytest.raises(InputError, match=words):
            compare_runs(paths)


def test_runs_have_distinct_names(tmp_path: Path) -> None:
    same = {"evaluation": "needle", "model": "smollm2"}
    a, b = (run_of(tmp_path / name, FOUR, **same) for name in "ab")
    assert list(compare_runs([a, b]).runs) == [
        f"needle · smollm2 ({a})", f"needle · smollm2 ({b})"
    ]  # fmt: skip
    assert len(compare_runs([a, a]).runs) == 2


def test_runs_without_common_ground_are_refused(tmp_path: Path) -> None:
    text = run_of(tmp_path / "text", FOUR)
    video = run_of(tmp_path / "video", [{"frames": 8, "depth_percent": 0, "score": 1.0}])
    x = run_of(tmp_path / "x", [suite("x", 1024, 1.0)])
    y = run_of(tmp_path / "y", [suite("y", 1024, 1.0)])
    unscored = run_of(tmp_path / "unscored", [{"context_length": 64, "answer": "x"}])
    for paths, words in (
        ([], "no results"),
        ([tmp_path / "none"], "none holds no results"),
        ([text, video], "video has results by frames and .*text by length"),
        ([text, x], "compare runs of one kind"),
        ([x, y], "share no task"),
        ([text, unscored], "unscored has rows without a score"),
    ):
        with pytest.raises(InputError, match=words):
            compare_runs(paths)
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="--out"):
        write_comparison(compare_runs([text]), blocked / "out", "x")
