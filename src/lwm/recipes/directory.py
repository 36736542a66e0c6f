"""Check, lock and create the directory of a training run."""

import fcntl
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from lwm.checkpoints.formats.run import RUN_FILE, TOKENIZER
from lwm.core.errors import ConfigError, InputError
from lwm.core.files import new_file
from lwm.core.progress import say


def require_run(directory: Path) -> None:
    """Refuse a file, and a directory that holds something else than a run."""
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
        raise InputError(
            f"{directory} cannot be written to: {error.strerror}; choose another --out"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ConfigError(
            f"another process is training in {directory}; wait until it ends, or choose another "
            "--out"
        ) from error
    except OSError:
        pass  # the file system has no locks
    return file


def require_same(directory: Path, saved: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Refuse to resume a run with other settings of the model than its checkpoints have."""
    has, asked = _comparable(saved), _comparable(facts)
    for name in {**has, **asked}:
        if has.get(name) != asked.get(name):
            raise ConfigError(
                f"{directory} holds a run whose {name} is {has.get(name)}, not {asked.get(name)}; "
                "start from the beginning with --fresh, or use another --out"
            )


def _comparable(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must stay the same; only adapters depend on the model that training began on."""
    settings = {**(facts.get("model") or {}), **(facts.get("vqgan") or {})}
    return settings | ({**facts["lora"], "init": facts.get("init")} if facts.get("lora") else {})


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
        raise InputError(
            f"{directory} cannot be created: {error.strerror}; choose another --out"
        ) from error


def write_settings(directory: Path, settings: dict[str, Any]) -> None:
    """Write `run.json` to an existing directory."""
    with new_file(directory / RUN_FILE, replace=True) as file:
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
