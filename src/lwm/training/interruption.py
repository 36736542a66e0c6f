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
    """Signal that SIGTERM or SIGINT ended the run and its state is saved."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number  # by the shell's convention


class Interruption:
    """Note SIGTERM and SIGINT within a `with` block; the second one of a kind acts as usual.

    Several processes must agree to stop after the same step. A message between them waits for the
    step that the device is computing, so they agree only every few steps: as many as take the
    slowest process `AGREEMENT_SECONDS`. All compute that number from the same gathered times.
    """

    signal: int | None = None

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
        """Return whether to stop after this step; `now` makes the processes agree at this one."""
        if jax.process_count() == 1:
            return self.signal is not None
        if step < self._next and not now:
            return False
        seconds = (time.perf_counter() - self._clock) / max(1, step - self._last)
        rows = gather(np.array([self.signal is not None, seconds], np.float32))
        self._last, self._clock = step, time.perf_counter()
        self._next = step + max(1, int(AGREEMENT_SECONDS / max(rows[:, 1].max(), 1e-6)))
        return bool(rows[:, 0].any())
