"""Tokens -> text as it comes, ending at stop strings. Knows strings and token events; knows no
model."""

from collections.abc import Iterable, Iterator, Sequence

from lwm.core.errors import InputError


def until_stop(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Passes text on up to the first stop string, which is swallowed even when it comes in several
    pieces.

    Text that may be the beginning of a stop string is held back until it is known not to be one.

    Raises:
        InputError: a stop string is empty.
    """
    if any(not stop for stop in stops):
        raise InputError("a stop string is empty; leave it out or give it at least one character")
    held = ""
    for piece in pieces:
        held += piece
        # Where the earliest stop string begins that is whole, and the earliest that may become so.
        whole = _find(held, stops)
        begun = len(held) - max((_overlap(held, stop) for stop in stops), default=0)
        if whole is not None and whole <= begun:
            break
        if begun:
            yield held[:begun]
            held = held[begun:]
    text = held[: _find(held, stops)]
    if text:
        yield text


def _find(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string begins, if there is one."""
    return min((at for at in (text.find(stop) for stop in stops) if at >= 0), default=None)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
