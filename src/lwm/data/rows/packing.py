"""Examples -> rows of a fixed number of (input, target) pairs.

Three ways: `concatenate` lets the tokens of examples run on and cuts them (the original's way for
text), `pack` fits whole examples into rows where each attends to itself alone, `pad` gives each
example a row. An example of n tokens has n - 1 pairs; one that outgrows a row is cut into pieces
that overlap by a token, so that each pair occurs once.

Every packer is a pure function of the examples and a `Position`: rows follow from where reading
stands, and so a checkpoint holds a few numbers however long the examples are. Rows hold ids of the
model's one table, text first and vision behind. Knows arrays alone; knows nothing of files,
shuffling, processes or devices.

Source: masked packing and its loss weights, LWM (arXiv 2402.08268), sections 3.2 and 4.2.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from lwm.core.errors import InputError
from lwm.data.examples.examples import Example

PADDING = -1  # the segment of padding, as attention.mask has it, which this room does not import
OPEN_TOKENS = 1 << 18  # what one stream's open rows hold together, roughly
LEAST_OPEN, MOST_OPEN = 4, 16

Row = dict[str, np.ndarray]
"""`tokens`, `targets`, `positions`, `segments` int32 and `weights` float32, each [seq]; stacked, a
batch."""

Packing = Literal["concatenate", "pack", "pad"]
LossWeights = Literal["example", "token", "halves", "row_halves"]


class Position(NamedTuple):
    """Where a stream's next row begins."""

    draw: int = 0
    """Which of the stream's examples holds the first token."""
    offset: int = 0
    """Which of that example's tokens it is."""
    rows: int = 0
    """`pack`: rows already handed out of those that were packed together from here."""


Draw = Callable[[int], Example | None]
"""The stream's k-th example, endlessly; None where there is none to use."""

Rows = Iterator[tuple[Row, Position]]
"""Rows without end, each with the position after it."""


def pack_rows(
    draw: Draw,
    start: Position,
    *,
    length: int,
    packing: Packing,
    loss_weights: LossWeights,
    text_vocab: int = 0,
) -> Rows:
    """Rows of `length` pairs from `start` on.

    Args:
        text_vocab: ids of text in the model's table; of no account where examples are text alone.
    """
    if packing == "concatenate":
        return _concatenate(draw, start, length, loss_weights, text_vocab)
    by_row = loss_weights == "row_halves"
    pieces = _pieces(
        draw, start.draw, start.offset, length, "token" if by_row else loss_weights, text_vocab
    )
    rows = _pad(pieces, length) if packing == "pad" else _pack(pieces, start.rows, length)
    return _halved(rows, text_vocab) if by_row else rows


def _halved(rows: Rows, text_vocab: int) -> Rows:
    for row, position in rows:
        row["weights"] = _scaled(row["weights"], row["targets"] >= text_vocab, "row_halves")
        yield row, position


def _concatenate(
    draw: Draw, start: Position, length: int, loss_weights: LossWeights, text_vocab: int
) -> Rows:
    """Each row takes the next `length` pairs; the last token of a row is the first of the next."""
    number, buffer = start.draw, _TokenRun(start.offset, text_vocab)
    while True:
        while buffer.size <= length:
            buffer.append(number, draw(number))
            number += 1
        tokens, weights = buffer.first(length + 1)
        buffer.drop(length)
        row = _empty(length)
        row["tokens"][:], row["targets"][:] = tokens[:-1], tokens[1:]
        row["positions"][:], row["segments"][:] = np.arange(length), 0
        row["weights"][:] = _scaled(weights[1:], tokens[1:] >= text_vocab, loss_weights)
        if row["weights"].any():  # else the middle of a long prompt, which teaches nothing
            yield row, buffer.position


