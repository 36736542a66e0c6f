"""Packing conserves tokens and loss, and goes on exactly from any row."""

from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm.attention import mask
from lwm.core.errors import InputError
from lwm.data.examples.examples import Example
from lwm.data.rows.packing import (
    PADDING,
    LossWeights,
    Packing,
    Position,
    Row,
    open_rows,
    pack_rows,
)

FILLER = 10_000_000  # tokens from here on belong to no example of a test

Given = list[Example | None]


def example(first: int, weights: list[int]) -> Example:
    tokens = list(range(first, first + len(weights)))
    return Example.of_text(tokens, [float(w) for w in weights])


Weights = list[list[int] | None]


def some(weight: st.SearchStrategy[int]) -> st.SearchStrategy[Weights]:
    return st.lists(st.none() | st.lists(weight, min_size=1, max_size=40))


ANY, LEARNT = some(st.integers(0, 1)), some(st.just(1))


def examples(weights: Weights) -> Given:
    """Examples of which no two share a token; None for blank ones."""
    found: Given = []
    first = 0
    for each in weights:
        found.append(None if each is None else example(first, each))
        first += len(each or ())
    return found


def rows_of(
    given: Given,
    length: int,
    packing: Packing,
    loss_weights: LossWeights = "token",
    start: Position = Position(),
) -> list[tuple[Row, Position]]:
    """All rows that hold a token of the examples; fillers of a whole row follow these."""

    def draw(number: int) -> Example | None:
        if number < len(given):
            return given[number]
        assert number < len(given) + 100, "a packer reads on and on"
        return example(FILLER + number * (length + 1), [1] * (length + 1))

    made = pack_rows(draw, start, length=length, packing=packing, loss_weights=loss_weights)
    most = len(given) + 2 * open_rows(length)
    found = []
    for row, position in made:
        if position.draw > most:
            return found
        found.append((row, position))
    raise AssertionError


def segments(row: Row) -> list[tuple[tuple[float, ...], ...]]:
    """What each segment of a row holds, in a form that compares."""
    return [
        tuple(
            tuple(row[name][row["segments"] == segment].tolist())
            for name in ("tokens", "targets", "weights", "positions")
        )
        for segment in range(row["segments"].max() + 1)
    ]


def real(rows: list[tuple[Row, Position]]) -> Counter:
    """The segments that do not belong to fillers."""
    found = Counter(part for row, _ in rows for part in segments(row))
    return Counter({part: n for part, n in found.items() if part[0][0] < FILLER})


LENGTHS = st.integers(1, 24)


def test_padding_is_what_attention_takes_for_padding() -> None:
    assert PADDING == mask.PADDING


@given(LEARNT, LENGTHS)
def test_concatenation_is_the_running_text(weights: Weights, length: int) -> None:
    given = examples(weights)
    rows = rows_of(given, length, "concatenate")
    run = np.concatenate([np.zeros(0, np.int32), *(e.tokens for e in given if e is not None)])
    tokens = np.concatenate([row["tokens"] for row, _ in rows])
    targets = np.concatenate([row["targets"] for row, _ in rows])
    np.testing.assert_array_equal(tokens[: len(run)], run)
    np.testing.assert_array_equal(targets[:-1], tokens[1:])  # each token is a target once
    for row, _ in rows:
        np.testing.assert_array_equal(row["positions"], np.arange(length))
        assert not row["segments"].any()


@given(ANY, LENGTHS)
def test_concatenation_conserves_loss(weights: Weights, length: int) -> None:
    """Rows without loss may be left out; no weighted target may."""
    given = examples(weights)
    rows = rows_of(given, length, "concatenate")
    learnt = {
        int(target)
        for row, _ in rows
        for target, weight in zip(row["targets"], row["weights"], strict=True)
        if weight and target < FILLER
    }
    first = next((e for e in given if e is not None), None)
    expected = {
        int(token)
        for e in given
        if e is not None
        for token, weight in zip(e.tokens, e.weights, strict=True)
        if weight and not (e is first and token == e.tokens[0])
    }
    assert learnt == expected


