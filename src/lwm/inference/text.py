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
        found = [at for at in (held.find(stop) for stop in stops) if at >= 0]
        if found:
            if min(found):
                yield held[: min(found)]
            return
        keep = max((_overlap(held, stop) for stop in stops), default=0)
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
