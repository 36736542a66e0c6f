"""Files of pictures for the user: refused by their extension before work starts, and whole or not
there at all. Knows no format."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from lwm.core.errors import InputError

_Choice = TypeVar("_Choice")


def extension_of(path: str | os.PathLike[str], choices: Mapping[str, object], what: str) -> str:
    """The extension of a file to be written, in small letters.

    Raises:
        InputError: it is not among the choices, or the path is a directory.
    """
    path = Path(path)
    extension = path.suffix.lower()
    if extension not in choices:
        raise InputError(
            f"{path} has the extension '{path.suffix}'; {what} is written as {', '.join(choices)}"
        )
    if path.is_dir():
        raise InputError(f"{path} is a directory; name a file to write {what} to")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no directory {path.parent}; make it")
    return extension


@contextmanager
def new_file(
    path: str | os.PathLike[str], choices: Mapping[str, _Choice], what: str
) -> Iterator[tuple[Path, _Choice]]:
    """A temporary path of the same extension, and the choice that the extension stands for. The
    file takes its name, in place of what had it, when the block ends well, and vanishes when it
    does not.

    Raises:
        InputError: the extension is not among the choices, or the place cannot be written.
    """
    path, extension = Path(path), extension_of(path, choices, what)
    partial = path.absolute().with_name(f".{path.stem}.{os.getpid()}.partial{extension}")
    try:
        with partial.open("xb"):
            pass
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror}; name another place"
        ) from error
    try:
        yield partial, choices[extension]
        partial.replace(path)
    except OSError as error:
        # A full disk, most often; libraries raise it from wherever they were.
        raise InputError(
            f"{path} cannot be written: {error.strerror or error}; free the disk or name another"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
