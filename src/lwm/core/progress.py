"""Progress and remarks on standard error.

Answers alone go to standard output, so that a command can stand in a pipe; everything else a user
sees while waiting comes through here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)


@runtime_checkable
class Advance(Protocol):
    """Moves a bar on by some steps."""

    def __call__(self, steps: int = 1) -> None: ...


class Bar:
    """A bar on a terminal, with a note beside it; `silent` where nobody sees it."""

    def __init__(self, display: Progress, description: str, total: int | None) -> None:
        self._display = display
        self._task = display.add_task(description, total=total, note="")

    @property
    def silent(self) -> bool:
        return not console.is_terminal

    def __call__(self, steps: int = 1, note: str = "") -> None:
        self._display.update(self._task, advance=steps, note=note)


def say(text: str) -> None:
    """One remark, without markup: text from files must not be read as formatting."""
    console.print(text, markup=False, soft_wrap=True)


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Bar]:
    """A bar for work, of a known size or not; it erases itself when done and stays silent off a
    terminal."""
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
