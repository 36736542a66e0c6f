"""Press Ctrl-C at random moments of `lwm chat`, in a terminal, and count the clean ends.

An end is clean if the command stops within 6 seconds with exit code 130, without a traceback, and
leaves the terminal's settings and the cursor as they were.

    python benchmarks/interrupt.py --model smollm2 --presses 40
"""

import argparse
import fcntl
import os
import pty
import random
import select
import signal
import subprocess
import sys
import termios
import time

LIMIT = 6.0
QUESTION = "Tell me a long story about a river."


def _own_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it


class Terminal:
    """Run a command in a terminal of its own, and collect what it prints."""

    def __init__(self, command: list[str]) -> None:
        self.master, self.slave = pty.openpty()
        self.settings = termios.tcgetattr(self.slave)
        self.output = b""
        self.process = subprocess.Popen(
            command,
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
            preexec_fn=_own_terminal,
        )

    def read(self, seconds: float) -> None:
        """Collect output for some time, or until the command ends."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if select.select([self.master], [], [], 0.02)[0]:
                self.output += os.read(self.master, 1 << 16)
            elif self.process.poll() is not None:
                return

    def press(self) -> None:
        """Press Ctrl-C."""
        os.write(self.master, b"\x03")

    def faults(self) -> list[str]:
        """Return what is wrong with the end of the command."""
        faults = []
        if self.process.poll() is None:
            faults.append(f"still runs after {LIMIT} s")
            self.process.kill()
        elif self.process.returncode != 130:
            faults.append(f"exit code {self.process.returncode}")
        if b"Traceback" in self.output or b"Exception ignored" in self.output:
            faults.append("traceback")
        if termios.tcgetattr(self.slave) != self.settings:
            faults.append("terminal settings changed")
        if self.output.rfind(b"\x1b[?25l") > self.output.rfind(b"\x1b[?25h"):
            faults.append("cursor hidden")
        os.close(self.master)
        os.close(self.slave)
        self.process.wait()
        return faults


def main() -> None:
    """Press Ctrl-C once or twice in each run, and print each end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--presses", type=int, default=40)
    parser.add_argument("--second", type=float, default=0.0, help="share of runs pressed twice")
    parser.add_argument("--longest", type=float, default=20.0, help="latest moment in seconds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    command = [sys.executable, "-m", "lwm", "chat", options.model, "--prompt", QUESTION]
    choice, clean = random.Random(options.seed), 0
    for number in range(options.presses):
        moment, twice = choice.uniform(0.05, options.longest), choice.random() < options.second
        terminal = Terminal([*command, "--max-tokens", "2000"])
        terminal.read(moment)
        started = time.monotonic()
        terminal.press()
        if twice:
            terminal.read(0.2)
            terminal.press()
        terminal.read(LIMIT)
        seconds = time.monotonic() - started
        faults = terminal.faults()
        clean += not faults
        print(
            f"{number + 1:3}: pressed {'twice' if twice else 'once'} after {moment:5.2f} s, "
            f"{', '.join(faults) or 'clean'} after {seconds:.2f} s",
            flush=True,
        )
        if faults:
            print(terminal.output.decode(errors="replace")[-2000:])
    print(f"{clean} of {options.presses} ends are clean")
    sys.exit(clean != options.presses)


if __name__ == "__main__":
    main()
