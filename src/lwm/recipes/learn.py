"""Run the part of training that text and VQGAN share: lock, resume, train, plot."""

import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

from lwm.core.config import to_dict
from lwm.core.distributed import first_process, together
from lwm.core.progress import say
from lwm.recipes.directory import lock, make_run, require_same, write_settings
from lwm.recipes.settings import RunSettings
from lwm.training.checkpointing import DIRECTORY, Checkpoints
from lwm.training.loop import BatchSource, HeldOut, Loop
from lwm.training.metrics import Metrics
from lwm.training.training import Tally, Training


def learn(
    run: RunSettings,
    training: Training,
    batches: BatchSource,
    held_out: HeldOut | None,
    *,
    facts: dict[str, Any],
    description: str,
    save_inputs: Callable[[], None] = lambda: None,
) -> Path:
    """Train from the beginning, or from the last checkpoint in the run's directory.

    Args:
        facts: what describes the model; saved with every checkpoint, and compared on resuming.
        description: logged when training starts.
        save_inputs: copies what belongs to the model to the run's directory, in process 0.
    """
    with ExitStack() as stack:
        existed = run.out.is_dir()
        _lock(run.out, stack)  # before anything in it is read, removed or renamed
        resumes = (run.out / DIRECTORY).is_dir() and not run.fresh
        if not resumes:
            _prepare(run, facts, save_inputs)
        checkpoints = stack.enter_context(closing(Checkpoints(run.out, run.checkpoint)))
        restored = None
        if resumes:
            restored = checkpoints.restore(
                training.template(),
                batches.iterator,
                lambda saved: require_same(run.out, saved, facts),
            )
            _prepare(run, facts, save_inputs)
        if run.fresh or not existed:
            _lock(run.out, stack)
        frozen = training.frozen()
        if restored is not None:
            first, state, saved = restored
            tally = Tally(**saved["tally"])
            say(f"resuming from step {first:,} of {run.loop.steps:,} in {run.out}")
        else:
            first, state, tally = 0, training.first_state(), Tally()
        if first >= run.loop.steps:
            say(f"{run.out} is at step {first:,} already; raise --steps to train on")
            return run.out
        metrics = None
        if first_process():
            metrics = Metrics(run.out, run.tracking, after=first, settings=to_dict(run))
            stack.callback(_finish, metrics)
        say(description)
        started = time.perf_counter()
        Loop(
            training=training, batches=batches, held_out=held_out, config=run.loop,
            checkpoints=checkpoints, metrics=metrics, facts=facts, directory=run.out,
            step=first, state=state, frozen=frozen, tally=tally,
        ).run()  # fmt: skip
        minutes = (time.perf_counter() - started) / 60
        broken = batches.broken
        skipped = f", {broken:,} broken example{'s' * (broken > 1)} skipped" if broken else ""
        steps = run.loop.steps - first
        say(f"done: {steps:,} steps in {minutes:.1f} minutes{skipped}; see {run.out}")
    return run.out


def _prepare(run: RunSettings, facts: dict[str, Any], save_inputs: Callable[[], None]) -> None:
    """Create the run's directory, with inputs and settings."""
    with together():  # no process continues before the directory is complete
        if first_process():
            make_run(run.out, fresh=run.fresh)
            save_inputs()
            model = {name: facts[name] for name in ("model", "vqgan") if name in facts}
            write_settings(run.out, {"run": to_dict(run), **model})


def _lock(directory: Path, stack: ExitStack) -> None:
    with together():
        if first_process() and directory.is_dir():
            stack.enter_context(lock(directory))


def _finish(metrics: Metrics) -> None:
    metrics.close()
    with suppress(OSError):  # a full disk must not hide the error that ended the run
        metrics.plot()
