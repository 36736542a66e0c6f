"""Guess the next tokens of a request by looking them up in its own text.

Where the last few tokens occurred before, the tokens that followed them are a draft of what comes
next. The model checks a draft in one step that costs little more than a step of one token, and
keeps the tokens that it would have generated anyway, so a wrong draft costs only time.

Source: prompt lookup decoding (Saxena 2023), after speculative decoding (Leviathan et al. 2023,
arXiv 2211.17192).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LONGEST = 5
"""An earlier place that shares this many of the last tokens is as good as one that shares more."""

LONGEST_PAUSE = 16
"""Steps without a draft after many wrong ones in a row."""


@dataclass(frozen=True, kw_only=True)
class DraftSettings:
    """Set the size of drafts.

    Args:
        widths: tokens per slot in a decode step with drafts, the certain one included, ascending.
        shortest: fewest shared tokens; drafts from two are wrong too often (docs/log.md).
    """

    widths: Sequence[int] = (4, 8)
    shortest: int = 3


QUANTIZED_DRAFTS = DraftSettings(widths=(2, 4), shortest=4)
"""For quantized weights, with which a step of one token is cheap, so drafts must be right more
often; from three shared tokens, short answers come later than without drafts (docs/log.md)."""

NO_DRAFTS = DraftSettings(widths=())


class Drafter:
    """Draft the next tokens of one request, whose prompt `text` grows by at most `room` tokens."""

    def __init__(
        self, text: Sequence[int], room: int, settings: DraftSettings = DraftSettings()
    ) -> None:
        self._tokens = np.empty(len(text) + room, np.int32)
        self._tokens[: len(text)] = text
        self._length = len(text)
        self._settings = settings
        self._pause = 0  # length of the pause after the last wrong draft
        self._remaining = 0  # steps of that pause that remain
        self._trusted = False  # the last draft was right to its end

    def draft(self, limit: int) -> list[int]:
        """Return a draft of at most `limit` tokens, possibly empty; call it once per step.

        It fills the least width, or the greatest one if the last draft was right to its end.
        """
        if self._remaining > 0:
            self._remaining -= 1
            return []
        start = self._earlier_place()
        count = min(limit, self._settings.widths[-1 if self._trusted else 0] - 1)
        return self._tokens[start : min(start + count, self._length)].tolist()

    def record(self, tokens: Sequence[int], drafted: int = 0) -> None:
        """Append the tokens of a step; after a draft, all but the last of them were drafted."""
        self._tokens[self._length : self._length + len(tokens)] = tokens
        self._length += len(tokens)
        if drafted:
            accepted = len(tokens) - 1
            self._trusted = accepted == drafted
            self._pause = 0 if accepted else min(LONGEST_PAUSE, max(1, 2 * self._pause))
            self._remaining = self._pause

    def _earlier_place(self) -> int:
        """Find the index after the latest place that shares the most last tokens, or the end."""
        text, best = self._tokens[: self._length], self._length
        ends = np.flatnonzero(text[:-1] == text[-1])
        for size in range(2, LONGEST + 1):
            ends = ends[ends >= size - 1]
            ends = ends[text[ends - size + 1] == text[self._length - size]]
            if len(ends) == 0:
                break
            if size >= self._settings.shortest:
                best = int(ends[-1]) + 1
        return best
