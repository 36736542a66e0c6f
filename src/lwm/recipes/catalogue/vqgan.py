"""Define recipes that train a VQGAN: one for two cores, and one of the original's size."""

from lwm.data.images import ImageDataConfig
from lwm.models.vqgan import VQGANConfig
from lwm.recipes.settings import VqganRun
from lwm.training.checkpointing import CheckpointConfig
from lwm.training.loop import LoopConfig
from lwm.training.optimizer import OptimizerConfig
from lwm.training.vqgan.training import ReconstructionConfig

HELD_OUT = ("camera.png", "chelsea.png", "china.jpg", "coffee.png", "rocket.jpg", "carphone*")
"""Files of `lwm[pictures]` to hold out: five photographs, and both versions of a video."""


def vqgan_64() -> VqganRun:
    """Train a VQGAN of 64 x 64 pixels as 16 x 16 codes of 1,024, on photographs and videos."""
    return VqganRun(
        model=VQGANConfig(
            image_size=64,
            hidden_channels=16,
            channel_multipliers=(1, 2, 3),
            residual_blocks=1,
            latent_channels=16,
            codebook_size=1024,
            code_channels=8,
            norm_groups=4,
        ),
        example_size=32,
        batch_size=8,
        mesh="1,1,1,1",
        loop=LoopConfig(steps=4000, evaluate_every=250, evaluation_batches=16),
        data=ImageDataConfig(path="pictures", held_out=HELD_OUT),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, final_learning_rate=1e-4, warmup_steps=20, beta2=0.99,
            weight_decay=0.01,
        ),
        reconstruction=ReconstructionConfig(absolute=1.0, squared=5.0),
        checkpoint=CheckpointConfig(every=250),
    )  # fmt: skip


def vqgan_256() -> VqganRun:
    """Train the original's size, 256 x 256 pixels as 256 codes of 8,192: --data.path IMAGES."""
    return VqganRun(
        batch_size=64,
        loop=LoopConfig(steps=100_000),
        data=ImageDataConfig(source_size=320, smallest=0.5, colors=0.0),
        optimizer=OptimizerConfig(
            learning_rate=2e-4, warmup_steps=1000, beta2=0.99, weight_decay=0.01
        ),
        reconstruction=ReconstructionConfig(structure=0.1),
        checkpoint=CheckpointConfig(every=1000),
    )
