"""What runs of every kind do once all is open: resume, learn, leave figures behind.

Knows a run's directory, its checkpoints and its metrics; knows no model.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

from lwm.core.config import to_dict
from lwm.core.distributed import first_process, together
from lwm.core.progress import say
from lwm.recipes.directory import hold
from lwm.recipes.settings import TrainingRun, VqganRun
from lwm.training.checkpointing import DIRECTORY, Checkpoints
from lwm.training.loop import Work, train
from lwm.training.metrics import Metrics
from lwm.training.readings import Tally


def learn(
    run: TrainingRun | VqganRun,
    work: Work,
    opened: ExitStack,
    *,
    template: Any,
    first_state: Callable[[], Any],
    frozen: Callable[[], Any],
    facts: dict[str, Any],
    same: Callable[[dict[str, Any]], None],
    write_settings: Callable[[], None],
    about: str,
) -> Path:
    """Trains from the beginning, or from the last checkpoint of the run's directory.

    Args:
        opened: closes what this opens, however it ends.
        template: the state of learning without its values.
        first_state, frozen: make what is learnt and what is not, after checkpoints are known to be
            of this run.
        facts: written into every checkpoint.
        same: refuses the facts of a checkpoint of another run.
        write_settings: makes the run's directory, or moves aside what is there.
        about: what is trained on what, told when it begins.
    """
    restored, existed = None, run.out.is_dir()
    _hold(run.out, opened)  # before anything in it is read, removed or moved aside
    if (run.out / DIRECTORY).is_dir() and not run.fresh:
        checkpoints = opened.enter_context(closing(Checkpoints(run.out, run.checkpoint)))
        restored = checkpoints.restore(template, work.batches.iterator, same)
        write_settings()
    else:
        write_settings()
        checkpoints = opened.enter_context(closing(Checkpoints(run.out, run.checkpoint)))
    if run.fresh or not existed:
        _hold(run.out, opened)
    kept = frozen()
    if restored is not None:
        first, state, found = restored
        tally = Tally(**found["tally"])
        say(f"going on from step {first:,} of {run.loop.steps:,} in {run.out}")
    else:
        first, state, tally = 0, first_state(), Tally()
    if first >= run.loop.steps:
        say(f"{run.out} is at step {first:,} already; raise --steps to go on")
        return run.out
    metrics = None
    if first_process():
        metrics = Metrics(run.out, run.tracking, after=first, settings=to_dict(run))
        opened.callback(_finish, metrics)
    say(about)
    started = time.perf_counter()
    train(
        state, kept, work, run.loop,
        first=first, tally=tally, checkpoints=checkpoints, due=run.checkpoint.due,
        metrics=metrics, facts=facts, run=run.out,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    broken = work.batches.broken
    passed = f", {broken:,} broken example{'s' * (broken > 1)} passed over" if broken else ""
    steps = run.loop.steps - first
    say(f"done: {steps:,} steps in {seconds / 60:.1f} minutes{passed}; see {run.out}")
    return run.out


def _hold(directory: Path, opened: ExitStack) -> None:
    with together():
        if first_process() and directory.is_dir():
            opened.enter_context(hold(directory))


def _finish(metrics: Metrics) -> None:
    metrics.close()
    with suppress(OSError):  # on a full disk the picture is the least
        metrics.draw()
