"""Write files and directories that appear under their names only when they are complete."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lwm.core.errors import InputError


def readable(text: str) -> str:
    """Return text, such as the name of a file, with bytes that are not UTF-8 replaced.

    Python holds each of them as half of a surrogate pair.
    """
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def require_utf8(path: Path, reason: str) -> None:
    """Raise InputError if a path is not valid UTF-8; `reason` says what needs it."""
    if readable(str(path.absolute())) != str(path.absolute()):
        raise InputError(f"the path {path} is not valid UTF-8, as {reason}; choose another")


_partial: set[Path] = set()


def remove_partial_files() -> None:
    """Remove what is being written, since the process is about to end."""
    for path in [*_partial]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def refuse_existing(destination: Path) -> None:
    """Raise InputError if the destination exists."""
    if destination.exists() or destination.is_symlink():
        raise InputError(f"the destination {destination} exists; name another or remove it first")


@contextmanager
def new_directory(destination: Path) -> Iterator[Path]:
    """Yield a directory to fill; it gets its name if the block succeeds, or is removed.

    Raises InputError if the destination exists or its parent cannot be written.
    """
    refuse_existing(destination)
    partial = destination.with_name(f".{destination.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise _not_writable(destination, error) from error
    _partial.add(partial)
    try:
        yield partial
        partial.rename(destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _partial.discard(partial)


@contextmanager
def new_file(destination: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a path to write to; the file gets its name if the block succeeds, or is removed.

    Raises InputError if the destination exists, unless `replace` is set, if its directory is
    missing, or if it cannot be written, as on a disk that fills up while the block writes.
    """
    if not replace:
        refuse_existing(destination)
    if not destination.parent.is_dir():
        raise InputError(
            f"the directory {destination.parent} does not exist; create it or name another"
        )
    # The process id keeps two processes that write the same file apart.
    name = f".{destination.stem[:100]}.{os.getpid()}.partial{destination.suffix}"
    partial = destination.with_name(name)
    try:
        partial.touch()
        _partial.add(partial)
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(destination)
        finally:
            partial.unlink(missing_ok=True)
            _partial.discard(partial)
    except OSError as error:
        if error.filename is not None and str(error.filename) != str(partial):
            raise  # the block failed to read another file
        raise _not_writable(destination, error) from error


def _not_writable(destination: Path, error: OSError) -> InputError:
    reason = error.strerror or error  # libraries may raise an OSError without a number
    return InputError(f"{destination} cannot be written: {reason}; name another destination")
