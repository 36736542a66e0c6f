"""The loop: batches in, steps, figures and checkpoints out.

Reads top to bottom. Knows nothing of text, pictures, sources or recipes: it is given a compiled
step, batches, a reading of their figures and places to write.
"""

import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grain
import jax
import numpy as np

from lwm.core.distributed import any_process
from lwm.core.errors import ConfigError, LwmError
from lwm.core.mesh import pace
from lwm.core.progress import progress, say
from lwm.training.checkpointing import Checkpoints
from lwm.training.metrics import Metrics
from lwm.training.readings import Reading, Tally

PROFILED = range(3, 6)
"""Steps after the first of a run that `profile` traces: the first ones compile."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long a run goes on, and what it looks at on its way."""

    steps: int = 1000
    """Batches to learn from, those before an interruption included."""
    evaluate_every: int = 0
    """Steps between evaluations on the held-out split; 0 for none."""
    evaluation_batches: int = 8
    """Batches of an evaluation, always the same ones."""
    skips: int = 10
    """Steps in a row whose loss or gradient is not finite, after which the run stops."""
    profile: bool = False
    """Write a JAX trace of a few steps under the run directory."""

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1), ("evaluate_every", 0), ("evaluation_batches", 1), ("skips", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(
                    f"loop.{name} is {getattr(self, name)}; it must be at least {least}"
                )


class Diverged(LwmError):
    """The loss or its gradient was not finite for too many steps in a row."""


class Interrupted(LwmError):
    """A signal ended the run; everything up to the step it names is saved.

    Args:
        number: of the signal; the exit code is 128 more, by the shell's convention.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Batches(Protocol):
    """A source of this process's rows; `iterator` carries its position into checkpoints."""

    @property
    def iterator(self) -> grain.DatasetIterator: ...

    @property
    def broken(self) -> int:
        """Distinct examples passed over so far because they cannot be used."""
        ...

    def __next__(self) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run is made of, compiled and opened.

    Args:
        step: (state, frozen, batch) -> (state, metrics); gives the state's buffers up. The metrics
            say whether the step was `skipped`.
        evaluate: (state, frozen, batch) -> sums, a tree that adds up over batches.
        held_out: opens the evaluation split from its start; None where there is none.
        learning_rates: by updates made, on the host.
        reading: what metrics and sums say.
        show: (step, state) -> None, called after each evaluation, for pictures of what was learnt.
    """

    step: Callable[[Any, Any, Any], tuple[Any, Any]]
    evaluate: Callable[[Any, Any, Any], Any]
    place: Callable[[dict[str, np.ndarray]], Any]
    batches: Batches
    held_out: Callable[[], Iterator[dict[str, np.ndarray]]] | None
    learning_rates: np.ndarray
    reading: Reading
    show: Callable[[int, Any], None] | None = None


def train(
    state: Any,
    frozen: Any,
    work: Work,
    config: LoopConfig,
    *,
    first: int,
    tally: Tally,
    checkpoints: Checkpoints,
    due: Callable[[int], bool],
    metrics: Metrics | None,
    facts: dict[str, Any],
    run: Path,
) -> Any:
    """Learns until step `config.steps`, or until a signal asks to stop, and saves.

    Args:
        first: batches already learned from.
        metrics: None in all processes but the first.
        due: whether a checkpoint is wanted at a step; the last, and one of lowest evaluation loss
            so far, get one anyway.
        facts: written into every checkpoint, with the tally.

    Raises:
        Interrupted: SIGTERM or SIGINT came; the state is saved.
        Diverged: too many steps in a row were skipped.
    """
    recorder = _Recorder(work, config, tally, metrics, first)

    def save(step: int, evaluation: float | None = None) -> None:
        told = {**facts, "step": step, "tally": vars(tally)}
        checkpoints.save(step, state, work.batches.iterator, told, evaluation)

    step, evaluation = first, None
    with ExitStack() as stack:
        interruption = stack.enter_context(_signals())
        tracing = stack.enter_context(ExitStack())
        bar = stack.enter_context(progress("training", config.steps - first))
        recorder.bar = bar
        while step < config.steps:
            if config.profile and step - first == min(PROFILED.start, config.steps - first - 1):
                tracing.enter_context(jax.profiler.trace(str(run / "profile")))
            waited = time.perf_counter()
            local = next(work.batches)
            waited = time.perf_counter() - waited
            # Nothing may go between host and device here but what is sent on purpose.
            batch = work.place(local)
            with jax.transfer_guard("disallow"):
                state, figures = work.step(state, frozen, batch)
            step += 1
            # The figures of the step before are read while the device computes this one.
            recorder.add(step, figures, waited)
            if step - first == PROFILED.stop:
                recorder.flush()
                tracing.close()  # writes the trace, if one was begun
            evaluation = None
            last = step == config.steps
            stopping = any_process(interruption.signal is not None)
            if work.held_out and config.evaluate_every and not stopping and (
                last or step % config.evaluate_every == 0
            ):  # fmt: skip
                recorder.flush()
                evaluation = recorder.evaluated(step, _evaluate(state, frozen, work, config))
                if work.show is not None:
                    work.show(step, state)
            best = evaluation is not None and tally.is_best(evaluation) and checkpoints.keep_best
            if last or stopping or best or due(step):
                recorder.flush()
                save(step, evaluation)
            if stopping:
                break
        recorder.flush()
        checkpoints.wait()
    if step < config.steps:
        number = interruption.signal or signal.SIGTERM
        raise Interrupted(
            f"stopped by {signal.Signals(number).name} after step {step:,} of {config.steps:,}, "
            f"which is saved; start the same command again to go on",
            number,
        )
    return state


def _evaluate(state: Any, frozen: Any, work: Work, config: LoopConfig) -> dict[str, float]:
    """Figures on the first batches of the held-out split, weighted as in training."""
    assert work.held_out is not None
    total: Any = None
    for local in itertools.islice(work.held_out(), config.evaluation_batches):
        sums = work.evaluate(state, frozen, work.place(local))
        total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
        pace(total)
    return work.reading.evaluation(jax.device_get(total))


class _Recorder:
    """Turns the figures of steps into rows, one step late, and watches for divergence."""

    def __init__(
        self, work: Work, config: LoopConfig, tally: Tally, metrics: Metrics | None, first: int
    ) -> None:
        self._work, self._config, self._tally, self._metrics = work, config, tally, metrics
        self._waiting: list[tuple[int, Any, float]] = []
        self._clock = time.perf_counter()
        self._told = self._clock
        self._fresh = first  # a first step compiles, so its speed says nothing
        self.bar: Any = None

    def add(self, step: int, figures: Any, waited: float) -> None:
        self._waiting.append((step, figures, waited))
        while len(self._waiting) > 1:
            self._record(*self._waiting.pop(0))

    def flush(self) -> None:
        while self._waiting:
            self._record(*self._waiting.pop(0))

    def evaluated(self, step: int, figures: dict[str, float]) -> float:
        if self._metrics is not None:
            self._metrics.write({"step": step, "split": "evaluation", **figures})
            say(f"step {step:,}: {self._work.reading.evaluation_note(figures)}")
        self._clock = time.perf_counter()  # evaluating is no part of the next step
        return figures["loss"]

    def _record(self, step: int, figures: Any, waited: float) -> None:
        found: Any = jax.device_get(figures)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        tally = self._tally
        skipped = bool(found.skipped)
        tally.skipped += skipped
        tally.skipped_in_a_row = tally.skipped_in_a_row + 1 if skipped else 0
        row = {
            "step": step,
            "split": "train",
            **self._work.reading.step(found, seconds, tally),
            "learning_rate": float(self._work.learning_rates[max(0, step - 1 - tally.skipped)]),
            "skipped": tally.skipped,
            "seconds": seconds,
            "data_wait_seconds": waited,
            "broken": self._work.batches.broken,
        }
        if self._metrics is not None:
            self._metrics.write(row)
            self._tell(row)
        if skipped and self._metrics is not None:
            say(
                f"warning: the loss or gradient of step {step:,} is not finite, so nothing was "
                f"learned from it ({tally.skipped} skipped in all)"
            )
        if tally.skipped_in_a_row >= self._config.skips:
            raise Diverged(
                f"the loss or its gradient was not finite for {tally.skipped_in_a_row} steps in a "
                f"row, up to step {step:,}; lower optimizer.learning_rate, or look at the data"
            )

    def _tell(self, row: dict[str, Any]) -> None:
        """The bar on a terminal; off it, a line now and then, since a log is all there is."""
        note = self._work.reading.note(row)
        self.bar(1, note=note)
        step, last = row["step"], self._config.steps
        if self.bar.silent and (self._clock - self._told > 10 or step in (self._fresh + 1, last)):
            self._told = self._clock
            rest = (last - step) * row["seconds"]
            say(f"step {step:,} of {last:,}: {note}, about {rest / 60:.1f} minutes left")


class _Interruption:
    signal: int | None = None


@contextmanager
def _signals() -> Iterator[_Interruption]:
    """Notes SIGTERM and SIGINT instead of dying; a second one of a kind gets its usual way."""
    seen = _Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, _: Any) -> None:
        say(f"{signal.Signals(number).name}: finishing this step and saving; again to stop now")
        seen.signal = number
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
