"""Guess the next tokens of a request by looking them up in its own text.

Text repeats itself: names, phrases quoted from a document, sentences of the answer. Where the last
few tokens occurred before, the tokens that followed them are a draft of what comes next. The model
checks a draft in one step that costs little more than a step of one token, and keeps the tokens
that it would have generated anyway, so a wrong draft costs time and nothing else. After wrong
drafts a drafter pauses; after right ones its drafts grow.

Source: prompt lookup decoding (Saxena 2023), after speculative decoding (Leviathan et al. 2023,
arXiv 2211.17192).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LONGEST = 5
"""An earlier place that shares this many of the last tokens is as good as one that shares more."""

SHORTEST = 3
"""Least number of shared tokens: drafts from two are wrong too often (docs/log.md)."""

LONGEST_PAUSE = 16
"""Steps without a draft after many wrong ones in a row."""


@dataclass(frozen=True, kw_only=True)
class DraftSettings:
    """Set the size of drafts.

    Args:
        widths: numbers of tokens per slot that a decode step with drafts takes, the certain token
            included, ascending; each compiles a step. Empty for no drafts.
        shortest: least number of shared tokens.
    """

    widths: tuple[int, ...] = (4, 8)
    shortest: int = SHORTEST

    def limited(self, slots: int, tokens: int) -> "DraftSettings":
        """Leave out widths at which a step takes more than `tokens` tokens in all slots."""
        widths = tuple(width for width in self.widths if width * slots <= tokens)
        return DraftSettings(widths=widths, shortest=self.shortest)


QUANTIZED_DRAFTS = DraftSettings(widths=(2, 4), shortest=4)
"""For quantized weights, with which a step of one token is cheap, so drafts must be right more
often; from three shared tokens, short answers come later than without drafts (docs/log.md)."""


class Drafter:
    """Draft the next tokens of one request.

    Args:
        text: the prompt.
        room: number of tokens that may be added to it.
    """

    def __init__(self, text: Sequence[int], room: int, shortest: int = SHORTEST) -> None:
        self._tokens = np.empty(len(text) + room, np.int32)
        self._tokens[: len(text)] = text
        self._length = len(text)
        self._shortest = shortest
        self._pause = 0  # length of the pause after the last wrong draft
        self._remaining = 0  # steps of that pause that remain
        self._trusted = False  # the last draft was right to its end

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens that were generated."""
        self._tokens[self._length : self._length + len(tokens)] = tokens
        self._length += len(tokens)

    def draft(self, first: int, further: int) -> list[int]:
        """Return a draft of the next tokens, possibly empty; call it once per step.

        Args:
            first: most tokens of the first draft, and after one that was not right to its end.
            further: most tokens after one that was.
        """
        if self._remaining > 0:
            self._remaining -= 1
            return []
        start = self._earlier_place()
        count = further if self._trusted else first
        return self._tokens[start : min(start + count, self._length)].tolist()

    def judge(self, drafted: int, accepted: int) -> None:
        """Record how many tokens of the last draft were right."""
        self._trusted = accepted == drafted
        self._pause = 0 if accepted else min(LONGEST_PAUSE, max(1, 2 * self._pause))
        self._remaining = self._pause

    def _earlier_place(self) -> int:
        """Find the index after the latest place that shares most of the last tokens.

        Returns the length of the text if no place shares enough.
        """
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


class Drafts:
    """Keep a drafter for each request that may be drafted."""

    def __init__(self, settings: DraftSettings) -> None:
        self._settings = settings
        self._drafters: dict[int, Drafter] = {}

    def add(self, request: int, prompt: Sequence[int], max_tokens: int) -> None:
        """Start drafting for a request, unless drafts are off or it has been added before."""
        if self._settings.widths and request not in self._drafters:
            self._drafters[request] = Drafter(prompt, max_tokens, self._settings.shortest)

    def draft(self, request: int, limit: int) -> Sequence[int]:
        """Return a draft of at most `limit` tokens."""
        drafter = self._drafters.get(request)
        if drafter is None:
            return ()
        first, further = self._settings.widths[0] - 1, self._settings.widths[-1] - 1
        return drafter.draft(min(first, limit), min(further, limit))

    def record(self, request: int, tokens: Sequence[int], drafted: int) -> None:
        """Append the tokens of a step, of which all but the last were drafted."""
        drafter = self._drafters.get(request)
        if drafter is not None:
            drafter.extend(tokens)
            if drafted:
                drafter.judge(drafted, len(tokens) - 1)

    def discard(self, request: int) -> None:
        """Stop drafting for a request; do nothing for one that was not added."""
        self._drafters.pop(request, None)

    def width(self, tokens: int) -> int:
        """Return the width of the step that takes at most `tokens` tokens per slot."""
        return 1 if tokens == 1 else min(w for w in self._settings.widths if w >= tokens)
