"""Check that standard output stays clean and that markup is not interpreted."""

import pytest

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
