"""What a training run is: one typed value, made by a recipe and changed from the command line.

Each part belongs to the room that uses it; only `assemble` sees the whole.
"""

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
class RunSettings(Checked):
    """Hold the settings that every training run has."""

    out: Path = Path()
    """Directory for checkpoints and metrics; defaults to runs/RECIPE."""
    init: str = ""
    """What to start from; random weights by default."""
    fresh: bool = False
    """Start from the beginning, and move aside a run that is in the directory already."""
    batch_size: Annotated[int, Ge(1)] = 8
    """Rows of a step, over all devices and microbatches."""
    mesh: str = "1,-1,1,1"
    """Devices along data,fsdp,tensor,sequence; -1 takes the devices that are left."""
    seed: int = 0
    """Seed of the random weights; the data has its own."""
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
    mesh: str = "1,-1,1,1"
    """Devices along data,fsdp,tensor,sequence; images are split over the first two."""
    seed: int = 0
    """Seed of the random weights and of revived codebook entries; the data has its own."""
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
