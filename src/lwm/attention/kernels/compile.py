"""C sources of ours, compiled for the machine at hand when they are first wanted.

A library is kept in the user's cache directory under a name made of all that decides what is in
it: the source, the header of jaxlib, and what the compiler says of itself and of this processor.
So a home shared by different machines, a new compiler and a new jaxlib each get their own.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from lwm.core.errors import LwmError


class CompilerError(LwmError):
    """A source cannot be compiled on this machine."""


# Each instruction that this processor has; compilers for ARM want it under another name.
_THIS_PROCESSOR = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
_FLAGS = ("-std=gnu11", "-O3", _THIS_PROCESSOR, "-fPIC", "-shared", "-pthread")
_SECONDS = 120


def _run(command: list[str]) -> bytes:
    return subprocess.run(
        command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=_SECONDS
    ).stdout


def _compiler() -> list[str]:
    """The command named by CC, or the first usual one that is here."""
    if os.name != "posix":
        raise CompilerError("it is built on Linux and macOS alone")
    for name in [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]:
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            return command
    raise CompilerError("no C compiler is here; install gcc or clang, or name one by CC")


def _cache() -> Path:
    """Our part of the user's cache directory, which nobody else may write to.

    Raises:
        OSError, RuntimeError: there is no such place.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lwm"
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    state = home.stat()
    if state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise PermissionError(f"others may write to {home}")
    return home


def _build(command: list[str], library: Path) -> None:
    """Whole or not at all, whoever else is at it, even if the power fails."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        fresh = Path(folder) / library.name
        _run([*command, "-o", str(fresh)])
        fresh.chmod(0o700)
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        fresh.rename(library)


def _load(library: Path, function: str) -> Any:
    return getattr(ctypes.CDLL(str(library)), function)


def _open(source: Path, function: str) -> Any:
    headers = Path(jax.ffi.include_dir())
    compiler = [*_compiler(), *_FLAGS, *shlex.split(os.environ.get("CFLAGS", ""))]
    command = [*compiler, f"-I{headers}", str(source)]
    # The macros that a compiler defines by itself name its version and the processor's features.
    macros = _run([*compiler, "-dM", "-E", "-xc", os.devnull])
    interface = (headers / "xla" / "ffi" / "api" / "c_api.h").read_bytes()
    parts = (source.read_bytes(), interface, macros, shlex.join(compiler).encode())
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()
    name = f"{source.stem}-{digest[:20]}.so"
    try:
        library = _cache() / name
        with suppress(OSError, AttributeError):  # not there, or damaged
            return _load(library, function)
        _build(command, library)
        return _load(library, function)
    except (OSError, RuntimeError):  # no place for it, or none to run from: for this process alone
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / name
            _build(command, library)
            return _load(library, function)


def compile_c_function(source: Path, function: str) -> Any:
    """A function of a C source that knows XLA's foreign function interface, compiled or found.

    CC and CFLAGS count as everywhere.

    Raises:
        CompilerError: says why there is none.
    """
    try:
        return _open(source, function)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or [str(error)]
        line = next((line for line in lines if "error" in line), lines[0])
        reason = f"{error.cmd[0]} does not compile {source.name}: {line}"
        raise CompilerError(reason) from error
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise CompilerError(f"{source.name} is not compiled: {error}") from error
