"""Record the metrics of a run's steps, and stop a run that diverges."""

import time
from typing import Any

import jax

from lwm.core.errors import LwmError
from lwm.core.progress import Bar, say
from lwm.training.metrics import Metrics
from lwm.training.training import Tally, Training

_LOG_SECONDS = 10


class Diverged(LwmError):
    """Signal that loss or gradient was not finite for too many steps in a row."""


class Recorder:
    """Write a row for each step, one step late, so that the device never waits for it.

    Args:
        metrics: None in all processes but the first.
        first: steps taken before this process started.
        last: the run's last step.
        max_skips: skipped steps in a row at which the run stops.
    """

    def __init__(
        self,
        training: Training,
        metrics: Metrics | None,
        tally: Tally,
        bar: Bar,
        *,
        first: int,
        last: int,
        max_skips: int,
    ) -> None:
        self._training, self._metrics, self._tally, self._bar = training, metrics, tally, bar
        self._first, self._last, self._max_skips = first, last, max_skips
        self._waiting: tuple[dict[str, Any], float, Any] | None = None
        self._clock = self._logged = time.perf_counter()

    def add(self, row: dict[str, Any], work: float, metrics: Any) -> None:
        """Record a step that the device may still be computing.

        Args:
            row: `step`, and what the host knows of it.
            work: what `Training.measure` returned for the step.
        """
        self.flush()
        self._waiting = row, work, metrics

    def flush(self) -> None:
        """Wait for the last step and write its row.

        Raises:
            Diverged: too many steps in a row were skipped.
        """
        if self._waiting is None:
            return
        (row, work, waiting), self._waiting = self._waiting, None
        metrics: Any = jax.device_get(waiting)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        tally, skipped = self._tally, bool(metrics["skipped"])
        tally.skipped += skipped
        tally.skipped_in_a_row = tally.skipped_in_a_row + 1 if skipped else 0
        step = row["step"]
        row = {
            "step": step,
            "split": "train",
            **self._training.step_row(metrics, seconds, work, tally),
            "learning_rate": float(
                self._training.learning_rates[max(0, step - 1 - tally.skipped)]
            ),
            "skipped": tally.skipped,
            "seconds": seconds,
            **row,
        }
        if self._metrics is not None:
            self._metrics.write(row)
            self._log(row)
            if skipped:
                say(
                    f"warning: loss or gradient of step {step:,} is not finite; the step changed "
                    f"nothing ({tally.skipped} skipped in all)"
                )
        if tally.skipped_in_a_row >= self._max_skips:
            raise Diverged(
                f"loss or gradient was not finite for {tally.skipped_in_a_row} steps in a row, up "
                f"to step {step:,}; lower optimizer.learning_rate, or check the data"
            )

    def add_evaluation(self, step: int, sums: Any) -> float:
        """Write the row of an evaluation and return its loss."""
        row = self._training.evaluation_row(jax.device_get(sums))
        if self._metrics is not None:
            self._metrics.write({"step": step, "split": "evaluation", **row})
            say(f"step {step:,}: {self._training.evaluation_note(row)}")
        self._clock = time.perf_counter()  # the next step's time does not include the evaluation
        return row["loss"]

    def _log(self, row: dict[str, Any]) -> None:
        """Advance the bar on a terminal; elsewhere, log a line from time to time."""
        note = self._training.step_note(row)
        self._bar(1, note=note)
        step, last = row["step"], self._last
        due = self._clock - self._logged > _LOG_SECONDS or step in (self._first + 1, last)
        if self._bar.silent and due:
            self._logged = self._clock
            minutes = (last - step) * row["seconds"] / 60
            say(f"step {step:,} of {last:,}: {note}, about {minutes:.1f} minutes left")
