"""Generate text from a prompt of token ids: build the request, stop at stop strings, measure."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge

from lwm.core.config import Checked
from lwm.core.errors import InputError
from lwm.core.progress import progress
from lwm.data.text.tokenizer import Tokenizer, require_unicode
from lwm.engine.engine import Engine
from lwm.engine.request import Request
from lwm.engine.sampling import GREEDY


@dataclass
class Timings:
    """Measure an answer, in tokens and seconds."""

    prompt: int = 0
    reused: int = 0  # tokens of the prompt that were cached
    prefill_seconds: float = 0.0  # time to the first token, compilation included
    answer: int = 0
    answer_seconds: float = 0.0  # time for all tokens but the first

    def __str__(self) -> str:
        computed = self.prompt - self.reused
        parts = [f"prompt {self.prompt:,} tokens"]
        if self.reused:
            parts.append(f"{self.reused:,} of them reused")
        if self.prefill_seconds > 0:
            parts.append(f"read at {computed / self.prefill_seconds:,.0f} tokens/s")
        parts.append(f"answer {self.answer:,} tokens")
        if self.answer > 1 and self.answer_seconds > 0:
            parts.append(f"written at {(self.answer - 1) / self.answer_seconds:,.1f} tokens/s")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class AnswerEnd(Checked):
    """Set where an answer ends: after a number of tokens, or at a string."""

    max_tokens: Annotated[int, Ge(1)] = 256
    stop: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.stops):
            raise InputError(
                "a stop string is empty; leave it out or give it at least one character"
            )

    @property
    def stops(self) -> tuple[str, ...]:
        """Return the strings that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def answer_end(settings: Mapping[str, Any]) -> AnswerEnd:
    """Select the settings of an answer that are not of `Sampling`."""
    return AnswerEnd(**{name: settings[name] for name in _END if name in settings})


_END = ("max_tokens", "stop")


def text_request(
    prompt: Sequence[int], settings: Mapping[str, Any], tokenizer: Tokenizer, context: int
) -> Request:
    """Build the request that continues a prompt; `Model.generate` describes the settings."""
    sampling = {name: x for name, x in settings.items() if name not in _END}
    end = answer_end(settings)
    # A stop string that is one token never occurs in the decoded text.
    stops = [tokenizer.backend.token_to_id(require_unicode(text)) for text in end.stops]
    return Request(
        prompt=prompt,
        max_tokens=min(end.max_tokens, context - len(prompt)),
        sampling=GREEDY.updated(sampling),
        stop_tokens=(*tokenizer.eos, *(token for token in stops if token is not None)),
    )


def stream_tokens(engine: Engine, request: Request, timings: Timings) -> Iterator[int]:
    """Iterate over the token ids of an answer, and fill in its timings."""
    reused = engine.scheduler.reused
    started = time.perf_counter()
    with progress("reading the prompt", len(request.prompt)) as advance:
        tokens = engine.stream(request, advance)
        token = next(tokens)
    timings.prefill_seconds = time.perf_counter() - started
    timings.reused = engine.scheduler.reused - reused
    started = time.perf_counter()
    with closing(tokens):  # also when the caller stops early
        while True:
            if token.token is not None:
                timings.answer += 1
                timings.answer_seconds = time.perf_counter() - started
                yield token.token
            if token.finish is not None:
                return
            token = next(tokens)


class StopFilter:
    """Pass text through up to the first stop string, which may span several pieces.

    Text that may be the beginning of a stop string is kept until more text decides.

    Attributes:
        stopped: whether a stop string has come.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stopped = False
        self._stops, self._kept = stops, ""

    def push(self, piece: str) -> str:
        """Return the text that is certain to come before a stop string."""
        text = self._kept + piece
        # The start of the earliest complete stop string, and of the earliest that may become one.
        complete = _find(text, self._stops)
        partial = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self.stopped = complete is not None and complete <= partial
        end = complete if self.stopped else partial
        self._kept = "" if self.stopped else text[partial:]
        return text[:end]

    def finish(self) -> str:
        """Return the text that was kept, when no more comes."""
        text = self._kept
        return text[: _find(text, self._stops)]


def until_stop(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Iterate over pieces of text up to the first stop string; see `StopFilter`."""
    stop = StopFilter(stops)
    for piece in pieces:
        if text := stop.push(piece):
            yield text
        if stop.stopped:
            return
    if rest := stop.finish():
        yield rest


def _find(text: str, stops: Sequence[str]) -> int | None:
    return min((at for at in (text.find(stop) for stop in stops) if at >= 0), default=None)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
