"""What a training run is: one typed value, made by a recipe and changed from the command line.

Each part belongs to the room that uses it; only `assemble` sees the whole.
"""

import difflib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro

from lwm.core.config import override
from lwm.core.distributed import DistributedConfig
from lwm.core.errors import ConfigError
from lwm.data.config import DataConfig
from lwm.models.llama import LlamaConfig
from lwm.models.lora import LoraConfig
from lwm.models.sizes import size
from lwm.models.vision_tokens import VisionVocabulary
from lwm.training.checkpointing import CheckpointConfig
from lwm.training.loop import LoopConfig
from lwm.training.metrics import TrackingConfig
from lwm.training.optimizer import OptimizerConfig
from lwm.training.step import ComputeConfig


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model to train: a size by name, and what differs from it."""

    size: str = ""
    """A size: debug, 200m, 1b, 3b, 7b, 13b, 30b, 65b; empty takes that of --init."""
    rope_theta: float | None = None
    """Base of the rotary embedding; raise it to extend the context."""
    vocab_size: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float | None = None
    tie_embeddings: bool | None = None
    vision: Annotated[VisionVocabulary | None, tyro.conf.AvoidSubcommands] = None
    """What the model sees; a text model, or what --init sees, unless given."""

    def resolve(self, sequence_length: int, start: LlamaConfig | None, source: str) -> LlamaConfig:
        """The model's configuration.

        Args:
            start: that of the checkpoint named `source` to start from, or None.

        Raises:
            ConfigError: neither a size nor a checkpoint is given, or they disagree.
        """
        changes = {field.name: getattr(self, field.name) for field in fields(self)}
        del changes["size"]
        # Rows shorter than a model's context do not take it away.
        had = 0 if start is None else start.max_sequence_length
        changes["max_sequence_length"] = max(sequence_length, had)
        if not self.size and start is None:
            raise ConfigError("model.size is empty and no --init is given; give one of them")
        if not self.size:
            assert start is not None
            wanted = override(start, **changes)
        else:
            sized = size(self.size)
            if self.hidden_size or self.num_heads:  # the rest of attention follows, unless given
                heads = self.num_heads or sized.num_heads
                changes["head_dim"] = (
                    self.head_dim or (self.hidden_size or sized.hidden_size) // heads
                )
                changes["num_kv_heads"] = self.num_kv_heads or heads
            wanted = override(sized, **changes)
        if start is None:
            return wanted
        # What a stage may change, and what a size says of the original and not of this checkpoint.
        free = {"max_sequence_length", "rope_theta", "initializer_range", "rms_norm_eps"}
        self._require_same_vision(start, source)
        if self.vision is None:  # with a size, which says nothing of vision
            wanted = override(wanted, vision=start.vision)
        for field in fields(LlamaConfig):
            has, asked = getattr(start, field.name), getattr(wanted, field.name)
            if field.name not in free and has != asked:
                raise ConfigError(
                    f"--init {source} has {field.name} {has}, but this run asks for {asked}; "
                    "choose the --model.size of the checkpoint, or --model.size '' to take what "
                    "it has"
                )
        return override(
            wanted,
            rope_theta=self.rope_theta or start.rope_theta,
            rms_norm_eps=self.rms_norm_eps or start.rms_norm_eps,
        )

    def _require_same_vision(self, start: LlamaConfig, source: str) -> None:
        if self.vision is None:
            return
        if start.vision is None:
            raise ConfigError(
                f"--init {source} is a text model and this run trains one that sees; give it "
                f"vision first with 'lwm convert {source} DEST --add-vision', and --init DEST"
            )
        for field in fields(VisionVocabulary):
            has, asked = getattr(start.vision, field.name), getattr(self.vision, field.name)
            if has != asked:
                raise ConfigError(
                    f"--init {source} has vision.{field.name} {has}, but this run asks for "
                    f"{asked}; add --model.vision.{field.name.replace('_', '-')} {has}"
                )


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run, complete."""

    out: Path = Path()
    """Directory of checkpoints and figures; runs/RECIPE unless given."""
    init: str = ""
    """MODEL to start from; random weights unless given."""
    fresh: bool = False
    """Start anew where the directory holds a run already, which is moved aside."""
    tokenizer: str = ""
    """A tokenizer's file or directory; else that of --init, else one is trained on the data."""
    vqgan: str = ""
    """The VQGAN that the data's codes are of, kept with the run; else that of --init."""
    sequence_length: int = 1024
    """Tokens of a row."""
    batch_size: int = 8
    """Rows of a step, over all devices and microbatches."""
    accumulate: int = 1
    """Microbatches that a step is cut into, to save memory."""
    mesh: str = "1,-1,1,1"
    """Devices along data,fsdp,tensor,sequence; -1 is whatever is left."""
    seed: int = 0
    """Of the random weights; the data has its own."""
    loop: Annotated[LoopConfig, tyro.conf.OmitArgPrefixes] = LoopConfig()
    model: ModelSettings = ModelSettings()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    compute: ComputeConfig = ComputeConfig()
    lora: LoraConfig = LoraConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    distributed: DistributedConfig = DistributedConfig()

    def __post_init__(self) -> None:
        for name, least in (("sequence_length", 2), ("batch_size", 1), ("accumulate", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")


def nearest(name: str, known: list[str]) -> str:
    """The known names, nearest first, for a message about one that is not."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(known)}"
