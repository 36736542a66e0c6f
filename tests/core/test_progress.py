"""Check that standard output stays clean, that markup is not interpreted, and memory figures."""

import jax
import psutil
import pytest

from lwm.core.memory import available_bytes, gigabytes
from lwm.core.progress import progress, say


def test_messages_go_to_standard_error_verbatim(capsys: pytest.CaptureFixture[str]) -> None:
    say("a [bold]message[/bold] of [/nothing]")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "a [bold]message[/bold] of [/nothing]\n"


def test_a_bar_off_a_terminal_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("reading", 10) as advance:
        advance()
        advance(9)
    captured = capsys.readouterr()
    assert (captured.out, captured.err.strip()) == ("", "")


def test_a_cpu_device_has_at_most_the_memory_of_the_host() -> None:
    available = available_bytes(jax.devices()[0])
    assert available is not None
    assert 0 < available <= psutil.virtual_memory().total


def test_gigabytes_are_decimal() -> None:
    assert gigabytes(13_476_831_232) == "13.48 GB"
