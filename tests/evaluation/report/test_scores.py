"""Check scores of rows against values computed by hand."""

from typing import Any

import pytest
from sample_rows import FOUR, SEVERAL, needle, suite

from lwm.core.errors import InputError
from lwm.evaluation.report.scores import (
    Table,
    by_cell,
    by_length,
    count_rounds,
    kind_of_rows,
    length_label,
    length_table,
    overall,
    points_of,
    score_of,
    task_table,
)


def test_means_of_rows_with_verdicts_only() -> None:
    points = points_of(FOUR)
    assert by_cell(points) == {(1024, 0.0): 0.5, (1024, 50.0): 1.0, (4096, 0.0): 0.0}
    assert by_length(points) == {1024: 0.75, 4096: 0.0}
    assert overall(points) == 0.5
    assert count_rounds(FOUR) == 2


def test_each_of_several_needles_counts_at_its_depth() -> None:
    points = points_of(SEVERAL)
    assert by_cell(points) == {(2048, 10.0): 1.0, (2048, 90.0): 0.0}
    assert overall(points) == 0.5
    assert count_rounds([*SEVERAL, *SEVERAL]) == 2
    # The original LWM scripts write one depth for all needles.
    one = needle(2048, 30.0, True) | {"correct": [True, True, False, False]}
    assert by_cell(points_of([one])) == {(2048, 30.0): 0.5}


def test_every_task_of_a_suite_has_the_same_weight() -> None:
    rows = [suite("many", 1024, 1.0, seed) for seed in range(3)] + [suite("few", 1024, 0.0)]
    assert by_length(points_of(rows)) == {1024: 0.5}
    assert task_table(points_of(rows)).rows == [
        ["many", "100.0"], ["few", "0.0"], ["mean", "50.0"]
    ]  # fmt: skip


def test_kinds_of_rows() -> None:
    assert kind_of_rows(FOUR) == "length"
    assert kind_of_rows([suite("a", 10, 1.0)]) == "suite"
    assert kind_of_rows([{"frames": 8, "score": 1.0}]) == "frames"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"context_length": 10, "response": "x"}, "score None"),
        ({"context_length": 10, "score": 1.5}, "score 1.5"),
        ({"context_length": 10, "score": float("nan")}, "score nan"),
        ({"context_length": 10, "correct": []}, r"verdict \[\]"),
        ({"context_length": 10, "correct": [True, "no"]}, "verdict"),
        ({"score": 1.0}, "length None"),
        ({"context_length": "long", "score": 1.0}, "length 'long'"),
        ({"context_length": 10, "depth_percent": 101, "score": 1.0}, "depth 101"),
        ({"context_length": 10, "depth_percent": "deep", "score": 1.0}, "depth 'deep'"),
    ],
)
def test_broken_rows_are_refused(row: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        points_of([row])


def test_scores_of_verdicts() -> None:
    assert score_of({"correct": True}) == 1.0
    assert score_of({"correct": [True, False, False, False]}) == 0.25
    assert score_of({"correct": False, "score": 0.75}) == 0.75


def test_tables_are_aligned_markdown() -> None:
    assert str(length_table(points_of(FOUR), "length")).splitlines() == [
        "| context | asked | score, % |",
        "| ------- | ----: | -------: |",
        "| 1K      |     4 |     75.0 |",
        "| 4K      |     2 |      0.0 |",
        "| overall |     6 |     50.0 |",
    ]
    assert "a\\|b c" in str(Table(["x"], [["a|b\nc"]]))


def test_labels_of_lengths() -> None:
    labels = {512: "512", 1000: "1,000", 1024: "1K", 131072: "128K", 1 << 20: "1M", 0: "0"}
    assert {length: length_label(length) for length in labels} == labels
