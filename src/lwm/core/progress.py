"""Show progress and log messages on standard error.

Only answers go to standard output, so that commands work in pipes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)


@runtime_checkable
class Advance(Protocol):
    """Define the callback that advances a progress bar."""

    def __call__(self, steps: int = 1) -> None: ...


class Bar:
    """Update a progress bar that has a note beside it."""

    def __init__(self, display: Progress, description: str, total: int | None) -> None:
        self._display = display
        self._task = display.add_task(description, total=total, note="")

    @property
    def silent(self) -> bool:
        """Return whether the bar is invisible because standard error is not a terminal."""
        return not console.is_terminal

    def __call__(self, steps: int = 1, note: str = "") -> None:
        self._display.update(self._task, advance=steps, note=note)


def say(text: str) -> None:
    """Log one message; markup in it is printed, not interpreted, since it may come from a file."""
    console.print(text, markup=False, soft_wrap=True)


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Bar]:
    """Show a progress bar while the block runs; invisible if standard error is not a terminal."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        yield Bar(bar, description, total)
