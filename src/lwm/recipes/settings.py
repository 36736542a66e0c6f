"""Define the settings of a training run, which a recipe makes and the command line changes."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

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
from lwm.training.step import ComputeConfig
from lwm.training.vqgan.codebook import CodebookConfig
from lwm.training.vqgan.training import ReconstructionConfig


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Set the model to train: a size by name, and what differs from it."""

    size: str = ""
    """A size: debug, 200m, 1b, 3b, 7b, 13b, 30b, 65b; empty for that of --init."""
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
    """Vision vocabulary; defaults to that of --init, or none."""

    def resolve(self, sequence_length: int, start: LlamaConfig | None, source: str) -> LlamaConfig:
        """Return the model's configuration, or raise ConfigError if it contradicts the start.

        Args:
            start: the configuration of the checkpoint `source` to start from, or None.
        """
        changes = {field.name: getattr(self, field.name) for field in fields(self)}
        del changes["size"]
        # Shorter rows do not reduce a model's context.
        context = 0 if start is None else start.max_sequence_length
        changes["max_sequence_length"] = max(sequence_length, context)
        if self.size:
            base = size(self.size)
            if self.hidden_size or self.num_heads:  # the rest of attention follows by default
                heads = self.num_heads or base.num_heads
                head_dim = (self.hidden_size or base.hidden_size) // heads
                changes["head_dim"] = self.head_dim or head_dim
                changes["num_kv_heads"] = self.num_kv_heads or heads
        elif start is not None:
            base = start
        else:
            raise ConfigError("model.size is empty and there is no --init; set one of them")
        config = override(base, **changes)
        return config if start is None else self._require_same(config, start, source)

    def _require_same(self, config: LlamaConfig, start: LlamaConfig, source: str) -> LlamaConfig:
        """Refuse to change what a checkpoint's weights depend on; take the rest from it."""
        if self.vision is None:  # a size has no vision vocabulary
            config = override(config, vision=start.vision)
        elif start.vision is None:
            raise ConfigError(
                f"--init {source} is a text model and this run trains a vision-language model; "
                f"add vision with 'lwm convert {source} DEST --add-vision', and use --init DEST"
            )
        else:
            for field in fields(VisionVocabulary):
                has, asked = getattr(start.vision, field.name), getattr(self.vision, field.name)
                if has != asked:
                    raise ConfigError(
                        f"--init {source} has vision.{field.name} {has}, but this run has "
                        f"{asked}; add --model.vision.{field.name.replace('_', '-')} {has}"
                    )
        # A stage may change these, and a size has the original's values for them.
        free = {"max_sequence_length", "rope_theta", "initializer_range", "rms_norm_eps"}
        for field in fields(LlamaConfig):
            has, asked = getattr(start, field.name), getattr(config, field.name)
            if field.name not in free and has != asked:
                raise ConfigError(
                    f"--init {source} has {field.name} {has}, but this run has {asked}; choose "
                    "the --model.size of the checkpoint, or --model.size '' to take its own"
                )
        return override(
            config,
            rope_theta=self.rope_theta or start.rope_theta,
            rms_norm_eps=self.rms_norm_eps or start.rms_norm_eps,
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
    """VQGAN that produced the data's codes, saved with the run; defaults to that of --init."""
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
                f"example_size is {size}, more than data.source_size "
                f"({self.data.source_size}); raise data.source_size"
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
