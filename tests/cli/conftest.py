"""Share a runner of commands and tiny models among the command-line tests."""

import sys
import threading
from io import StringIO
from pathlib import Path

import pytest
from commands import Ran, Run
from random_llama import save_random_llama

from lwm.cli.main import main
from lwm.core import interrupts


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Run:
    """Run `lwm` in this process, optionally with standard input."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "unused"))
    monkeypatch.setattr(interrupts, "install", lambda: None)
    for module, hook in ((sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(module, hook, getattr(module, hook))  # restored after the test

    def command(*arguments: object, stdin: str = "") -> Ran:
        monkeypatch.setattr(sys, "argv", ["lwm", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", StringIO(stdin))
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else int(bool(stopped.code))
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return command


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a Hugging Face directory: a random Llama of four heads and its tokenizer."""
    directory = tmp_path_factory.mktemp("tiny")
    save_random_llama(directory)
    return directory


@pytest.fixture(scope="session")
def textless(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("textless")
    for name in ("config.json", "model.safetensors"):
        (directory / name).write_bytes((tiny / name).read_bytes())
    return directory


@pytest.fixture(scope="session")
def original() -> Path:
    return Path(__file__).resolve().parents[1] / "fixtures" / "original" / "unrolled"
