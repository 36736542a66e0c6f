"""What is asked of the engine and what it answers, in token ids.

Knows ids and settings; knows no arrays, no model and no text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lwm.core.errors import ConfigError
from lwm.engine.sampling import MAX_TOP_LOGPROBS, Sampling


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue.

    Args:
        prompt: token ids.
        unconditional: a second prompt that guides the first (`Sampling.guidance`); both rows get
            the same tokens.
        stop_tokens: ids that end the answer; the one that did is not part of it.
        logprobs: how many likeliest alternatives to report with each token.
        allowed: which ids may be drawn, given how many tokens the answer has so far; a range of
            one id forces it. Those of text unless given. Such answers are not drafted.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    unconditional: Sequence[int] | None = None
    stop_tokens: Sequence[int] = ()
    logprobs: int = 0
    allowed: Callable[[int], range] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
            raise ConfigError(
                f"logprobs is {self.logprobs}; it must be from 0 to {MAX_TOP_LOGPROBS} "
                "alternatives"
            )


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token of one request; a step may bring several.

    Args:
        token: the id; None in a last event that brings no token, because a stop token came.
        logprob: of the token under the model's own distribution over the ids allowed, before
            temperature and the like.
        top: the likeliest alternatives and their log-probabilities, as many as asked for.
        finish: why this is the last token, if it is.
    """

    request: int
    token: int | None
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    finish: Literal["stop", "length"] | None = None
