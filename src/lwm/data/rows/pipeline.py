"""Stack rows into batches with Grain's workers and prefetching.

The state of a `BatchIterator` is each row's `Position`, a few integers. It depends neither on
workers nor on prefetching, so a run may resume with other numbers of both.
"""

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, cast

import grain
import numpy as np
from absl import flags

from lwm.core.errors import InputError
from lwm.data.examples.examples import Report
from lwm.data.rows.draws import Read, Stream
from lwm.data.rows.packing import Position, Row

_VERSION = 2
_CHECKSUMS = ("first_example", "first_weights")

_Elements = grain.DatasetIterator[dict[str, Any]]  # rows, each with its _Note as `note`
_OpenStream = Callable[[int], Stream]  # opens the stream of a row; sent to workers


@dataclass(frozen=True)
class _Note:
    row: int
    position: Position  # after the row
    reports: list[Report]
    too_long: Read


class _StreamsDataset(grain.IterDataset[dict[str, Any]]):
    """Yield rows of several streams in turn. Grain gives each worker a slice of the streams."""

    def __init__(self, open_stream: _OpenStream, starts: Mapping[int, Position]) -> None:
        super().__init__()
        self._open, self._starts = open_stream, dict(starts)

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        del sequential_slice  # applies to files; streams are always distributed in turn
        self._starts = dict(list(self._starts.items())[sl])

    def __iter__(self) -> _Elements:
        return _StreamsIterator(self._open, self._starts)


class _StreamsIterator(_Elements):
    def __init__(self, open_stream: _OpenStream, starts: Mapping[int, Position]) -> None:
        super().__init__()
        opened = [(row, open_stream(row), start) for row, start in starts.items()]
        self._streams = cycle([(row, stream, stream.rows(at)) for row, stream, at in opened])

    def __next__(self) -> dict[str, Any]:
        row, stream, rows = next(self._streams)
        packed, position = next(rows)
        return {
            **packed,
            "note": _Note(row, position, stream.take_reports(), stream.take_too_long(position)),
        }

    # Grain reads the state of each element. Ours is in the element's note instead, where it does
    # not depend on how the streams are distributed; `BatchIterator` resumes from positions.
    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        assert not state, "streams are resumed through BatchIterator"


class BatchIterator(grain.DatasetIterator[Row]):
    """Yield the batches of one process, and keep the state for checkpoints.

    Args:
        rows: the global rows of this process, in the batch's order.
        workers: number of processes; must divide the number of rows.
        prefetch: number of batches prepared in advance.
        identity: JSON data that the positions depend on; `set_state` refuses any other.
        report: callback for broken examples, with the number of examples read so far.
    """

    def __init__(
        self,
        open_stream: _OpenStream,
        rows: Sequence[int],
        *,
        workers: int,
        prefetch: int,
        identity: Mapping[str, Any],
        report: Callable[[list[Report], int], None],
    ) -> None:
        super().__init__()
        assert not workers or len(rows) % workers == 0, (len(rows), workers)
        self._open, self._rows = open_stream, tuple(rows)
        self._workers, self._prefetch = workers, prefetch
        self._identity, self._report = dict(identity), report
        self._positions = dict.fromkeys(self._rows, Position())
        self._too_long = Read()
        self._elements: _Elements | None = None

    def __next__(self) -> Row:
        self._assert_not_closed()
        elements, positions, reports = self._started(), dict(self._positions), []
        too_long = self._too_long
        rows: list[dict[str, Any]] = []
        for expected in self._rows:
            element = next(elements)
            note = element.pop("note")
            assert note.row == expected, (note.row, expected)
            positions[note.row] = Position(*note.position)
            reports += note.reports
            too_long = Read(*map(sum, zip(too_long, note.too_long, strict=True)))
            rows.append(element)
        self._report(reports, sum(position.draw for position in positions.values()))
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        # Last, so that an interrupt leaves the state of whole batches.
        self._positions, self._too_long = positions, too_long
        return batch

    @property
    def read(self) -> Read:
        """Return how many examples the batches so far have used up, in all runs to this point."""
        examples = sum(position.draw for position in self._positions.values())
        return self._too_long._replace(examples=examples)

    def get_state(self) -> dict[str, Any]:
        """Return the positions of all rows as JSON data of constant size."""
        return {
            "version": _VERSION,
            "data": dict(self._identity),
            "rows": {str(row): list(position) for row, position in self._positions.items()},
            "too_long": list(self._too_long),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Resume where `get_state` was called; raise InputError if data, settings or rows differ.

        The state may hold rows of other processes.
        """
        if state.get("version") != _VERSION:
            raise InputError(
                f"the data position has version {state.get('version')}, but {_VERSION} is needed; "
                "begin a fresh run"
            )
        for name, value in self._identity.items():
            saved = state["data"].get(name)
            if saved != value:
                difference = (
                    f"the data position was saved with {name} {saved} and this run has {value}"
                )
                if name in _CHECKSUMS:
                    difference = "the data or its fields differ from the saved data position"
                raise InputError(
                    f"{difference}; use the same data and settings, or begin a fresh run"
                )
        missing = [row for row in self._rows if str(row) not in state["rows"]]
        if missing:
            raise InputError(
                f"the data position lacks row {missing[0]}; start with as many processes as "
                "before, or begin a fresh run"
            )
        self._stop()
        self._positions = {row: Position(*state["rows"][str(row)]) for row in self._rows}
        self._too_long = Read(*state.get("too_long", ()))

    def start_prefetch(self) -> None:
        """Start to prepare batches."""
        self._started().start_prefetch()

    def close(self) -> None:
        """Stop workers and threads; the iterator cannot be read afterwards."""
        if not self._closed:
            self._closed = True
            self._stop()

    def _started(self) -> _Elements:
        if self._elements is None:
            dataset: Any = _StreamsDataset(self._open, self._positions)
            ahead = self._prefetch * len(self._rows)
            if self._workers:
                if not flags.FLAGS.is_parsed():  # Grain reads flags that only absl's apps parse
                    flags.FLAGS.mark_as_parsed()
                options = grain.multiprocessing.MultiprocessingOptions(
                    num_workers=self._workers,
                    per_worker_buffer_size=max(ahead // self._workers, 1),
                )
                dataset = dataset.mp_prefetch(options, worker_init_fn=_follow_parent)
                # Workers ignore signals, so they must end before Python waits for them.
                atexit.register(self._stop)
            elif ahead:
                thread = grain.experimental.ThreadPrefetchIterDataset
                dataset = thread(dataset, prefetch_buffer_size=ahead)
            self._elements = cast(_Elements, iter(dataset))
        return self._elements

    def _stop(self) -> None:
        elements, self._elements = getattr(self, "_elements", None), None
        if elements is not None:
            elements.close()
        atexit.unregister(self._stop)


def _follow_parent(*_: int) -> None:
    """Make a worker live exactly as long as its parent process.

    Ctrl-C and SIGTERM often reach a whole group of processes. Only the parent handles them: it
    still needs data for the step that it finishes. A parent that is killed cannot stop its
    workers, so each worker waits for the parent's end in a thread.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
