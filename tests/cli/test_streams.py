"""Start the command with odd locales, arguments and streams: no traceback, a fitting code.

A verb that echoes stands for the others, whose imports would take seconds in each process.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import sys
from pathlib import Path
from lwm.cli import main
from lwm.cli.parsing import Text, read_text

def echo(text: Text | None = None, path: Path | None = None, lines: int = 1) -> None:
    for _ in range(lines):
        print(read_text(sys.stdin.read()) if text is None else text)
    if path is not None:
        print(path.read_text(encoding="utf-8"), path)

main.LWM.commands["echo"] = echo
main.main()
"""
ASCII: dict[str, Any] = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def echo(
    *words: str | bytes, stdin: bytes = b"", shell: str = 'exec "$@"', **environment: str
) -> tuple[int, bytes, bytes]:
    """Run the script by a shell command; return its code and what it printed."""
    command = ["bash", "-c", shell, "bash", sys.executable, "-c", SCRIPT, "echo", *words]
    clean = {name: x for name, x in os.environ.items() if not name.startswith(("LC_", "PYTHON"))}
    clean |= {"LANG": "C.UTF-8", "PYTHONPATH": os.pathsep.join(sys.path)} | environment
    done = subprocess.run(command, input=stdin, capture_output=True, env=clean, timeout=60)
    assert b"Traceback" not in done.stderr, done.stderr
    assert b"Exception ignored" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def test_the_c_locale_is_utf8(tmp_path: Path) -> None:
    path = tmp_path / "né"
    path.write_text("日本", encoding="utf-8")
    code, out, err = echo("--text", "café", "--path", str(path), **ASCII)
    assert (code, out.decode(), err) == (0, f"café\n日本 {path}\n", b"")
    code, out, _ = echo(stdin="où".encode(), **{**ASCII, "LC_ALL": "POSIX"})
    assert (code, out.decode()) == (0, "où\n")


def test_bytes_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/n\xe9"
    with open(path, "w", encoding="utf-8") as file:
        file.write("content")
    code, out, err = echo("--text", b"caf\xe9", "--path", path)
    assert (code, out) == (0, "caf\ufffd\ncontent ".encode() + path + b"\n")
    assert b"is not valid UTF-8" in err
    code, out, err = echo(b"--caf\xe9", stdin=b"caf\xe9")
    assert (code, out) == (2, b"")
    assert rb"lwm echo: unknown option --caf\udce9" in err


def test_an_encoding_without_a_character_escapes_it() -> None:
    code, out, _ = echo("--text", "où 日", PYTHONIOENCODING="latin-1")
    assert (code, out.decode("latin-1")) == (0, "où \\u65e5\n")


@pytest.mark.parametrize(
    ("shell", "code", "printed"),
    [
        ('exec "$@" <&-', 0, b"\n"),
        ('exec "$@" --nonsense >&- 2>&-', 2, b""),
        ('set -o pipefail; "$@" --text x --lines 100000 | head -1', 141, b"x\n"),
        ('set -o pipefail; "$@" --help | true', 141, b""),
        ('exec "$@" --text x > /dev/full', 2, b""),
    ],
)
def test_streams_may_be_closed(shell: str, code: int, printed: bytes) -> None:
    ended, out, err = echo(shell=shell)
    assert (ended, out) == (code, printed), err
