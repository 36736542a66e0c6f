"""Check that packing conserves tokens and loss, and resumes exactly from any row."""

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

Examples = list[Example | None]


def example(first: int, weights: list[int]) -> Example:
    tokens = list(range(first, first + len(weights)))
    return Example.of_text(tokens, [float(w) for w in weights])


Weights = list[list[int] | None]


def some(weight: st.SearchStrategy[int]) -> st.SearchStrategy[Weights]:
    return st.lists(st.none() | st.lists(weight, min_size=1, max_size=40))


ANY, WEIGHTED = some(st.integers(0, 1)), some(st.just(1))


def examples(weights: Weights) -> Examples:
    """Make examples without shared tokens; None for blank ones."""
    result: Examples = []
    first = 0
    for each in weights:
        result.append(None if each is None else example(first, each))
        first += len(each or ())
    return result


def rows_of(
    inputs: Examples,
    length: int,
    packing: Packing,
    loss_weights: LossWeights = "token",
    start: Position = Position(),
) -> list[tuple[Row, Position]]:
    """Return all rows with a token of the examples; fillers of one row each follow them."""

    def draw(number: int) -> Example | None:
        if number < len(inputs):
            return inputs[number]
        assert number < len(inputs) + 100, "the packer never stops reading"
        return example(FILLER + number * (length + 1), [1] * (length + 1))

    made = pack_rows(draw, start, length=length, packing=packing, loss_weights=loss_weights)
    most = len(inputs) + 2 * open_rows(length)
    result = []
    for row, position in made:
        if position.draw > most:
            return result
        result.append((row, position))
    raise AssertionError


def segments(row: Row) -> list[tuple[tuple[float, ...], ...]]:
    return [
        tuple(
            tuple(row[name][row["segments"] == segment].tolist())
            for name in ("tokens", "targets", "weights", "positions")
        )
        for segment in range(row["segments"].max() + 1)
    ]


def real(rows: list[tuple[Row, Position]]) -> Counter:
    """Return the segments that do not belong to fillers."""
    result = Counter(part for row, _ in rows for part in segments(row))
    return Counter({part: n for part, n in result.items() if part[0][0] < FILLER})


LENGTHS = st.integers(1, 24)


def test_padding_segment_equals_attention_padding() -> None:
    assert PADDING == mask.PADDING


@given(WEIGHTED, LENGTHS)
def test_concatenation_is_the_joined_text(weights: Weights, length: int) -> None:
    inputs = examples(weights)
    rows = rows_of(inputs, length, "concatenate")
    run = np.concatenate([np.zeros(0, np.int32), *(e.tokens for e in inputs if e is not None)])
    tokens = np.concatenate([row["tokens"] for row, _ in rows])
    targets = np.concatenate([row["targets"] for row, _ in rows])
    np.testing.assert_array_equal(tokens[: len(run)], run)
    np.testing.assert_array_equal(targets[:-1], tokens[1:])  # each token is a target once
    for row, _ in rows:
        np.testing.assert_array_equal(row["positions"], np.arange(length))
        assert not row["segments"].any()


@given(ANY, LENGTHS)
def test_concatenation_conserves_loss(weights: Weights, length: int) -> None:
    """Check that only targets without loss are omitted."""
    inputs = examples(weights)
    rows = rows_of(inputs, length, "concatenate")
    losses = {
        int(target)
        for row, _ in rows
        for target, weight in zip(row["targets"], row["weights"], strict=True)
        if weight and target < FILLER
    }
    first = next((e for e in inputs if e is not None), None)
    expected = {
        int(token)
        for e in inputs
        if e is not None
        for token, weight in zip(e.tokens, e.weights, strict=True)
        if weight and not (e is first and token == e.tokens[0])
    }
    assert losses == expected


@pytest.mark.parametrize("packing", ["pack", "pad"])
@given(weights=ANY, length=LENGTHS)
def test_whole_examples_conserve_pairs_and_loss(
    packing: Packing, weights: Weights, length: int
) -> None:
    inputs = examples(weights)
    rows = rows_of(inputs, length, packing)
    pairs: Counter = Counter()
    for tokens, targets, losses, positions in real(rows).elements():
        assert list(positions) == list(range(len(positions)))
        assert all(b == a + 1 for a, b in zip(tokens, targets, strict=True))
        assert any(losses)  # pieces without loss are omitted
        pairs.update(zip(tokens, targets, losses, strict=True))
    expected: Counter = Counter()
    for e in inputs:
        for start in range(0, 0 if e is None else len(e) - 1, length):
            assert e is not None
            piece = e.tokens[start : start + length + 1].tolist()
            losses = e.weights[start + 1 : start + length + 1].tolist()
            if any(losses):
                expected.update(
                    (*pair, w) for pair, w in zip(pairwise(piece), losses, strict=True)
                )
    assert pairs == expected


@given(ANY, LENGTHS)
def test_packed_pieces_equal_padded_pieces(weights: Weights, length: int) -> None:
    """Check that both give the same pieces with weights that sum to one."""
    inputs = examples(weights)
    packed = real(rows_of(inputs, length, "pack", "example"))
    padded = real(rows_of(inputs, length, "pad", "example"))
    assert packed == padded
    for _, _, scaled, _ in packed:
        assert sum(scaled) == pytest.approx(1)


@given(ANY, LENGTHS)
def test_concatenated_row_weights_sum_to_one(weights: Weights, length: int) -> None:
    inputs = examples(weights)
    for row, _ in rows_of(inputs, length, "concatenate", "example"):
        assert row["weights"].sum() == pytest.approx(1)


@given(ANY, LENGTHS)
def test_padding_is_zero_and_last(weights: Weights, length: int) -> None:
    inputs = examples(weights)
    for packing in ("pack", "pad"):
        for row, _ in rows_of(inputs, length, packing):
            padding = row["segments"] == PADDING
            assert not row["weights"][padding].any()
            assert not row["tokens"][padding].any()
            assert (np.diff(row["segments"][~padding]) >= 0).all()
            assert not padding[: np.count_nonzero(~padding)].any()


@pytest.mark.parametrize("packing", ["concatenate", "pack", "pad"])
@given(data=st.data(), weights=ANY, length=LENGTHS)
def test_resumes_after_any_row(
    packing: Packing, data: st.DataObject, weights: Weights, length: int
) -> None:
    inputs = examples(weights)
    rows = rows_of(inputs, length, packing, "example")
    at = data.draw(st.integers(0, len(rows) - 1))
    rest = rows_of(inputs, length, packing, "example", start=rows[at][1])
    assert len(rest) == len(rows) - at - 1
    for (row, position), (again, position_again) in zip(rows[at + 1 :], rest, strict=True):
        assert position == position_again
        for name, values in row.items():
            np.testing.assert_array_equal(values, again[name])


def test_packing_leaves_little_padding() -> None:
    lengths = np.random.default_rng(0).integers(5, 400, 2000)
    inputs: Examples = [example(i * 1000, [1] * n) for i, n in enumerate(lengths)]

    def draw(number: int) -> Example | None:
        return inputs[number]

    rows = pack_rows(draw, Position(), length=1024, packing="pack", loss_weights="token")
    padding = [(row["segments"] == PADDING).mean() for row, _ in islice(rows, 300)]
    assert np.mean(padding) < 0.05


def test_changed_data_is_refused() -> None:
    def draw(number: int) -> Example | None:
        return example(0, [1] * 5)

    rows = pack_rows(draw, Position(0, 9), length=4, packing="concatenate", loss_weights="token")
    with pytest.raises(InputError, match="the data changed after"):
        next(rows)
