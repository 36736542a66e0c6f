"""What a run that trains a VQGAN is: one typed value, made by a recipe and changed from the
command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lwm.core.errors import ConfigError
from lwm.data.pictures import PictureDataConfig
from lwm.models.likeness import WINDOW
from lwm.models.vqgan import VQGANConfig
from lwm.training.checkpointing import CheckpointConfig
from lwm.training.loop import LoopConfig
from lwm.training.metrics import TrackingConfig
from lwm.training.optimizer import OptimizerConfig
from lwm.training.vqgan.codebook import CodebookConfig
from lwm.training.vqgan.step import ReconstructionConfig


@dataclass(frozen=True, kw_only=True)
class PictureRun:
    """One run that trains a VQGAN, complete."""

    out: Path = Path()
    """Directory of checkpoints and figures; runs/RECIPE unless given."""
    init: str = ""
    """VQGAN to start from (a directory, a run, or the original's pickle of its own size); random
    weights unless given."""
    fresh: bool = False
    """Start anew where the directory holds a run already, which is moved aside."""
    example_size: int = 0
    """Side of the pictures that are learnt from; model.image_size unless given. Smaller ones cost
    less, since the model is the same at every place."""
    batch_size: int = 16
    """Pictures of a step, over all devices."""
    mesh: str = "1,-1,1,1"
    """Devices along data,fsdp,tensor,sequence; pictures are spread over the first two."""
    seed: int = 0
    """Of the random weights and of revived entries; the data has its own."""
    loop: Annotated[LoopConfig, tyro.conf.OmitArgPrefixes] = LoopConfig()
    model: VQGANConfig = VQGANConfig()
    data: PictureDataConfig = PictureDataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    codebook: CodebookConfig = CodebookConfig()
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; it must be at least 1")
        size = self.side
        if size % self.model.downsampling or size < WINDOW:
            raise ConfigError(
                f"example_size is {size}; it must be a multiple of {self.model.downsampling}, by "
                f"which the model shrinks, and at least {WINDOW} for SSIM"
            )
        if size > self.data.source_size:
            raise ConfigError(
                f"example_size is {size}, more than data.source_size "
                f"({self.data.source_size}); raise the latter"
            )
        if self.loop.evaluate_every and not self.data.held_out:
            raise ConfigError(
                f"evaluate_every is {self.loop.evaluate_every} but nothing is held out; name "
                "files with --data.held-out, or give --evaluate-every 0"
            )

    @property
    def side(self) -> int:
        """Of the examples."""
        return self.example_size or self.model.image_size
