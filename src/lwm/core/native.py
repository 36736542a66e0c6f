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
from functools import cache
from pathlib import Path

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
    for name in [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]:
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            return command
    raise CompilerError("no C compiler is here; install gcc or clang, or name one by CC")


def _build(source: Path, compiler: list[str]) -> Path:
    headers = Path(jax.ffi.include_dir())
    interface = headers / "xla" / "ffi" / "api" / "c_api.h"
    # The macros that a compiler defines by itself name its version and the processor's features.
    macros = _run([*compiler, *_FLAGS, "-dM", "-E", "-xc", os.devnull])
    command = shlex.join([*compiler, *_FLAGS]).encode()
    parts = (source.read_bytes(), interface.read_bytes(), macros, command)
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lwm"
    library = home / f"{source.stem}-{name}.so"
    if not library.exists():
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=home) as folder:
            fresh = Path(folder) / library.name
            _run([*compiler, *_FLAGS, f"-I{headers}", "-o", str(fresh), str(source)])
            fresh.rename(library)  # whole or not at all, whoever else is at it
    return library


@cache
def compiled(source: Path) -> ctypes.CDLL:
    """The library made of a C source that knows XLA's foreign function interface.

    Raises:
        CompilerError: says why it cannot be made.
    """
    try:
        compiler = _compiler()
        return ctypes.CDLL(str(_build(source, compiler)))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        reason = f"{error.cmd[0]} does not compile {source.name}: {lines[0] if lines else error}"
        raise CompilerError(reason) from error
    except (OSError, RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
        raise CompilerError(f"{source.name} is not compiled: {error}") from error
