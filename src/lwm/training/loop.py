"""Run the training loop: read batches, take steps, record metrics, write checkpoints."""

import itertools
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import grain
import jax
import numpy as np
from annotated_types import Ge

from lwm.core.config import Checked
from lwm.core.mesh import pace
from lwm.core.progress import progress
from lwm.training.checkpointing import Checkpoints
from lwm.training.interruption import Interrupted, Interruption
from lwm.training.metrics import Metrics
from lwm.training.recorder import Recorder
from lwm.training.training import Tally, Training

PROFILED = range(3, 6)
"""Steps after the run's start or resumption that `profile` traces; the first ones compile."""


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


class BatchSource(Protocol):
    """Yield this process's rows without end; checkpoints save the position of `iterator`."""

    @property
    def iterator(self) -> grain.DatasetIterator: ...

    @property
    def broken(self) -> int:
        """Return the number of distinct examples skipped so far because they are broken."""
        ...

    def __next__(self) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Hold the data of a run.

    Args:
        held_out: reads the evaluation split from its start; None if there is none.
    """

    batches: BatchSource
    held_out: Callable[[], Iterator[dict[str, np.ndarray]]] | None


@dataclass(kw_only=True)
class RunState:
    """Hold what the loop changes, and the weights that it does not.

    Args:
        step: steps taken.
    """

    step: int
    state: Any
    frozen: Any
    tally: Tally


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Train one run.

    Args:
        metrics: None in all processes but the first.
        facts: saved with every checkpoint, beside step and tally.
        directory: the run's directory.
    """

    training: Training
    data: TrainingData
    config: LoopConfig
    checkpoints: Checkpoints
    metrics: Metrics | None
    facts: dict[str, Any]
    directory: Path

    def run(self, at: RunState) -> None:
        """Train until step `config.steps` or until a signal, and save.

        Raises:
            Interrupted: SIGTERM or SIGINT came; the state is saved.
            Diverged: too many steps in a row were skipped.
            CheckpointError: a checkpoint cannot be written.
        """
        first, last = at.step, self.config.steps
        train, evaluate = self.training.step(), self.training.evaluate()
        with ExitStack() as stack:
            interruption = stack.enter_context(Interruption(first))
            tracing = stack.enter_context(ExitStack())
            bar = stack.enter_context(progress("training", last - first))
            recorder = Recorder(
                self.training, self.metrics, at.tally, bar,
                first=first, last=last, max_skips=self.config.skips,
            )  # fmt: skip
            stopping = False
            while at.step < last and not stopping:
                if self.config.profile and at.step - first == min(
                    PROFILED.start, last - first - 1
                ):
                    tracing.enter_context(jax.profiler.trace(str(self.directory / "profile")))
                self._step(train, at, recorder)
                if at.step - first == PROFILED.stop:
                    recorder.flush()
                    tracing.close()  # writes the trace, if one was begun
                stopping = self._evaluate_and_save(evaluate, at, recorder, interruption)
            recorder.flush()
            self.checkpoints.wait()
        if at.step < last:
            number = interruption.signal or signal.SIGTERM
            raise Interrupted(
                f"stopped by {signal.Signals(number).name} after step {at.step:,} of {last:,}, "
                "which is saved; start the same command again to resume",
                number,
            )

    def _step(self, train: Any, at: RunState, recorder: Recorder) -> None:
        waited = time.perf_counter()
        local = next(self.data.batches)
        waited = time.perf_counter() - waited
        batch = self.training.place(local)
        # Any other transfer between host and device would be a mistake, and slow.
        with jax.transfer_guard("disallow"):
            at.state, metrics = train(at.state, at.frozen, batch)
        at.step += 1
        row = {
            "step": at.step, "data_wait_seconds": waited, "broken": self.data.batches.broken,
        }  # fmt: skip
        recorder.add(row, self.training.measure(local), metrics)

    def _evaluate_and_save(
        self, evaluate: Any, at: RunState, recorder: Recorder, interruption: Interruption
    ) -> bool:
        """Do what is due after a step; return whether a signal ends the run."""
        last, every = at.step == self.config.steps, self.config.evaluate_every
        evaluating = bool(self.data.held_out and every and (last or at.step % every == 0))
        saving = last or self.checkpoints.due(at.step)
        stopping = interruption.agreed(at.step, now=evaluating or saving)
        evaluation = None
        if evaluating and not stopping:
            recorder.flush()
            evaluation = recorder.add_evaluation(at.step, self._evaluate(evaluate, at))
            if self.training.show is not None:
                self.training.show(at.step, at.state)
        best = evaluation is not None and at.tally.is_best(evaluation)
        if saving or stopping or (best and self.checkpoints.keeps_best):
            recorder.flush()
            facts = {**self.facts, "step": at.step, "tally": vars(at.tally)}
            self.checkpoints.save(at.step, at.state, self.data.batches.iterator, facts, evaluation)
        return stopping

    def _evaluate(self, evaluate: Any, at: RunState) -> Any:
        """Return sums over the first batches of the held-out split."""
        assert self.data.held_out is not None
        total: Any = None
        for local in itertools.islice(self.data.held_out(), self.config.evaluation_batches):
            sums = evaluate(at.state, at.frozen, self.training.place(local))
            total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
            pace(total)
        return total
