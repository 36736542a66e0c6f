"""Stop a run at a signal, in all processes after the same step."""

import signal
import threading
import time
from typing import Any

import jax
import numpy as np

from lwm.core.distributed import gather
from lwm.core.errors import LwmError
from lwm.core.progress import say

AGREEMENT_SECONDS = 5.0
"""Longest time that a signal waits for the processes to agree, unless one step takes longer.

Slurm, Kubernetes and TPU preemption leave a process about 30 seconds after SIGTERM, and most of
them are needed to save.
"""


class Interrupted(LwmError):
    """Signal that SIGTERM or SIGINT ended the run and its state is saved.

    Args:
        number: the signal; the exit code is 128 more, by the shell's convention.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Interruption:
    """Note SIGTERM and SIGINT within a `with` block; the second one of a kind acts as usual.

    With several processes, only some of them may get the signal, and all must stop after the same
    step. To agree they exchange messages, which makes them wait for the step that the device is
    computing. So they agree only every few steps: as many as the slowest process takes
    `AGREEMENT_SECONDS` for, by the time since they agreed last. All processes compute that number
    from the same gathered times.

    Args:
        first: steps taken before this process started.
    """

    signal: int | None = None
    """The signal that this process got."""

    def __init__(self, first: int) -> None:
        self._last, self._next = first, first + 1
        self._clock = time.perf_counter()
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGTERM, signal.SIGINT)
            self._handlers = {number: signal.getsignal(number) for number in numbers}
            for number in numbers:
                signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        say(f"{signal.Signals(number).name}: finishing this step and saving; again to stop now")
        self.signal = number
        signal.signal(number, self._handlers[number])

    def agreed(self, step: int, *, now: bool) -> bool:
        """Return whether to stop after this step, the same in every process.

        Args:
            now: agree at this step in any case; must be the same in every process.
        """
        if jax.process_count() == 1:
            return self.signal is not None
        if step < self._next and not now:
            return False
        seconds = (time.perf_counter() - self._clock) / max(1, step - self._last)
        rows = gather(np.array([self.signal is not None, seconds], np.float32))
        self._last, self._clock = step, time.perf_counter()
        self._next = step + max(1, int(AGREEMENT_SECONDS / max(rows[:, 1].max(), 1e-6)))
        return bool(rows[:, 0].any())
