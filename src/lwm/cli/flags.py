"""Define the options that several verbs share, and print answers."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from lwm.cli.parsing import Text
from lwm.core.distributed import DistributedConfig, join, together
from lwm.core.errors import CapacityError

if TYPE_CHECKING:
    from lwm.generation.model import Model

ModelName = Annotated[
    str,
    tyro.conf.arg(
        help="A model directory, a .gguf file, params::FILE, trainstate_params::FILE, "
        "flax_params::FILE, hf:OWNER/NAME, or a name from 'lwm info --list'.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class LoadFlags:
    """Choose how the model is loaded."""

    config: str | None = None
    """Settings of an original checkpoint: a size such as 7b, or a JSON file."""
    tokenizer: str | None = None
    """A tokenizer.json, a tokenizer.model, or a directory with one; defaults to the model's."""
    vqgan: str | None = None
    """VQGAN directory, training run, or pickle of the original; defaults to the model's."""
    vqgan_config: str | None = None
    """JSON file with the settings of a pickled VQGAN."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of weights and cache; defaults to float32 on a CPU and bfloat16 elsewhere."""
    mesh: str | None = None
    """Devices along data,fsdp,tensor,sequence, such as 1,1,1,4; defaults to one device."""

    def load(
        self, model: str, *, theta: float | None = None, length: int | None = None
    ) -> "Model":
        """Load a model whose context holds `length` tokens; raise CapacityError if it is shorter.

        A RoPE base `theta` replaces the model's, and may extend its context.
        """
        from lwm.checkpoints.open import open_checkpoint
        from lwm.generation.load import load

        context = None
        if length is not None:
            limit = open_checkpoint(model, config=self.config).config.max_sequence_length
            if length > limit and theta is None:
                raise CapacityError(
                    f"the longest length is {length:,} and the context of {model} is {limit:,}; "
                    "shorten --lengths, or extend the context with a larger --theta"
                )
            context = max(limit, length)
        settings = {field.name: getattr(self, field.name) for field in fields(LoadFlags)}
        return load(model, **settings, theta=theta, context=context)


@dataclass(frozen=True, kw_only=True)
class SharedLoadFlags(LoadFlags):
    """Choose how the model is loaded, by one process or by several together."""

    distributed: DistributedConfig = DistributedConfig()

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Join the other processes; an error of one of them in this block ends all."""
        join(self.distributed)
        with together():
            yield


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """Choose how tokens are sampled."""

    max_tokens: int = 512
    """Maximum length of the answer in tokens."""
    temperature: float = 0.0
    """0 takes the most likely token; higher values are more varied."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 means all."""
    top_p: float = 1.0
    """Sample from the most likely tokens whose probabilities sum to this."""
    min_p: float = 0.0
    """Sample from tokens at least this fraction as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Values above 1 make tokens that occurred before less likely."""
    seed: int = 0
    """Seed of the sampling; the same seed gives the same answer."""
    stop: tyro.conf.UseAppendAction[tuple[Text, ...]] = ()
    """String that ends the answer."""


Load = Annotated[LoadFlags, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="model")]
SharedLoad = Annotated[SharedLoadFlags, tyro.conf.arg(name="")]
"""For verbs that several processes run together; adds `--distributed.*`."""
Sampling = Annotated[SamplingFlags, tyro.conf.OmitArgPrefixes]


def print_stream(pieces: Iterable[str]) -> str:
    """Print text as it arrives, end the line, and return the whole text."""
    parts = []
    for piece in pieces:
        print(piece, end="", flush=True)
        parts.append(piece)
    print(flush=True)
    return "".join(parts)
