"""Run the training loop: read batches, take steps, record metrics, write checkpoints."""

import itertools
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

import grain
import jax
import numpy as np
from annotated_types import Ge

from lwm.core.config import Checked
from lwm.core.errors import LwmError
from lwm.core.mesh import pace
from lwm.core.progress import Bar, progress, say
from lwm.training.checkpointing import Checkpoints
from lwm.training.interruption import Interrupted, Interruption
from lwm.training.metrics import Metrics
from lwm.training.training import Tally, Training

_PROFILED = range(3, 6)  # steps of this process; the first ones compile
_LOG_SECONDS = 10


@dataclass(frozen=True, kw_only=True)
class LoopConfig(Checked, section="loop"):
    """Set the length of a run, and when it is evaluated."""

    steps: Annotated[int, Ge(1)] = 1000
    """Steps of the whole run, with those before an interruption."""
    evaluate_every: Annotated[int, Ge(0)] = 0
    """Steps between evaluations on the held-out split; 0 for no evaluation."""
    evaluation_batches: Annotated[int, Ge(1)] = 8
    """Batches of each evaluation, always the same ones."""
    skips: Annotated[int, Ge(1)] = 10
    """Steps in a row with a loss or gradient that is not finite, after which the run stops."""
    profile: bool = False
    """Write a JAX trace of a few steps to the run directory."""


class Diverged(LwmError):
    """Signal that loss or gradient was not finite for too many steps in a row."""


@runtime_checkable
class BatchSource(Protocol):
    """Yield this process's rows without end; checkpoints save the position of `iterator`."""

    @property
    def iterator(self) -> grain.DatasetIterator: ...

    @property
    def broken(self) -> int: ...

    def __next__(self) -> dict[str, np.ndarray]: ...


HeldOut = Callable[[], Iterator[dict[str, np.ndarray]]]


