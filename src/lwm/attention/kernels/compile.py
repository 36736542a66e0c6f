"""Compile C sources of this package for the present machine, and cache the libraries.

A library is stored in the user's cache directory under a digest of everything that determines it,
so a home directory shared by machines, a new compiler and a new jaxlib each get their own library.
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
    """Signal that a source cannot be compiled on this machine."""


# Use every instruction of this processor; compilers for ARM have another name for the flag.
_NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
_FLAGS = ("-std=gnu11", "-O3", _NATIVE, "-fPIC", "-shared", "-pthread")
_SECONDS = 120


def compile_c_function(source: Path, function: str) -> Any:
    """Return a function of a C source, compiled with CC and CFLAGS now or taken from the cache.

    The source may use XLA's foreign function interface. Raise CompilerError without a compiler, or
    if it fails.
    """
    try:
        return _open(source, function)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or [str(error)]
        line = next((line for line in lines if "error:" in line), lines[0])
        reason = f"{error.cmd[0]} does not compile {source.name}: {line}"
        raise CompilerError(reason) from error
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise CompilerError(f"{source.name} cannot be compiled: {error}") from error


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
        with suppress(OSError, AttributeError):  # missing or damaged
            return getattr(ctypes.CDLL(str(library)), function)
        return _build(command, library, function)
    except (OSError, RuntimeError):  # no usable cache directory: compile for this process only
        with tempfile.TemporaryDirectory() as folder:
            return _build(command, Path(folder) / name, function)


def _compiler() -> list[str]:
    """Return the command named by CC, or the first usual one that exists."""
    if os.name != "posix":
        raise CompilerError("the kernel supports only Linux and macOS")
    for name in [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]:
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            return command
    raise CompilerError("there is no C compiler; install gcc or clang, or set CC")


def _cache() -> Path:
    """Return our part of the user's cache directory, after checking that others cannot write."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lwm"
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    state = home.stat()
    if state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise PermissionError(f"others may write to {home}")
    return home


def _build(command: list[str], library: Path, function: str) -> Any:
    """Write the library atomically, safe against other processes and power failures."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        fresh = Path(folder) / library.name
        _run([*command, "-o", str(fresh)])
        fresh.chmod(0o700)
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        fresh.rename(library)
    return getattr(ctypes.CDLL(str(library)), function)


def _run(command: list[str]) -> bytes:
    return subprocess.run(
        command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=_SECONDS
    ).stdout
