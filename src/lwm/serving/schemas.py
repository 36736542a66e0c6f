"""Define the requests of the API, as OpenAI's clients send them.

A field that is not here is refused by name, unless its value is what leaving it out means. Sizes
are bounded, and numbers are finite.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MaxLen, MinLen
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_MOST_CHOICES = 16
_MOST_STOPS, _LONGEST_STOP = 16, 1000
_MOST_MESSAGES, _MOST_PROMPTS = 10_000, 1024

# Values of unsupported fields that ask for nothing.
_NEUTRAL: dict[str, Sequence[Any]] = {
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "logit_bias": ({},),
    "store": (False,),
    "best_of": (1,),
    "service_tier": ("auto", "default"),
}
# They only describe the caller.
_IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")


class Body(BaseModel):
    """Refuse fields that are not supported, by name."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str

    @model_validator(mode="before")
    @classmethod
    def _only_supported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
                kept[name] = value
            elif (
                value is not None and name not in _IGNORED and value not in _NEUTRAL.get(name, ())
            ):
                raise ValueError(f"{name} is not supported; leave it out")
        return kept


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else [] if value is None else value


Stop = Annotated[
    list[Annotated[str, MinLen(1), MaxLen(_LONGEST_STOP)]],
    MaxLen(_MOST_STOPS),
    BeforeValidator(_listed),
]
Count = Annotated[int, Ge(1), Le(_MOST_CHOICES)]
Penalty = Annotated[float, Ge(-2), Le(2)]


class StreamOptions(BaseModel):
    """Hold what a stream adds."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False


class TextBody(Body):
    """Hold what chat and completions share; `top_k`, `min_p` and `repetition_penalty` are ours."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Count = 1
    stop: Stop = []
    temperature: Annotated[float, Ge(0), Le(2)] = 1.0
    top_p: Annotated[float, Ge(0), Le(1)] = 1.0
    top_k: Annotated[int, Ge(0), Le(1 << 30)] = 0
    min_p: Annotated[float, Ge(0), Le(1)] = 0.0
    repetition_penalty: Annotated[float, Ge(0.01), Le(100)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    seed: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults_for_null(cls, data: Any) -> Any:
        # Clients send null for what they leave open.
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _options_of_streams(self) -> "TextBody":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream; set stream to true or leave it out")
        return self


class ChatBody(TextBody):
    """Describe a conversation to answer."""

    messages: Annotated[list[dict[str, Any]], MinLen(1), MaxLen(_MOST_MESSAGES)]
    max_tokens: Annotated[int, Ge(1)] | None = None
    max_completion_tokens: Annotated[int, Ge(1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Ge(0), Le(20)] = 0

    @model_validator(mode="after")
    def _consistent(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs; set logprobs to true or leave it out")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens exclude each other; send one")
        return self


Ids = Annotated[list[Annotated[int, Ge(0), Le(1 << 31)]], MinLen(1)]


class CompletionBody(TextBody):
    """Describe prompts to continue, as text or as token ids."""

    prompt: (
        str
        | Ids
        | Annotated[list[str], MinLen(1), MaxLen(_MOST_PROMPTS)]
        | Annotated[list[Ids], MinLen(1), MaxLen(_MOST_PROMPTS)]
    )
    max_tokens: Annotated[int, Ge(0)] = 16
    echo: bool = False
    logprobs: Annotated[int, Ge(0), Le(5)] | None = None

    @model_validator(mode="after")
    def _something_to_do(self) -> "CompletionBody":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0; it must be at least 1 unless echo is true")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, of which a single one is not in a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class DrawingBody(Body):
    """Hold what images and videos share; guidance and the settings of sampling are ours."""

    prompt: Annotated[str, MinLen(1), MaxLen(32_000)]
    size: str | None = None
    seed: Annotated[int, Ge(0), Le(2**32 - 1)] | None = None
    guidance: Annotated[float, Ge(-100), Le(100)] | None = None
    temperature: Annotated[float, Ge(0), Le(2)] | None = None
    top_k: Annotated[int, Ge(0), Le(1 << 30)] | None = None
    top_p: Annotated[float, Ge(0.000001), Le(1)] | None = None
    min_p: Annotated[float, Ge(0), Le(1)] | None = None
    negative_prompt: Annotated[str, MaxLen(32_000)] | None = None


class ImageBody(DrawingBody):
    """Describe images to draw."""

    n: Count = 1
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"


class VideoBody(DrawingBody):
    """Describe a video to draw, by its frames or by seconds of four frames each."""

    seconds: Annotated[float, Ge(0.25), Le(10_000)] | None = None
    frames: Annotated[int, Ge(1), Le(40_000)] | None = None
    input_reference: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_length(self) -> "VideoBody":
        if self.seconds is not None and self.frames is not None:
            raise ValueError("seconds and frames exclude each other; send one")
        return self

    @property
    def frame_count(self) -> int:
        """Return the frames of the video, 8 by default."""
        return self.frames or (8 if self.seconds is None else round(4 * self.seconds))


class TokenizeBody(BaseModel):
    """Hold a text to tokenize."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class DetokenizeBody(BaseModel):
    """Hold tokens to decode."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Ge(0), Le(1 << 31)]], Field(max_length=1 << 22)]
