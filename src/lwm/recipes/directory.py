"""A run's directory: whether it may be used, and the settings it begins with."""

import fcntl
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from lwm.checkpoints.formats.run import RUN_FILE, TOKENIZER
from lwm.core.errors import ConfigError, InputError
from lwm.core.progress import say


def require_run(directory: Path) -> None:
    """Refuses a directory of something else, which a run would mingle with or move aside.

    Raises:
        InputError: it is a file, or holds other things than a run.
    """
    if directory.is_file() or (
        directory.is_dir()
        and any(not path.name.startswith(".") for path in directory.iterdir())
        and not any((directory / name).exists() for name in (RUN_FILE, TOKENIZER))
    ):
        raise InputError(f"{directory} exists and is no training run; choose another --out")


def hold(directory: Path) -> TextIO:
    """Keeps other trainings out of a directory that is there until what it gives is closed, or the
    process has ended in any way.

    Raises:
        ConfigError: another process trains in it.
        InputError: it cannot be written to.
    """
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
            f"another process is training in {directory}; wait for its end, or choose another "
            "--out"
        ) from error
    except OSError:
        pass  # a file system without locks
    return file


def require_same(directory: Path, has: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuses to go on with other settings of the model than the directory's checkpoints have.

    Raises:
        ConfigError: names the first that differs.
    """
    for name in {**has, **asked}:
        if has.get(name) != asked.get(name):
            raise ConfigError(
                f"{directory} holds a run whose {name} is {has.get(name)}, not {asked.get(name)}; "
                "start anew with --fresh, or in another --out"
            )


def make_run(directory: Path, *, fresh: bool) -> None:
    """Makes the directory; with `fresh` moves aside what is in its place.

    Raises:
        InputError: it cannot be made.
    """
    if fresh and directory.exists():
        directory = directory.resolve()  # the name of '.' is empty
        aside = directory.with_name(f"{directory.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        directory.rename(aside)
        say(f"the run that was in {directory} is now in {aside}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{directory} cannot be made: {error.strerror}; choose another --out"
        ) from error


def write_settings(directory: Path, settings: dict[str, Any]) -> None:
    """`run.json` of a directory that is there."""
    partial_file = directory / f".{RUN_FILE}.partial"
    partial_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    partial_file.rename(directory / RUN_FILE)
