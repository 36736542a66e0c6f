"""Test Ctrl-C at the moments where Python's own handling fails: during imports, in a callback that
drops exceptions, in the middle of a step, in compiled code, and twice."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# The background jobs of a shell ignore SIGINT.
PYTHON = ("env", "--default-signal=INT", sys.executable)

PRESS_IN_GARBAGE_COLLECTION = """
import gc, os, signal, sys
from lwm.__main__ import main
pressed = []
def press(phase, info):
    if not pressed and "lwm.engine.engine" in sys.modules:
        pressed.append(1)
        os.kill(os.getpid(), signal.SIGINT)
gc.callbacks.append(press)
sys.argv = ["lwm", *sys.argv[1:]]
main()
"""

IN_COMPILED_CODE = """
import hashlib
from contextlib import nullcontext
from pathlib import Path
from lwm.core import interrupts
from lwm.core.files import new_file
interrupts.install()
interrupts.SECONDS = 0.2
with new_file(Path("answer.txt")), interrupts.deferred(), {block}:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 26)
"""


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def start(started: list[subprocess.Popen[str]], *command: object) -> subprocess.Popen[str]:
    started.append(
        subprocess.Popen(
            [*PYTHON, *map(str, command)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    )  # fmt: skip
    return started[0]


def test_a_press_in_a_callback_that_drops_it_ends_the_answer(
    started: list[subprocess.Popen[str]], tiny: Path
) -> None:
    arguments = ("chat", tiny, "--prompt", "hello", "--max-tokens", 10_000)
    process = start(started, "-c", PRESS_IN_GARBAGE_COLLECTION, *arguments)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in messages
    assert "ignored" not in messages


@pytest.mark.parametrize("seconds", [0.08, 0.3])
def test_a_press_during_imports_ends_the_command(
    started: list[subprocess.Popen[str]], seconds: float
) -> None:
    process = start(started, "-X", "importtime", "-m", "lwm", "info", "--list")
    assert process.stderr is not None
    while "lwm.core.interrupts" not in process.stderr.readline():
        pass
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    output, messages = process.communicate(timeout=20)
    assert "Traceback" not in messages
    assert process.returncode == 130 or (process.returncode == 0 and "smollm2" in output)


@pytest.mark.parametrize(
    ("block", "presses", "ends"),
    [
        ("nullcontext()", 1, True),
        ("nullcontext()", 2, True),
        ("interrupts.patient()", 1, False),
        ("interrupts.patient()", 2, True),
        ("interrupts.claimed()", 1, False),
        ("interrupts.claimed()", 2, True),
    ],
)
def test_compiled_code_ends_at_the_second_press_or_after_some_time(
    started: list[subprocess.Popen[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    block: str,
    presses: int,
    ends: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    process = start(started, "-c", IN_COMPILED_CODE.format(block=block))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for _ in range(presses):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    if ends:
        assert process.wait(timeout=10) == 130
        assert list(tmp_path.iterdir()) == []
    else:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)


def test_a_step_ends_before_the_exception() -> None:
    script = """
import os, signal
from lwm.core import interrupts
interrupts.install()
steps = []
try:
    while True:
        with interrupts.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            steps.append("whole")
except KeyboardInterrupt:
    interrupts.acknowledge()
with interrupts.deferred():
    steps.append("next")
print(*steps)
"""
    ran = subprocess.run([*PYTHON, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == "whole next\n"
