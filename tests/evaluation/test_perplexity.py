"""Check perplexity from rows of results: buckets, means by token, table and plot."""

from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from lwm.core.errors import ConfigError, InputError
from lwm.evaluation.perplexity import (
    PerplexityConfig,
    bucket_edges,
    curve_table,
    curves_by_theta,
    perplexity_curves,
    perplexity_figure,
)


@given(st.integers(1, 2_000_000), st.data())
def test_buckets_partition_a_row(length: int, data: st.DataObject) -> None:
    shortest = data.draw(st.integers(1, length))
    edges = bucket_edges(length, shortest)
    assert (edges[0], edges[-1]) == (0, length)
    assert edges == sorted(set(edges))
    assert length - shortest in edges
    assert len(edges) <= 2 * length.bit_length() + 3
    assert all(high <= 2 * low for low, high in pairwise(edges) if low >= 64)


def row(theta: float, length: int, low: int, high: int, nll: float, number: int = 0) -> dict:
    return {
        "theta": theta, "length": length, "row": number, "bucket_from": low, "bucket_to": high,
        "nll": nll, "tokens": high - low,
    }  # fmt: skip


ROWS = [
    row(1e4, 10, 0, 10, 2.0),
    row(1e4, 10, 0, 10, 4.0, number=1),
    row(1e4, 30, 0, 20, 1.0),
    row(1e4, 30, 20, 30, 3.0),
    row(1e6, 30, 0, 20, 0.5),
    row(1e6, 30, 20, 30, 800.0),  # its exponential overflows
]


def test_curves_weight_rows_by_tokens() -> None:
    short, long, other = perplexity_curves(ROWS, shortest=10)
    assert (short.theta, short.length, list(short.buckets)) == (1e4, 10, [(0, 10)])
    np.testing.assert_allclose(
        [*short.buckets.values(), short.mean, short.last], np.exp([3.0, 3.0, 3.0])
    )
    np.testing.assert_allclose(list(long.buckets.values()), np.exp([1.0, 3.0]))
    np.testing.assert_allclose([long.mean, long.last], np.exp([5 / 3, 3.0]))
    assert other.theta == 1e6
    assert np.isfinite(list(other.buckets.values())).all()
    with pytest.raises(InputError, match="not a row of perplexity"):
        perplexity_curves([{"theta": 1.0}], shortest=1)


def test_table_and_plot_contain_every_curve() -> None:
    series = curves_by_theta(perplexity_curves(ROWS, shortest=10), 1e4)
    shown = curve_table(series)
    assert shown.header[1:] == ["theta 1e+04* 10", "theta 1e+04* 30", "theta 1e+06 30"]
    cells = {name: list(rest) for name, *rest in shown.rows}
    assert cells["0-20"] == ["", "2.718", "1.649"]
    assert cells["0-10"] == ["20.09", "", ""]
    assert cells["20-30"][1] == "20.09"
    assert cells["last 10"][:2] == ["20.09", "20.09"]
    by_position, by_length = perplexity_figure(series, "a title").axes
    assert list(np.asarray(by_position.lines[1].get_ydata())) == pytest.approx(np.exp([1.0, 3.0]))
    assert list(np.asarray(by_length.lines[0].get_xdata())) == [10, 30]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 0}, "rows is 0"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"thetas": (0.0,)}, "theta is 0"),
        ({"thetas": (float("nan"),)}, "theta is nan"),
        ({"thetas": tuple(map(float, range(1, 10)))}, "9 thetas"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PerplexityConfig(lengths=[8], **settings)
