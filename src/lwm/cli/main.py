"""Run the `lwm` command: choose the verb, and report a user's mistake in one sentence."""

import codecs
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from lwm.cli.chat import chat
from lwm.cli.convert import convert
from lwm.cli.data import export, inspect, questions, world
from lwm.cli.demo import demo
from lwm.cli.evaluate import compare, multi_needle, needle, perplexity, suite, video_needle
from lwm.cli.generate import generate_image, generate_text, generate_video
from lwm.cli.info import info
from lwm.cli.parsing import UsageError, closest_name, parse
from lwm.cli.serve import serve
from lwm.cli.tokenize import tokenize
from lwm.cli.train import train
from lwm.core import interrupts
from lwm.core.errors import LwmError


@dataclass(frozen=True)
class CommandGroup:
    """Represent a command that consists of further commands."""

    summary: str
    commands: "dict[str, CommandGroup | Callable[..., None]]"


LWM = CommandGroup(
    "Train, evaluate, run and convert Large World Models.",
    {
        "demo": demo,
        "chat": chat,
        "generate": CommandGroup(
            "Generate text, images or videos from a prompt.",
            {"text": generate_text, "image": generate_image, "video": generate_video},
        ),
        "serve": serve,
        "train": train,
        "tokenize": tokenize,
        "data": CommandGroup(
            "Inspect, write or export training data.",
            {"inspect": inspect, "qa": questions, "export": export, "world": world},
        ),
        "eval": CommandGroup(
            "Evaluate a model, and report scores with plots.",
            {
                "needle": needle,
                "multi-needle": multi_needle,
                "perplexity": perplexity,
                "suite": suite,
                "video-needle": video_needle,
                "compare": compare,
            },
        ),
        "convert": convert,
        "info": info,
    },
)


def main() -> None:
    """Run the command line of this process."""
    interrupts.install()
    _read_as_utf8()
    _open_closed_streams()
    _cache_compiled_code()
    _ignore_closed_event_loops()
    try:
        try:
            _run("lwm", LWM, sys.argv[1:])
        finally:  # here, where a failure can be reported
            sys.stdout.flush()
    except LwmError as error:
        print("" if isinstance(error, UsageError) else "lwm: ", error, sep="", file=sys.stderr)
        warnings.simplefilter("ignore")  # warnings about work that the error interrupted
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        interrupts.exit_interrupted()
    except BrokenPipeError:  # the program that reads our output has ended
        _discard_output()
        sys.exit(141)
    except OSError as error:  # a path that cannot be reached, a full disk
        problem = f"lwm: {error.strerror or error}: {error.filename or ''}"
        print(problem.rstrip(": "), file=sys.stderr)
        _discard_output()
        sys.exit(2)
    except Exception:
        if interrupts.pressed():  # a library may have turned KeyboardInterrupt into its own error
            interrupts.exit_interrupted()
        raise


def _run(command: str, group: CommandGroup, arguments: Sequence[str]) -> None:
    see = f"see '{command} --help'"
    if not arguments:
        raise UsageError(f"{command}: name one of {', '.join(group.commands)}; {see}")
    name, *rest = arguments
    if name in ("-h", "--help"):
        print(_help(command, group))
        return
    if name not in group.commands:
        close = closest_name(name, group.commands)
        remedy = f"did you mean {close}?" if close else see
        raise UsageError(f"{command}: unknown command {name!r}; {remedy}")
    match group.commands[name]:
        case CommandGroup() as inner:
            _run(f"{command} {name}", inner, rest)
        case verb if verb in (train, inspect):  # whose options depend on a recipe
            verb(rest)
        case verb:
            parse(verb, f"{command} {name}", rest)


def _help(command: str, group: CommandGroup) -> str:
    lines = [f"usage: {command} [-h] COMMAND ...", "", group.summary, "", "commands:"]
    for name, entry in group.commands.items():
        summary = entry.summary if isinstance(entry, CommandGroup) else str(entry.__doc__)
        lines.append(f"  {name:<14}{summary.splitlines()[0]}")
    return "\n".join([*lines, "", f"'{command} COMMAND --help' describes a command."])


def _read_as_utf8() -> None:
    """Take the C and POSIX locales for UTF-8, and let no stream fail for its encoding.

    Python does so unless PYTHONUTF8=0 or LC_ALL prevent it; arguments, names of files and streams
    would then be ASCII. A line of input or a name of a file may still be any bytes.
    """
    if codecs.lookup(sys.getfilesystemencoding()).name == "ascii":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            utf8 = codecs.lookup(stream.encoding).name == "utf-8" and stream is not sys.stderr
            keeps_bytes = utf8 or stream is sys.stdin
            stream.reconfigure(errors="surrogateescape" if keeps_bytes else "backslashreplace")


def _open_closed_streams() -> None:
    """Connect standard streams that are closed to the null device.

    Otherwise the next files that are opened would get their descriptors.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", errors="replace"))


def _discard_output() -> None:
    """Prevent Python from reporting, at exit, that a stream cannot be written."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # it has no descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _cache_compiled_code() -> None:
    """Let later runs reuse the code that this one compiles."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(base) / "lwm" / "compiled"))


def _ignore_closed_event_loops() -> None:
    """Silence TensorStore's threads after a checkpoint could not be written.

    Orbax then raises the error in the main thread and closes the event loop, so that threads which
    still write fail as well, each with a trace around the one sentence that reports the error.
    """
    report = sys.unraisablehook

    def report_unknown(error: Any) -> None:
        native = isinstance(threading.current_thread(), threading._DummyThread)
        if not (native and str(error.exc_value) == "Event loop is closed"):
            report(error)

    sys.unraisablehook = report_unknown