class _TokenRun:
    """The tokens of consecutive examples, of which the front is used up row by row."""

    def __init__(self, skip: int, text_vocab: int) -> None:
        self._skip = skip  # tokens of the first example that earlier rows have used
        self._text_vocab = text_vocab
        self._held: list[tuple[int, np.ndarray, np.ndarray]] = []  # number, ids, weights
        self.size = 0

    def append(self, number: int, example: Example | None) -> None:
        if not self._held and self._skip and (example is None or len(example) <= self._skip):
            raise InputError(
                "the data is not what it was when its position was saved; give the same data and "
                "tokenizer, or begin a fresh run"
            )
        if example is not None and len(example):
            self.size += len(example) - (0 if self._held else self._skip)
            self._held.append((number, example.ids(self._text_vocab), example.weights))

    def first(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The first tokens and their weights."""
        tokens, weights, skip, missing = [], [], self._skip, count
        for _, held, learnt in self._held:
            if not missing:
                break
            tokens.append(held[skip : skip + missing])
            weights.append(learnt[skip : skip + missing])
            missing -= len(tokens[-1])
            skip = 0
        return np.concatenate(tokens), np.concatenate(weights)

    def drop(self, count: int) -> None:
        """Forgets the first tokens; at least one more must be held."""
        self.size -= count
        self._skip += count
        used = 0
        while self._skip >= len(self._held[used][1]):
            self._skip -= len(self._held[used][1])
            used += 1
        del self._held[:used]

    @property
    def position(self) -> Position:
        return Position(self._held[0][0], self._skip)


class _Piece(NamedTuple):
    """An example, or a part that fits into a row."""

    tokens: np.ndarray
    weights: np.ndarray  # of the targets, one fewer than tokens
    start: Position  # where it begins
    end: Position  # where the next piece begins

    @property
    def pairs(self) -> int:
        return len(self.weights)


def _pieces(
    draw: Draw,
    number: int,
    offset: int,
    length: int,
    loss_weights: LossWeights,
    text_vocab: int,
) -> Iterator[_Piece]:
    while True:
        example = draw(number)
        total = 0 if example is None else len(example)
        ids = None if example is None else example.ids(text_vocab)
        while example is not None and ids is not None and offset < total - 1:
            end = min(offset + length, total - 1)
            after = Position(number, end) if end < total - 1 else Position(number + 1)
            targets = slice(offset + 1, end + 1)
            weights = _scaled(example.weights[targets], example.vision[targets], loss_weights)
            if weights.any():
                tokens = ids[offset : end + 1]
                yield _Piece(tokens, weights, Position(number, offset), after)
            offset = end
        number, offset = number + 1, 0


def _pad(pieces: Iterator[_Piece], length: int) -> Rows:
    for piece in pieces:
        yield _row([piece], length), piece.end


def open_rows(length: int) -> int:
    """How many rows `pack` fills at a time: more waste less, fewer hold less memory."""
    return min(max(OPEN_TOKENS // length, LEAST_OPEN), MOST_OPEN)


def _pack(pieces: Iterator[_Piece], handed_out: int, length: int) -> Rows:
    """Best fit: a piece goes where it leaves the least room. Once a piece fits into none of the
    open rows, all of them are handed out, and it is the first of the next ones."""
    most = open_rows(length)
    piece = next(pieces)
    while True:
        start, rows, room = piece.start, [], []
        while True:
            fitting = [i for i, left in enumerate(room) if left >= piece.pairs]
            if fitting:
                best = min(fitting, key=lambda i: room[i])
                rows[best].append(piece)
                room[best] -= piece.pairs
            elif len(rows) < most:
                rows.append([piece])
                room.append(length - piece.pairs)
            else:
                break
            piece = next(pieces)
        for done, row in enumerate(rows[handed_out:], handed_out + 1):
            after = start._replace(rows=done) if done < len(rows) else piece.start
            yield _row(row, length), after
        handed_out = 0


def _row(pieces: list[_Piece], length: int) -> Row:
    row, at = _empty(length), 0
    for segment, piece in enumerate(pieces):
        span = slice(at, at + piece.pairs)
        row["tokens"][span], row["targets"][span] = piece.tokens[:-1], piece.tokens[1:]
        row["positions"][span], row["segments"][span] = np.arange(piece.pairs), segment
        row["weights"][span] = piece.weights
        at = span.stop
    return row


def _empty(length: int) -> Row:
    """A row of padding."""
    row = {
        name: np.zeros(length, np.int32) for name in ("tokens", "targets", "positions", "segments")
    }
    row["segments"][:] = PADDING
    return row | {"weights": np.zeros(length, np.float32)}


def _scaled(weights: np.ndarray, vision: np.ndarray, loss_weights: LossWeights) -> np.ndarray:
    """Weights of the targets of an example's piece, or of a row that is weighed as a whole.

    By `example` they sum to one: then the sum of losses over the sum of weights is the mean over
    examples of each one's mean, whatever rows they share. By halves, the targets of text share one
    half and those of vision the other; where a kind is missing so is its half, as in the original.
    """
    if loss_weights in ("halves", "row_halves"):
        scaled = np.zeros_like(weights, np.float32)
        for kind in (vision, ~vision):
            counted = (weights > 0) & kind
            scaled[counted] = 0.5 / max(np.count_nonzero(counted), 1)
        return scaled
    count = np.count_nonzero(weights)
    return weights / np.float32(count) if loss_weights == "example" and count else weights
