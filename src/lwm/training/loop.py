"""Run the training loop: read batches, take steps, record metrics, write checkpoints."""

import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from annotated_types import Ge

from lwm.core import interrupts
from lwm.core.config import Checked
from lwm.core.distributed import gather
from lwm.core.errors import LwmError
from lwm.core.mesh import pace
from lwm.core.progress import progress, say
from lwm.data.images import Crops
from lwm.data.loader import Loader
from lwm.training.checkpointing import Checkpoints
from lwm.training.metrics import Metrics
from lwm.training.training import Tally, Training

_PROFILED = range(3, 6)  # steps of this process; the first ones compile
_LOG_SECONDS = 10
# A signal waits at most this long for the processes to agree, unless one step takes longer. Slurm,
# Kubernetes and TPU preemption leave a process about 30 seconds, and saving needs most of them.
AGREEMENT_SECONDS = 5.0


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


class Interrupted(LwmError):
    """Signal that SIGTERM or SIGINT ended the run and its state is saved."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number  # by the shell's convention


class Interruption:
    """Note SIGTERM and SIGINT within a `with` block; the second one of a kind acts as usual.

    Several processes must stop after the same step. A message between them waits for the step on
    the device, so they agree only as often as the slowest process takes `AGREEMENT_SECONDS`. All
    compute that interval from the same gathered times.
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


# Reads the evaluation split from its start.
HeldOut = Callable[[], Iterator[dict[str, np.ndarray]]]


@dataclass(kw_only=True)
class Loop:
    """Train one run, starting from a step, a state and a tally.

    Only the first process has metrics. Every checkpoint saves the facts beside step and tally.
    """

    training: Training
    batches: Loader | Crops
    held_out: HeldOut | None
    config: LoopConfig
    checkpoints: Checkpoints
    metrics: Metrics | None
    facts: dict[str, Any]
    directory: Path
    step: int
    state: Any
    tally: Tally

    def run(self) -> None:
        """Train until step `config.steps`, or raise Interrupted after a signal; both save.

        Raises Diverged after too many skipped steps in a row.
        """
        self._first, last = self.step, self.config.steps
        self._pending: tuple[dict[str, Any], float, Any] | None = None
        started = self._clock = self._logged = time.perf_counter()
        self._frozen = self.training.frozen()
        train, evaluate = self.training.compiled_step(), self.training.compiled_evaluation()
        profiled = min(_PROFILED.start, last - self._first - 1) if self.config.profile else -1
        with ExitStack() as stack:
            stack.enter_context(interrupts.claimed())
            interruption = stack.enter_context(Interruption(self._first))
            tracing = stack.enter_context(ExitStack())
            self._bar = stack.enter_context(progress("training", last - self._first))
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
        steps, minutes = last - self._first, (time.perf_counter() - started) / 60
        broken = self.batches.counts["broken"]
        too_long = self.batches.counts.get("too_long", 0)
        notes = f", {broken:,} broken example{'s' * (broken > 1)} skipped" if broken else ""
        notes += f", {too_long:,} example{'s' * (too_long > 1)} longer than a row" * bool(too_long)
        say(f"done: {steps:,} steps in {minutes:.1f} minutes{notes}; see {self.directory}")

    def _take_step(self, train: Any) -> None:
        start = time.perf_counter()
        local = next(self.batches)
        row = {"data_wait_seconds": time.perf_counter() - start, **self.batches.counts}
        batch = self.training.place(local)
        # Any other transfer between host and device would be a mistake, and slow.
        with jax.transfer_guard("disallow"):
            self.state, metrics = train(self.state, self._frozen, batch)
        work = self.training.measure(local)
        self._record()  # the step before, while the device computes this one
        self.step += 1
        self._pending = {"step": self.step, **row}, work, metrics

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
        lowest = math.inf if self.tally.best is None else self.tally.best
        if best := loss is not None and loss < lowest:
            self.tally.best = loss
        if saving or stopping or (best and self.checkpoints.config.best):
            self._record()
            facts = {**self.facts, "step": self.step, "tally": vars(self.tally)}
            self.checkpoints.save(self.step, self.state, self.batches.iterator, facts, loss)
        return stopping

    def _evaluate(self, evaluate: Any) -> float:
        assert self.held_out is not None
        total: Any = None
        for local in itertools.islice(self.held_out(), self.config.evaluation_batches):
            sums = evaluate(self.state, self._frozen, self.training.place(local))
            total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
            pace(total)
        row = self.training.evaluation_row(jax.device_get(total))
        if self.metrics is not None:
            self.metrics.write({"step": self.step, "split": "evaluation", **row})
            say(f"step {self.step:,}: {self.training.evaluation_note.format(**row)}")
        self._clock = time.perf_counter()  # the next step's time does not include the evaluation
        return row["loss"]

    def _record(self) -> None:
        """Wait for the latest step, if it is not recorded, and write its row."""
        if self._pending is None:
            return
        (row, work, pending), self._pending = self._pending, None
        metrics: Any = jax.device_get(pending)
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
        step, last = row["step"], self.config.steps
        note = self.training.step_note.format(**row)
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