@dataclass(kw_only=True)
class Loop:
    """Train one run, from the given step, state and tally on.

    Args:
        held_out: reads the evaluation split from its start; None if there is none.
        metrics: None in all processes but the first.
        facts: saved with every checkpoint, beside step and tally.
        directory: the run's directory.
    """

    training: Training
    batches: BatchSource
    held_out: HeldOut | None
    config: LoopConfig
    checkpoints: Checkpoints
    metrics: Metrics | None
    facts: dict[str, Any]
    directory: Path
    step: int
    state: Any
    frozen: Any
    tally: Tally

    def run(self) -> None:
        """Train until step `config.steps` or until a signal, and save.

        Raises:
            Interrupted: SIGTERM or SIGINT came; the state is saved.
            Diverged: too many steps in a row were skipped.
            CheckpointError: a checkpoint cannot be written.
        """
        self._first, last = self.step, self.config.steps
        self._waiting: tuple[dict[str, Any], float, Any] | None = None
        self._clock = self._logged = time.perf_counter()
        train, evaluate = self.training.step(), self.training.evaluate()
        profiled = min(_PROFILED.start, last - self._first - 1) if self.config.profile else -1
        with ExitStack() as stack:
            interruption = stack.enter_context(Interruption(self._first))
            tracing = stack.enter_context(ExitStack())
            self._bar: Bar = stack.enter_context(progress("training", last - self._first))
            stopping = False
            while self.step < last and not stopping:
                if self.step - self._first == profiled:
                    tracing.enter_context(jax.profiler.trace(str(self.directory / "profile")))
                self._take_step(train)
                if self.step - self._first == _PROFILED.stop:
                    self._record()
                    tracing.close()  # writes the trace, if one was begun
                stopping = self._evaluate_and_save(evaluate, interruption)
            self._record()
            self.checkpoints.wait()
        if self.step < last:
            number = interruption.signal or signal.SIGTERM
            raise Interrupted(
                f"stopped by {signal.Signals(number).name} after step {self.step:,} of {last:,}, "
                "which is saved; start the same command again to resume",
                number,
            )

    def _take_step(self, train: Any) -> None:
        waited = time.perf_counter()
        local = next(self.batches)
        waited = time.perf_counter() - waited
        batch = self.training.place(local)
        # Any other transfer between host and device would be a mistake, and slow.
        with jax.transfer_guard("disallow"):
            self.state, metrics = train(self.state, self.frozen, batch)
        work = self.training.measure(local)
        self._record()  # the step before, while the device computes this one
        self.step += 1
        row = {
            "step": self.step, "data_wait_seconds": waited, "broken": self.batches.broken,
        }  # fmt: skip
        self._waiting = row, work, metrics

    def _evaluate_and_save(self, evaluate: Any, interruption: Interruption) -> bool:
        """Do what is due after a step; return whether a signal ends the run."""
        last, every = self.step == self.config.steps, self.config.evaluate_every
        evaluating = bool(self.held_out and every and (last or self.step % every == 0))
        saving = last or self.checkpoints.due(self.step)
        stopping = interruption.agreed(self.step, now=evaluating or saving)
        loss = None
        if evaluating and not stopping:
            self._record()
            loss = self._evaluate(evaluate)
            if self.training.show is not None:
                self.training.show(self.step, self.state)
        best = loss is not None and self.tally.is_best(loss) and self.checkpoints.keeps_best
        if saving or stopping or best:
            self._record()
            facts = {**self.facts, "step": self.step, "tally": vars(self.tally)}
            self.checkpoints.save(self.step, self.state, self.batches.iterator, facts, loss)
        return stopping

    def _evaluate(self, evaluate: Any) -> float:
        """Record an evaluation on the first batches of the held-out split; return its loss."""
        assert self.held_out is not None
        total: Any = None
        for local in itertools.islice(self.held_out(), self.config.evaluation_batches):
            sums = evaluate(self.state, self.frozen, self.training.place(local))
            total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
            pace(total)
        row = self.training.evaluation_row(jax.device_get(total))
        if self.metrics is not None:
            self.metrics.write({"step": self.step, "split": "evaluation", **row})
            say(f"step {self.step:,}: {self.training.evaluation_note(row)}")
        self._clock = time.perf_counter()  # the next step's time does not include the evaluation
        return row["loss"]

    def _record(self) -> None:
        """Wait for the latest step, if it is not recorded, and write its row."""
        if self._waiting is None:
            return
        (row, work, waiting), self._waiting = self._waiting, None
        metrics: Any = jax.device_get(waiting)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        tally, skipped = self.tally, bool(metrics["skipped"])
        tally.skipped += skipped
        tally.skipped_in_a_row = tally.skipped_in_a_row + 1 if skipped else 0
        step = row["step"]
        row = {
            "step": step,
            "split": "train",
            **self.training.step_row(metrics, seconds, work, tally),
            "learning_rate": float(self.training.learning_rates[max(0, step - 1 - tally.skipped)]),
            "skipped": tally.skipped,
            "seconds": seconds,
            **row,
        }
        if self.metrics is not None:
            self.metrics.write(row)
            self._log(row, skipped)
        if tally.skipped_in_a_row >= self.config.skips:
            raise Diverged(
                f"loss or gradient was not finite for {tally.skipped_in_a_row} steps in a row, up "
                f"to step {step:,}; lower optimizer.learning_rate, or check the data"
            )

    def _log(self, row: dict[str, Any], skipped: bool) -> None:
        """Advance the bar on a terminal; elsewhere, log a line from time to time."""
        note, step, last = self.training.step_note(row), row["step"], self.config.steps
        self._bar(1, note=note)
        due = self._clock - self._logged > _LOG_SECONDS or step in (self._first + 1, last)
        if self._bar.silent and due:
            self._logged = self._clock
            minutes = (last - step) * row["seconds"] / 60
            say(f"step {step:,} of {last:,}: {note}, about {minutes:.1f} minutes left")
        if skipped:
            say(
                f"warning: loss or gradient of step {step:,} is not finite; the step changed "
                f"nothing ({row['skipped']} skipped in all)"
            )
