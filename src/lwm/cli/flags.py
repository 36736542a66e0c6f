"""Flags that several verbs share."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from lwm.core.distributed import DistributedConfig, join, together
from lwm.core.errors import CapacityError

if TYPE_CHECKING:
    from lwm.generation.model import Model

T = TypeVar("T")

ModelName = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="MODEL",
        help="A model directory, a .gguf file, params::FILE, trainstate_params::FILE, "
        "flax_params::FILE, hf:OWNER/NAME, or a name from 'lwm info --list'.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class LoadFlags:
    """How a MODEL is loaded."""

    config: str | None = None
    """For the original's checkpoints: a size (7b) or a JSON file of settings."""
    tokenizer: str | None = None
    """A tokenizer.json, a tokenizer.model, or a directory that holds one."""
    vqgan: str | None = None
    """What turns pictures into the model's codes, where it brings none: a directory, a run, or the
    original's pickle."""
    vqgan_config: str | None = None
    """For the original's pickle of a VQGAN: a JSON file of its settings."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of weights and cache; float32 on a CPU and bfloat16 elsewhere unless given."""
    mesh: str | None = None
    """Devices along data,fsdp,tensor,sequence, as in 1,1,1,4; one device unless given."""

    def load(
        self, model: str, *, theta: float | None = None, length: int | None = None
    ) -> "Model":
        """Loads a model.

        Args:
            theta: another base of the rotary positions; with it `length` may go beyond the
                model's context.
        """
        from lwm.checkpoints.open import open_checkpoint
        from lwm.generation.load import load

        context = None
        if length is not None:
            own = open_checkpoint(model, config=self.config).config.max_sequence_length
            if length > own and theta is None:
                raise CapacityError(
                    f"the longest length is {length:,} and the context of {model} is {own:,}; "
                    "shorten --lengths, or give a larger --theta to go beyond it"
                )
            context = max(own, length)
        return load(
            model, config=self.config, tokenizer=self.tokenizer, vqgan=self.vqgan,
            vqgan_config=self.vqgan_config,
            dtype=self.dtype, mesh=self.mesh, theta=theta, context=context,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SharedLoadFlags(LoadFlags):
    """How a MODEL is loaded, by one process or by several together."""

    distributed: DistributedConfig = DistributedConfig()

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Joins the other processes, before anything else; what a verb does with them stands
        inside, so that an error of one ends all.

        Raises:
            ConfigError: the processes contradict each other, or one does not come.
        """
        join(self.distributed)
        with together():
            yield


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How tokens are chosen."""

    max_tokens: int = 512
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token; higher is more varied."""
    top_k: int = 0
    """Choose among the k likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens whose probabilities sum to this."""
    min_p: float = 0.0
    """Choose among tokens at least this fraction as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1, makes tokens that were seen before less likely."""
    seed: int = 0
    """The same seed gives the same answer."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text that ends the answer; may be given several times."""

    def settings(self) -> dict[str, Any]:
        return dict(vars(self))


Load = Annotated[LoadFlags, tyro.conf.OmitArgPrefixes]
SharedLoad = Annotated[SharedLoadFlags, tyro.conf.arg(name="")]
"""For verbs that several processes run together: `--distributed.*` besides, and `joined`."""
Sampling = Annotated[SamplingFlags, tyro.conf.OmitArgPrefixes]


def in_order(given: Mapping[str, Sequence[T]], arguments: Sequence[str]) -> list[tuple[str, T]]:
    """Values of several repeatable flags in the order of the command line, with their flag.

    Args:
        given: by flag, the values in their order among themselves.
        arguments: the command line as it was written.
    """
    rest = {flag: list(values) for flag, values in given.items()}
    found = []
    for argument in arguments:
        flag = argument.partition("=")[0].removeprefix("--")
        if argument.startswith("--") and rest.get(flag):
            found.append((flag, rest[flag].pop(0)))
    return found + [(flag, value) for flag, values in rest.items() for value in values]


def print_stream(pieces: Iterable[str]) -> str:
    """Prints text as it comes, ends the line, and returns the whole."""
    parts = []
    for piece in pieces:
        print(piece, end="", flush=True)
        parts.append(piece)
    print(flush=True)
    return "".join(parts)
