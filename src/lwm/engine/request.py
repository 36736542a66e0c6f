"""Define what the engine takes and what it returns, in token ids."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Le

from lwm.core.config import Checked
from lwm.engine.sampling import MAX_ALTERNATIVES, Sampling


@dataclass(frozen=True, kw_only=True)
class Request(Checked):
    """Describe a prompt to continue.

    Args:
        prompt: token ids.
        unconditional: a second prompt, for guidance; both get the same new tokens.
        stop_tokens: ids that end the answer and are not part of it.
        logprobs: how many of the likeliest alternatives to return with each token.
        allowed: return the range of ids that may come next, for a number of tokens answered so
            far; defaults to the ids of text. Such answers are not drafted.
    """

    prompt: Sequence[int]
    max_tokens: Annotated[int, Ge(1)]
    sampling: Sampling = field(default_factory=Sampling)
    unconditional: Sequence[int] | None = None
    stop_tokens: Sequence[int] = ()
    logprobs: Annotated[int, Ge(0), Le(MAX_ALTERNATIVES)] = 0
    allowed: Callable[[int], range] | None = None

    @property
    def prompts(self) -> list[Sequence[int]]:
        """Return the prompt of each slot that the request takes."""
        return [self.prompt] if self.unconditional is None else [self.prompt, self.unconditional]


@dataclass(frozen=True, kw_only=True)
class Token:
    """Represent one token of one request; a step may return several.

    Args:
        request: the number that `Engine.submit` returned.
        token: the id; None for a stop token.
        logprob: log-probability among the ids allowed, before temperature, penalty and filters.
        top: the likeliest alternatives and their log-probabilities.
        finish: why this is the last token; None if it is not.
    """

    request: int
    token: int | None
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    finish: Literal["stop", "length"] | None = None
