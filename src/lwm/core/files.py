"""Files that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from lwm.core.errors import InputError


def refuse_existing(destination: Path) -> None:
    """Raises:
    InputError: something is there already.
    """
    if destination.exists() or destination.is_symlink():
        raise InputError(f"the destination {destination} exists; name another or remove it first")


@contextmanager
def new_directory(destination: Path) -> Iterator[Path]:
    """A directory to fill, which takes its name when the block ends well and vanishes when it does
    not.

    Raises:
        InputError: the destination exists, or its parent cannot be written.
    """
    refuse_existing(destination)
    partial = destination.with_name(f".{destination.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"{destination} cannot be written: {error.strerror}; choose another"
        ) from error
    try:
        yield partial
        partial.rename(destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_text_file(destination: Path) -> Iterator[TextIO]:
    """A file to write UTF-8 text into, which takes its name when the block ends well and vanishes
    when it does not.

    Raises:
        InputError: the destination exists, or its directory does not, or cannot be written.
    """
    refuse_existing(destination)
    if not destination.parent.is_dir():
        raise InputError(
            f"the directory {destination.parent} does not exist; make it or name another"
        )
    partial = destination.with_name(f".{destination.name}.partial")
    try:
        file = partial.open("w", encoding="utf-8", newline="\n")
    except OSError as error:
        raise InputError(
            f"{destination} cannot be written: {error.strerror}; choose another"
        ) from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.rename(destination)
    finally:
        partial.unlink(missing_ok=True)
