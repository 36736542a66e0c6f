"""Pack examples into rows of a fixed number of (input, target) pairs.

`concatenate` joins the tokens of all examples and cuts them at the row's length (the original's
method for text), `pack` fits whole examples into rows in which each attends only to itself, `pad`
gives each example a row. An example of n tokens has n - 1 pairs; one that is longer than a row, as
plain texts may be, is cut into pieces that overlap by one token, so that each pair occurs once.

Packing is a pure function of the examples and a `Position`, so a checkpoint needs only a few
numbers however long the examples are. Rows hold ids of the model's one table: text, then vision.

Source: masked packing and its loss weights, LWM (arXiv 2402.08268), sections 3.2 and 4.2.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from lwm.core.errors import InputError
from lwm.data.examples.examples import Example

PADDING = -1  # the segment of padding, as in attention.mask, which this package does not import
_OPEN_TOKENS = 1 << 18  # tokens in one stream's open rows, roughly
_LEAST_OPEN, _MOST_OPEN = 4, 16

Row = dict[str, np.ndarray]
"""`tokens`, `targets`, `positions`, `segments` int32 and `weights` float32, each [seq]; stacked, a
batch."""

Packing = Literal["concatenate", "pack", "pad"]
LossWeights = Literal["example", "token", "halves", "row_halves"]


class Position(NamedTuple):
    """Name the place where a stream's next row begins."""

    draw: int = 0  # number of the stream's example that holds the first token
    offset: int = 0  # index of the first token in that example
    rows: int = 0  # `pack`: rows already returned of all rows packed together from here


Draw = Callable[[int], Example | None]
"""Returns the stream's k-th example, for any k; None where it cannot be used."""

PackedRows = Iterator[tuple[Row, Position]]
"""Rows without end, each with the position after it."""


def pack_rows(
    draw: Draw,
    start: Position,
    *,
    length: int,
    packing: Packing,
    loss_weights: LossWeights,
    text_vocab: int = 0,
) -> PackedRows:
    """Yield rows of `length` pairs; raise InputError if `start` was saved with other data.

    Args:
        text_vocab: text ids in the model's table; unused where no example has vision codes.
    """
    cut = _running_text if packing == "concatenate" else _examples
    pieces = (piece for piece in cut(draw, start, length, text_vocab) if piece.weights.any())
    if loss_weights != "row_halves":
        pieces = (
            piece._replace(
                weights=_scaled(piece.weights, piece.tokens[1:] >= text_vocab, loss_weights)
            )
            for piece in pieces
        )
    padded = ((_row([piece], length), piece.end) for piece in pieces)
    for row, position in _pack(pieces, start.rows, length) if packing == "pack" else padded:
        if loss_weights == "row_halves":
            row["weights"] = _scaled(row["weights"], row["targets"] >= text_vocab, loss_weights)
        yield row, position


class _Piece(NamedTuple):
    """Hold consecutive tokens that fit into a row."""

    tokens: np.ndarray
    weights: np.ndarray  # of the targets, one fewer than tokens
    start: Position
    end: Position  # the start of the next piece


def _running_text(draw: Draw, start: Position, length: int, text_vocab: int) -> Iterator[_Piece]:
    """Cut the joined tokens of all examples into pieces that fill a row each."""
    number, at, end = start.draw, start.offset, 0  # places count from the example `start.draw`
    unread: deque[tuple[int, int, np.ndarray, np.ndarray]] = deque()  # place, number, ids, weights
    while True:
        while end - at <= length:
            example = draw(number)
            size = 0 if example is None else len(example)
            if number == start.draw and start.offset >= max(size, 1):
                raise InputError(
                    "the data changed after its position was saved; use the same data and "
                    "tokenizer, or begin a fresh run"
                )
            if example is not None and size:
                unread.append((end, number, example.ids(text_vocab), example.weights))
                end += size
            number += 1
        parts = [
            (ids[span], weights[span])
            for place, _, ids, weights in unread
            for span in [slice(max(at - place, 0), at + length + 1 - place)]
        ]
        tokens, weights = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        begin = Position(unread[0][1], at - unread[0][0])
        at += length  # the last token of a row is the first of the next
        while len(unread) > 1 and unread[1][0] <= at:
            unread.popleft()
        yield _Piece(tokens, weights[1:], begin, Position(unread[0][1], at - unread[0][0]))


def _examples(draw: Draw, start: Position, length: int, text_vocab: int) -> Iterator[_Piece]:
    """Yield each example as one piece, or as several if it is longer than a row."""
    number, offset = start.draw, start.offset
    while True:
        example = draw(number)
        if example is not None:
            ids, last = example.ids(text_vocab), len(example) - 1
            while offset < last:
                end = min(offset + length, last)
                after = Position(number, end) if end < last else Position(number + 1)
                weights = example.weights[offset + 1 : end + 1]
                yield _Piece(ids[offset : end + 1], weights, Position(number, offset), after)
                offset = end
        number, offset = number + 1, 0


def open_rows(length: int) -> int:
    """Return how many rows `pack` fills at a time: more rows waste less, fewer use less memory."""
    return min(max(_OPEN_TOKENS // length, _LEAST_OPEN), _MOST_OPEN)


def _pack(pieces: Iterator[_Piece], returned: int, length: int) -> PackedRows:
    """Put each piece where it leaves the least room (best fit). A piece that fits into none of the
    open rows closes them all, and begins the next ones."""
    piece = next(pieces)
    while True:
        start, rows, room = piece.start, [], []
        while True:
            pairs = len(piece.weights)
            fitting = [(left, i) for i, left in enumerate(room) if left >= pairs]
            if fitting:
                _, best = min(fitting)
                rows[best].append(piece)
                room[best] -= pairs
            elif len(rows) < open_rows(length):
                rows.append([piece])
                room.append(length - pairs)
            else:
                break
            piece = next(pieces)
        for done, row in enumerate(rows[returned:], returned + 1):
            after = start._replace(rows=done) if done < len(rows) else piece.start
            yield _row(row, length), after
        returned = 0


def _row(pieces: list[_Piece], length: int) -> Row:
    row: Row = {
        name: np.zeros(length, np.int32) for name in ("tokens", "targets", "positions", "segments")
    }
    row["segments"][:] = PADDING
    row["weights"] = np.zeros(length, np.float32)
    at = 0
    for segment, piece in enumerate(pieces):
        pairs = len(piece.weights)
        span = slice(at, at + pairs)
        row["tokens"][span], row["targets"][span] = piece.tokens[:-1], piece.tokens[1:]
        row["positions"][span], row["segments"][span] = np.arange(pairs), segment
        row["weights"][span] = piece.weights
        at = span.stop
    return row


def _scaled(weights: np.ndarray, vision: np.ndarray, loss_weights: LossWeights) -> np.ndarray:
    """Scale the weights of the targets of a piece, or of a row that is weighted as a whole.

    By `example` they sum to one: the sum of losses over the sum of weights is then the mean over
    examples of each one's mean, whichever rows they share. By halves, the text targets share one
    half and the vision targets the other; a kind without targets has no half, as in the original.
    """
    if loss_weights in ("halves", "row_halves"):
        scaled = np.zeros_like(weights, np.float32)
        for kind in (vision, ~vision):
            counted = (weights > 0) & kind
            scaled[counted] = 0.5 / max(np.count_nonzero(counted), 1)
        return scaled
    count = np.count_nonzero(weights)
    return weights / np.float32(count) if loss_weights == "example" else weights
