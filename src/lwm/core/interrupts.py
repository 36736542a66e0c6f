"""End the command line's work at Ctrl-C.

Python raises KeyboardInterrupt wherever the main thread happens to be. Within a step of a model,
that leaves buffers half donated; within a callback, such as jax's at each garbage collection, the
exception is lost; and within compiled code it waits. So during a step a press only sets a flag,
which the end of the step reads; an exception that was lost is raised again; and a thread ends the
process at a second press, or if a first one has no effect for `SECONDS`.
"""

import atexit
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from lwm.core.files import remove_partial_files

EXIT_CODE = 130
"""Exit code of a command that Ctrl-C ended, by the shell's convention."""

SECONDS = 5.0
"""Time within which a first press ends a command."""


class _State:
    pressed = False
    deadline: float | None = None  # after a press, until it is acknowledged
    patient = False
    claimed = False
    exiting = False
    deferring = 0
    terminal: Any = None  # its settings


def install() -> None:
    """Handle SIGINT in this process until it ends; for the command line, not for libraries."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # it is installed, or the signal is ignored, as in background jobs of a shell
    with suppress(Exception):  # there may be no terminal
        import termios

        _State.terminal = termios.tcgetattr(0)
    atexit.register(_exit_with_code)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGINT, _handle)
    signal.signal(signal.SIGALRM, _handle)
    # Handlers run between two instructions of the main thread, but this pipe gets the number of a
    # signal at once.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), name="interrupts", daemon=True).start()
    report = sys.unraisablehook

    def raise_again(lost: Any) -> None:
        if _State.pressed and isinstance(lost.exc_value, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            report(lost)

    sys.unraisablehook = raise_again


def pressed() -> bool:
    """Return whether Ctrl-C was pressed and not acknowledged."""
    return _State.pressed


def exit_interrupted() -> NoReturn:
    """Exit because of Ctrl-C; further presses change nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the interpreter's end would restore the default
    # The interpreter would end by a signal, without an exit code, if the exception passed through
    # an exec() of any library. What is registered first runs last.
    _State.exiting = True
    sys.exit(EXIT_CODE)


def _exit_with_code() -> None:
    if _State.exiting:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(EXIT_CODE)


def acknowledge() -> None:
    """Take note that a press has ended what it was meant to end, and that work goes on."""
    _State.pressed, _State.deadline = False, None


@contextmanager
def deferred() -> Iterator[None]:
    """Let a press raise KeyboardInterrupt only after the block."""
    _State.deferring += 1
    try:
        yield
    finally:
        _State.deferring -= 1
    if _State.pressed and not _State.deferring:
        raise KeyboardInterrupt


@contextmanager
def patient() -> Iterator[None]:
    """Let a first press take as long as a step does, within the block."""
    _State.patient = True
    try:
        yield
    finally:
        _State.patient = False


@contextmanager
def claimed() -> Iterator[None]:
    """Leave the first press to a handler of the caller's, within the block."""
    _State.claimed = True
    try:
        yield
    finally:
        _State.claimed = False


def _handle(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT:
        if _State.pressed:
            _end()
        _State.pressed = True
    if not _State.pressed or _State.deferring:
        return
    if not _imports(frame):
        raise KeyboardInterrupt
    # An exception may abort the process while an extension module is being initialized.
    if not _State.patient:
        _end()
    signal.setitimer(signal.ITIMER_REAL, 0.05)


def _imports(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


def _watch(reader: int) -> None:
    while True:
        ready, _, _ = select.select([reader], [], [], 0.1 if _State.deadline else None)
        if ready:
            presses = os.read(reader, 64).count(signal.SIGINT)
            if presses + (_State.deadline is not None) > 1:
                _end()
            if presses:
                seconds = math.inf if _State.claimed or _State.patient else SECONDS
                _State.deadline = time.monotonic() + seconds
        elif _State.deadline and time.monotonic() > _State.deadline:
            _end()


def _end() -> None:
    """End the process whatever its threads do, and leave files and terminal in order."""
    remove_partial_files()
    with suppress(Exception):
        import termios

        termios.tcsetattr(0, termios.TCSANOW, _State.terminal)
    with suppress(OSError):
        if os.isatty(2):
            os.write(2, b"\x1b[?25h\n")  # shows the cursor, which progress bars hide
    os._exit(EXIT_CODE)
