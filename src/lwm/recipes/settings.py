"""Define the settings of a training run, which a recipe makes and the command line changes."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from annotated_types import Ge

from lwm.core.config import Checked, override
from lwm.core.distributed import DistributedConfig
from lwm.core.errors import ConfigError
from lwm.data.config import DataConfig
from lwm.data.images import ImageDataConfig
from lwm.models.likeness import WINDOW
from lwm.models.llama import LlamaConfig
from lwm.models.lora import LoraConfig
from lwm.models.sizes import size
from lwm.models.vision_tokens import VisionVocabulary
from lwm.models.vqgan import VQGANConfig
from lwm.training.checkpointing import CheckpointConfig
from lwm.training.loop import LoopConfig
from lwm.training.metrics import TrackingConfig
from lwm.training.optimizer import OptimizerConfig
from lwm.training.text import ComputeConfig
from lwm.training.vqgan import CodebookConfig, ReconstructionConfig

# A stage may change these, and a size has the original's values for them.
_FREE = ("max_sequence_length", "rope_theta", "initializer_range", "rms_norm_eps")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Set the model to train: a size by name, and what differs from it."""

    size: str = ""
    """A size: debug, 200m, 1b, 3b, 7b, 13b, 30b, 65b; empty takes the size of --init."""
    rope_theta: float | None = None
    """Base of the rotary embedding; raise it to extend the context."""
    vocab_size: int | None = None
    """Number of text ids; this and the sizes below default to those of the size."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    intermediate_size: int | None = None
    """Width of the feed-forward network."""
    num_layers: int | None = None
    """Number of layers."""
    num_heads: int | None = None
    """Number of query heads."""
    num_kv_heads: int | None = None
    """Number of key-value heads; fewer than query heads means grouped-query attention."""
    head_dim: int | None = None
    """Width of a head."""
    rms_norm_eps: float | None = None
    """Term added to the mean square in RMSNorm."""
    tie_embeddings: bool | None = None
    """Use the embedding as the output head."""
    vision: Annotated[VisionVocabulary | None, tyro.conf.AvoidSubcommands] = None
    """Vision vocabulary; defaults to the one of --init, or none."""

    def resolve(self, sequence_length: int, start: LlamaConfig | None, source: str) -> LlamaConfig:
        """Return the model's configuration; raise ConfigError if it contradicts `start`, the
        configuration of the checkpoint `source`."""
        changes = {field.name: getattr(self, field.name) for field in fields(self)}
        del changes["size"]
        # Shorter rows do not reduce a model's context.
        context = 0 if start is None else start.max_sequence_length
        changes["max_sequence_length"] = max(sequence_length, context)
        base = size(self.size) if self.size else start
        if base is None:
            raise ConfigError("model.size is empty and there is no --init; set one of them")
        if self.size and (self.hidden_size or self.num_heads):  # the rest of attention follows
            heads = self.num_heads or base.num_heads
            head_dim = (self.hidden_size or base.hidden_size) // heads
            changes["head_dim"] = self.head_dim or head_dim
            changes["num_kv_heads"] = self.num_kv_heads or heads
        config = override(base, **changes)
        if start is None:
            return config
        # Settings of a checkpoint that a size does not have.
        config = replace(config, rope_scaling=start.rope_scaling, biases=start.biases)
        if self.vision is None:  # a size has no vision vocabulary
            config = override(config, vision=start.vision)
        elif start.vision is None:
            raise ConfigError(
                f"--init {source} is a text model and this run trains a vision-language model; "
                f"add vision with 'lwm convert {source} DEST --add-vision', and use --init DEST"
            )
        else:
            require_equal(source, start.vision, self.vision, prefix="vision.")
        remedy = "choose its --model.size, or --model.size '' to take its own"
        require_equal(source, start, config, remedy=remedy)
        return override(
            config,
            rope_theta=self.rope_theta or start.rope_theta,
            rms_norm_eps=self.rms_norm_eps or start.rms_norm_eps,
        )


def require_equal(init: str, saved: Any, asked: Any, prefix: str = "", remedy: str = "") -> None:
    """Refuse a model that differs from the one to start from, where a run cannot change it."""
    for field in fields(saved):
        has, other = getattr(saved, field.name), getattr(asked, field.name)
        if field.compare and field.name not in _FREE and has != other:
            name = prefix + field.name
            remedy = remedy or f"add --model.{name.replace('_', '-')} {has}"
            raise ConfigError(
                f"--init {init} has {name} {has}, but this run has {other}; {remedy}"
            )


@dataclass(frozen=True, kw_only=True)
class RunSettings(Checked):
    """Hold the settings that every training run has."""

    out: Path = Path()
    """Directory for checkpoints and metrics; defaults to runs/RECIPE."""
    init: str = ""
    fresh: bool = False
    """Start from the beginning, and move aside a run that is in the directory already."""
    batch_size: Annotated[int, Ge(1)] = 8
    """Rows of a step, over all devices and microbatches."""
    mesh: str = "1,-1,1,1"
    """Devices along data,fsdp,tensor,sequence; -1 takes the devices that are left."""
    seed: int = 0
    """Seed of the random weights; the data has another."""
    loop: Annotated[LoopConfig, tyro.conf.OmitArgPrefixes] = LoopConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()


@dataclass(frozen=True, kw_only=True)
class TrainingRun(RunSettings):
    """Hold the settings of a run that trains a language model, with or without vision."""

    init: str = ""
    """MODEL to start from; random weights by default."""
    tokenizer: str = ""
    """Tokenizer file or directory; defaults to the tokenizer of --init, or to one trained on the
    data."""
    vqgan: str = ""
    """VQGAN that produced the data's codes, saved with the run; defaults to the one of --init."""
    sequence_length: Annotated[int, Ge(2)] = 1024
    """Tokens per row."""
    accumulate: Annotated[int, Ge(1)] = 1
    """Microbatches that a step is split into, to save memory."""
    model: ModelSettings = ModelSettings()
    data: DataConfig = DataConfig()
    compute: ComputeConfig = ComputeConfig()
    lora: LoraConfig = LoraConfig()
    distributed: DistributedConfig = DistributedConfig()


@dataclass(frozen=True, kw_only=True)
class VqganRun(RunSettings):
    """Hold the settings of a run that trains a VQGAN."""

    init: str = ""
    """VQGAN to start from: a directory, a run, or the original's pickle of the same size; random
    weights by default."""
    example_size: Annotated[int, Ge(0)] = 0
    """Height and width of training examples; 0 takes model.image_size. Smaller examples cost less,
    because the model is the same at every place."""
    batch_size: Annotated[int, Ge(1)] = 16
    """Images per step, over all devices."""
    model: VQGANConfig = VQGANConfig()
    data: ImageDataConfig = ImageDataConfig()
    codebook: CodebookConfig = CodebookConfig()
    reconstruction: ReconstructionConfig = ReconstructionConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.side
        if size % self.model.downsampling or size < WINDOW:
            raise ConfigError(
                f"example_size is {size}; it must be a multiple of {self.model.downsampling}, the "
                f"model's downsampling, and at least {WINDOW} for SSIM"
            )
        if size > self.data.source_size:
            raise ConfigError(
                f"example_size is {size}; data.source_size ({self.data.source_size}) must not be "
                "smaller"
            )
        if self.loop.evaluate_every and not self.data.held_out:
            raise ConfigError(
                f"evaluate_every is {self.loop.evaluate_every} but nothing is held out; name "
                "files with --data.held-out, or set --evaluate-every 0"
            )

    @property
    def side(self) -> int:
        """Return the height and width of the training examples."""
        return self.example_size or self.model.image_size
