"""Guesses at what comes next, looked up in a request's own text: no model, plain numpy over token
ids.

Text repeats itself: names, phrases of a document that is quoted, an answer that goes over its own
ground. Where the last few tokens have stood before, what followed them then is a draft of what
follows now. The engine lets the model judge a draft in one step that costs less than one step a
token, and keeps what the model would have written anyway; a wrong draft costs time and nothing
else. So a drafter that is wrong falls silent for a while, and one that is right drafts further.

Knows one request's tokens; knows nothing of models, slots or probabilities.

Source: prompt lookup decoding (Saxena 2023), after speculative decoding (Leviathan et al. 2023,
arXiv 2211.17192).
"""

from collections.abc import Sequence

import numpy as np

LONGEST = 5
"""Last tokens that an earlier place of the text must share to be preferred to any later place."""

SHORTEST = 3
"""Fewer shared tokens make no draft: two are too often wrong (docs/log.md)."""

LONGEST_PAUSE = 16
"""Steps without a draft after many wrong ones in a row."""


class Drafter:
    """One request's text and how well its drafts have done.

    Args:
        text: the prompt.
        room: tokens that may be added to it.
        shortest: how many of the last tokens an earlier place must share at least.
    """

    def __init__(self, text: Sequence[int], room: int, shortest: int = SHORTEST) -> None:
        self._tokens = np.empty(len(text) + room, np.int32)
        self._tokens[: len(text)] = text
        self._length = len(text)
        self._shortest = shortest
        self._pause = 0  # steps to be silent after the next wrong draft
        self._silent = 0  # steps of that which are left
        self._trusted = False  # the last draft came true to its end

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds what was written since."""
        self._tokens[self._length : self._length + len(tokens)] = tokens
        self._length += len(tokens)

    def draft(self, first: int, further: int) -> list[int]:
        """A guess at the next tokens, possibly empty; asked for once a step.

        Args:
            first: tokens at most while drafts are untried or were cut short, `further` after one
                that came true to its end.
        """
        if self._silent > 0:
            self._silent -= 1
            return []
        start = self._earlier_place()
        count = further if self._trusted else first
        return self._tokens[start : min(start + count, self._length)].tolist()

    def judge(self, drafted: int, accepted: int) -> None:
        """Learns how many tokens of the last draft came true."""
        self._trusted = accepted == drafted
        self._pause = 0 if accepted else min(LONGEST_PAUSE, max(1, 2 * self._pause))
        self._silent = self._pause

    def _earlier_place(self) -> int:
        """Behind the latest place that shares most of the last tokens, up to `LONGEST` of them;
        the text's end where none shares enough."""
        text, best = self._tokens[: self._length], self._length
        ends = np.flatnonzero(text[:-1] == text[-1])
        for size in range(2, LONGEST + 1):
            ends = ends[ends >= size - 1]
            ends = ends[text[ends - size + 1] == text[self._length - size]]
            if len(ends) == 0:
                break
            if size >= self._shortest:
                best = int(ends[-1]) + 1
        return best