@pytest.mark.parametrize("packing", ["pack", "pad"])
@given(weights=ANY, length=LENGTHS)
def test_whole_examples_conserve_pairs_and_loss(
    packing: Packing, weights: Weights, length: int
) -> None:
    given = examples(weights)
    rows = rows_of(given, length, packing)
    pairs: Counter = Counter()
    for tokens, targets, learnt, positions in real(rows).elements():
        assert list(positions) == list(range(len(positions)))
        assert all(b == a + 1 for a, b in zip(tokens, targets, strict=True))
        assert any(learnt)  # a piece that teaches nothing takes no room
        pairs.update(zip(tokens, targets, learnt, strict=True))
    expected: Counter = Counter()
    for e in given:
        for start in range(0, 0 if e is None else len(e) - 1, length):
            assert e is not None
            piece = e.tokens[start : start + length + 1].tolist()
            learnt = e.weights[start + 1 : start + length + 1].tolist()
            if any(learnt):
                expected.update(
                    (*pair, w) for pair, w in zip(pairwise(piece), learnt, strict=True)
                )
    assert pairs == expected


@given(ANY, LENGTHS)
def test_packed_counts_as_padded(weights: Weights, length: int) -> None:
    """The same pieces with the same weights, each of which sums to one."""
    given = examples(weights)
    packed = real(rows_of(given, length, "pack", "example"))
    padded = real(rows_of(given, length, "pad", "example"))
    assert packed == padded
    for _, _, scaled, _ in packed:
        assert sum(scaled) == pytest.approx(1)


@given(ANY, LENGTHS)
def test_a_concatenated_row_counts_one(weights: Weights, length: int) -> None:
    given = examples(weights)
    for row, _ in rows_of(given, length, "concatenate", "example"):
        assert row["weights"].sum() == pytest.approx(1)


@given(ANY, LENGTHS)
def test_padding_is_inert(weights: Weights, length: int) -> None:
    given = examples(weights)
    for packing in ("pack", "pad"):
        for row, _ in rows_of(given, length, packing):
            padding = row["segments"] == PADDING
            assert not row["weights"][padding].any()
            assert not row["tokens"][padding].any()
            assert (np.diff(row["segments"][~padding]) >= 0).all()
            assert not padding[: np.count_nonzero(~padding)].any()  # at the end alone


@pytest.mark.parametrize("packing", ["concatenate", "pack", "pad"])
@given(data=st.data(), weights=ANY, length=LENGTHS)
def test_resumes_after_any_row(
    packing: Packing, data: st.DataObject, weights: Weights, length: int
) -> None:
    given = examples(weights)
    rows = rows_of(given, length, packing, "example")
    at = data.draw(st.integers(0, len(rows) - 1))
    rest = rows_of(given, length, packing, "example", start=rows[at][1])
    assert len(rest) == len(rows) - at - 1
    for (row, position), (again, position_again) in zip(rows[at + 1 :], rest, strict=True):
        assert position == position_again
        for name, values in row.items():
            np.testing.assert_array_equal(values, again[name])


def test_packing_wastes_little() -> None:
    lengths = np.random.default_rng(0).integers(5, 400, 2000)
    given: Given = [example(i * 1000, [1] * n) for i, n in enumerate(lengths)]

    def draw(number: int) -> Example | None:
        return given[number]

    rows = pack_rows(draw, Position(), length=1024, packing="pack", loss_weights="token")
    padding = [(row["segments"] == PADDING).mean() for row, _ in islice(rows, 300)]
    assert np.mean(padding) < 0.05


def test_other_data_than_the_position_was_saved_with_is_told() -> None:
    def draw(number: int) -> Example | None:
        return example(0, [1] * 5)

    rows = pack_rows(draw, Position(0, 9), length=4, packing="concatenate", loss_weights="token")
    with pytest.raises(InputError, match="the data changed after"):
        next(rows)
