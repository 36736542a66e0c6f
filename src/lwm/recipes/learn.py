"""Run the part of training that text and VQGAN share: lock, create, resume, train, plot."""

import fcntl
import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from lwm.checkpoints.formats.run import RUN_FILE, TOKENIZER
from lwm.core.config import from_dict, to_dict
from lwm.core.distributed import first_process, together
from lwm.core.errors import ConfigError, InputError
from lwm.core.files import new_file, require_utf8
from lwm.core.progress import say
from lwm.data.images import Crops
from lwm.data.loader import Loader
from lwm.models.llama import LlamaConfig
from lwm.models.vqgan import VQGANConfig
from lwm.recipes.settings import RunSettings
from lwm.training.checkpointing import DIRECTORY, Checkpoints
from lwm.training.loop import HeldOut, Loop
from lwm.training.metrics import Metrics, require_tracking
from lwm.training.training import Tally, Training


def learn(
    run: RunSettings,
    training: Training,
    batches: Loader | Crops,
    held_out: HeldOut | None,
    *,
    facts: dict[str, Any],
    description: str,
    save_inputs: Callable[[], None] = lambda: None,
) -> Path:
    """Train from the beginning, or from the last checkpoint; return the run's directory.

    Every checkpoint saves `facts` on the model, and a resumed run must have the same.
    `save_inputs` copies what belongs to the model to the run's directory, in process 0.
    """
    last = run.loop.steps
    with ExitStack() as stack:
        existed = run.out.is_dir()
        _lock(run.out, stack)  # before anything in it is read, removed or renamed
        resumes = (run.out / DIRECTORY).is_dir() and not run.fresh
        prepare = partial(_prepare, run, facts, save_inputs)
        if not resumes:
            prepare()
        checkpoints = stack.enter_context(closing(Checkpoints(run.out, run.checkpoint)))
        restored = None
        if resumes:
            same = partial(_require_same, run.out, facts)
            restored = checkpoints.restore(training.template(), batches.iterator, same)
            prepare()
        if run.fresh or not existed:
            _lock(run.out, stack)
        if restored is None:
            first, state, tally = 0, training.first_state(), Tally()
        else:
            first, state, saved = restored
            tally = from_dict(Tally, saved.get("tally", {}), f"checkpoint {first} of {run.out}")
            say(f"resuming from step {first:,} of {last:,} in {run.out}")
        if first >= last:
            say(f"{run.out} is at step {first:,} already; raise --steps to train on")
            return run.out
        metrics = None
        if first_process():
            metrics = Metrics(run.out, run.tracking, after=first, settings=to_dict(run))
            stack.callback(metrics.close)
        say(description)
        Loop(
            training=training, batches=batches, held_out=held_out, config=run.loop,
            checkpoints=checkpoints, metrics=metrics, facts=facts, directory=run.out,
            step=first, state=state, tally=tally,
        ).run()  # fmt: skip
    return run.out


def _prepare(run: RunSettings, facts: dict[str, Any], save_inputs: Callable[[], None]) -> None:
    """Create the run's directory, with inputs and settings."""
    with together():  # no process continues before the directory is complete
        if first_process():
            make_run(run.out, fresh=run.fresh)
            save_inputs()
            model = {name: facts[name] for name in ("model", "vqgan") if name in facts}
            settings = json.dumps({"run": to_dict(run), **model}, indent=2)
            with new_file(run.out / RUN_FILE, replace=True) as file:
                file.write_text(settings + "\n", encoding="utf-8")


def _lock(directory: Path, stack: ExitStack) -> None:
    with together():
        if first_process() and directory.is_dir():
            stack.enter_context(lock(directory))


def _require_same(directory: Path, facts: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuse to resume a run with other settings of the model than its checkpoints have."""
    has, asked = _comparable(saved), _comparable(facts)
    for name in {**has, **asked}:
        if has.get(name) != asked.get(name):
            raise ConfigError(
                f"{directory} holds a run whose {name} is {has.get(name)}, not {asked.get(name)}; "
                "start from the beginning with --fresh, or use another --out"
            )


def _comparable(facts: Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name, kind in (("model", LlamaConfig), ("vqgan", VQGANConfig)):
        if facts.get(name):  # settings that an older version did not have are at their default
            settings |= to_dict(from_dict(kind, facts[name], name))
    # Only adapters depend on the model that training began on.
    return settings | ({**facts["lora"], "init": facts.get("init")} if facts.get("lora") else {})


def require_run(run: RunSettings) -> None:
    """Refuse trackers that are not installed, and a path that cannot hold this run."""
    require_tracking(run.tracking)
    directory = run.out
    require_utf8(directory, "checkpoints must be")
    if directory.is_file() or (
        directory.is_dir()
        and any(not path.name.startswith(".") for path in directory.iterdir())
        and not any((directory / name).exists() for name in (RUN_FILE, TOKENIZER))
    ):
        raise InputError(f"{directory} exists and is not a training run; choose another --out")


def lock(directory: Path) -> TextIO:
    """Lock an existing directory until the returned file is closed or the process ends."""
    try:
        file = (directory / ".lock").open("w")
    except OSError as error:
        raise InputError(f"--out {directory} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ConfigError(f"another process is training in {directory}; wait for it") from error
    except OSError:
        pass  # the file system has no locks
    return file


def make_run(directory: Path, *, fresh: bool) -> None:
    """Create the directory; with `fresh`, first rename an existing one."""
    if fresh and directory.exists():
        directory = directory.resolve()  # '.' has no name that could be changed
        aside = directory.with_name(f"{directory.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        directory.rename(aside)
        say(f"the run that was in {directory} is now in {aside}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {directory} cannot be created: {error.strerror}") from error
