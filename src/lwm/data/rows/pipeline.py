"""Rows -> batches through Grain: streams shared out over worker processes, prefetched, resumable.

The state of a `BatchIterator` iterator is each row's `Position`, a few integers. It names neither
workers nor prefetching, so a run may go on with other numbers of both. Knows streams and rows;
knows nothing of devices.
"""

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import grain
import numpy as np
from absl import flags

from lwm.core.errors import InputError
from lwm.data.examples.examples import Report
from lwm.data.rows.draws import Stream
from lwm.data.rows.packing import Position, Row, Rows

_VERSION = 1

_CHECKSUMS = ("first_example", "first_weights")
_NEW = ("loss_weights", "fields", "first_weights")  # a state may be older than these

Elements = grain.DatasetIterator[dict[str, Any]]
"""Rows, each with its `Note` under the key `note`."""


@dataclass(frozen=True)
class Note:
    """What rides along with a row from the process that made it."""

    row: int
    position: Position  # of the row after it
    reports: list[Report]


Open = Callable[[int, Position], tuple[Stream, Rows]]
"""(row, where it begins) -> its stream, and the rows packed from it. Travels to workers."""


class StreamsDataset(grain.IterDataset[dict[str, Any]]):
    """Rows of several streams in turn; Grain gives each worker a slice of the streams."""

    def __init__(self, open_stream: Open, starts: Mapping[int, Position]) -> None:
        super().__init__()
        self._open, self._starts = open_stream, dict(starts)

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        del sequential_slice  # of files; streams are dealt out in turn always
        self._starts = dict(list(self._starts.items())[sl])

    def __iter__(self) -> Elements:
        return _StreamsIterator(self._open, self._starts)


class _StreamsIterator(Elements):
    def __init__(self, open_stream: Open, starts: Mapping[int, Position]) -> None:
        super().__init__()
        self._streams = [(row, *open_stream(row, start)) for row, start in starts.items()]
        self._turn = 0

    def __next__(self) -> dict[str, Any]:
        row, stream, rows = self._streams[self._turn]
        self._turn = (self._turn + 1) % len(self._streams)
        packed, position = next(rows)
        return {**packed, "note": Note(row, position, stream.take_reports())}

    # Grain asks for the state of each element. Ours rides in its note instead, where it does not
    # depend on how streams are shared out; a pipeline is resumed by building it from positions.
    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        assert not state, "streams are resumed through BatchIterator"


class BatchIterator(grain.DatasetIterator[Row]):
    """BatchIterator of one process, and the state that a checkpoint keeps.

    Args:
        rows: the global rows of this process, in the batch's order.
        workers: processes; must divide the number of rows.
        prefetch: batches prepared ahead.
        identity: what the positions depend on; restoring a state refuses another.
        heed: takes what was broken, and how many examples have been drawn so far.
    """

    def __init__(
        self,
        open_stream: Open,
        rows: Sequence[int],
        *,
        workers: int,
        prefetch: int,
        identity: Mapping[str, Any],
        heed: Callable[[list[Report], int], None],
    ) -> None:
        super().__init__()
        assert not workers or len(rows) % workers == 0, (len(rows), workers)
        self._open, self._rows = open_stream, tuple(rows)
        self._workers, self._prefetch = workers, prefetch
        self._identity, self._heed = dict(identity), heed
        self._positions = dict.fromkeys(self._rows, Position())
        self._elements: Elements | None = None

    def __next__(self) -> Row:
        self._assert_not_closed()
        elements, positions, reports = self._started(), dict(self._positions), []
        rows: list[dict[str, Any]] = []
        for expected in self._rows:
            element = next(elements)
            note = element.pop("note")
            assert note.row == expected, (note.row, expected)
            positions[note.row] = Position(*note.position)
            reports += note.reports
            rows.append(element)
        self._heed(reports, sum(position.draw for position in positions.values()))
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        self._positions = positions  # last: an interrupt before leaves the state of whole batches
        return batch

    def get_state(self) -> dict[str, Any]:
        """Positions by row; JSON-able, the same size at any length of the examples."""
        return {
            "version": _VERSION,
            "data": dict(self._identity),
            "rows": {str(row): list(position) for row, position in self._positions.items()},
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` was called; the rows of other processes may be among them.

        Raises:
            InputError: the state is of other data, other settings or other rows.
        """
        if state.get("version") != _VERSION:
            raise InputError(
                f"the data position is of version {state.get('version')}, and {_VERSION} is "
                "needed; begin a fresh run"
            )
        for name, value in self._identity.items():
            if name in _NEW and name not in state["data"]:
                continue
            if (saved := state["data"].get(name)) != value:
                if name in _CHECKSUMS:
                    raise InputError(
                        "the data or its fields are other ones than where the data position was "
                        "saved; give the same data and settings, or begin a fresh run"
                    )
                raise InputError(
                    f"the data position was saved with {name} {saved} and this run has {value}; "
                    "give the same data and settings, or begin a fresh run"
                )
        missing = [row for row in self._rows if str(row) not in state["rows"]]
        if missing:
            raise InputError(
                f"the data position lacks row {missing[0]}; start with as many processes as "
                "before, or begin a fresh run"
            )
        self._stop()
        self._positions = {row: Position(*state["rows"][str(row)]) for row in self._rows}

    def start_prefetch(self) -> None:
        self._started().start_prefetch()

    def close(self) -> None:
        """Ends workers and threads; nothing can be read after."""
        if not self._closed:
            self._closed = True
            self._stop()

    def _started(self) -> Elements:
        if self._elements is None:
            dataset: Any = StreamsDataset(self._open, self._positions)
            ahead = self._prefetch * len(self._rows)
            if self._workers:
                if not flags.FLAGS.is_parsed():  # Grain asks for flags that only absl's apps parse
                    flags.FLAGS.mark_as_parsed()
                each = max(ahead // self._workers, 1)
                options = grain.multiprocessing.MultiprocessingOptions(
                    num_workers=self._workers, per_worker_buffer_size=each
                )
                dataset = dataset.mp_prefetch(options, worker_init_fn=_follow_parent)
                # Workers that heed no signal must be ended before Python waits for them.
                atexit.register(self._stop)
            elif ahead:
                thread = grain.experimental.ThreadPrefetchIterDataset
                dataset = thread(dataset, prefetch_buffer_size=ahead)
            self._elements = cast(Elements, iter(dataset))
        return self._elements

    def _stop(self) -> None:
        elements, self._elements = getattr(self, "_elements", None), None
        if elements is not None:
            elements.close()
        atexit.unregister(self._stop)


def _follow_parent(*_: int) -> None:
    """Makes a worker live exactly as long as the process it reads for.

    That one alone answers Ctrl-C and SIGTERM, which often reach a whole group of processes: it
    still needs its data for the step that it finishes. Killed, it can end no one any more.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def open_stream(
    row: int, start: Position, *, stream: Callable[..., Stream], pack: Callable[..., Rows]
) -> tuple[Stream, Rows]:
    opened = stream(row=row)
    return opened, pack(opened.draw, start)


def opener(stream: Callable[..., Stream], pack: Callable[..., Rows]) -> Open:
    """How a row's stream is opened, in a form that travels to workers."""
    return partial(open_stream, stream=stream, pack=pack)
