"""Define recipes for small machines, for fine-tuning on chats, and for VQGANs."""

from dataclasses import replace

from lwm.data.config import DataConfig
from lwm.data.images import ImageDataConfig
from lwm.models.vision_tokens import VisionVocabulary
from lwm.models.vqgan import VQGANConfig
from lwm.recipes.catalogue.paper import VISION_DATA
from lwm.recipes.settings import ModelSettings, TrainingRun, VqganRun
from lwm.training.checkpointing import CheckpointConfig
from lwm.training.loop import LoopConfig
from lwm.training.optimizer import OptimizerConfig
from lwm.training.text import ComputeConfig
from lwm.training.vqgan import ReconstructionConfig

_SMALL = ModelSettings(
    size="debug",
    vocab_size=2048,
    hidden_size=192,
    intermediate_size=512,
    num_layers=3,
    num_heads=3,
    num_kv_heads=1,
)
HELD_OUT = ("camera.png", "chelsea.png", "china.jpg", "coffee.png", "rocket.jpg", "carphone*")
"""Files of `lwm[pictures]` to hold out: five photographs, and both versions of a video."""


def debug() -> TrainingRun:
    """Check that everything runs: the original's debug size on any text, a few steps."""
    return TrainingRun(
        model=ModelSettings(size="debug"),
        sequence_length=512,
        batch_size=4,
        mesh="1,1,1,1",
        loop=LoopConfig(steps=20),
        data=DataConfig(path="book"),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=5),
        checkpoint=CheckpointConfig(every=10),
    )


def book() -> TrainingRun:
    """Train a small model of the King James Bible, in minutes on two cores."""
    return TrainingRun(
        model=replace(_SMALL, tie_embeddings=True),
        sequence_length=1024,
        batch_size=1,
        mesh="1,1,1,1",
        loop=LoopConfig(steps=1200, evaluate_every=200),
        data=DataConfig(path="book", held_out=0.1),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, final_learning_rate=1e-4, warmup_steps=50, weight_decay=0.1
        ),
        compute=ComputeConfig(remat="none"),
        checkpoint=CheckpointConfig(every=200),
    )


def chat_tuning() -> TrainingRun:
    """Fine-tune any MODEL on your own chats: --init MODEL --data.path chats.jsonl."""
    return TrainingRun(
        init="smollm2",
        sequence_length=1024,
        batch_size=4,
        mesh="1,1,1,1",
        loop=LoopConfig(steps=100),
        data=DataConfig(messages="messages", packing="pack"),
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=10),
        checkpoint=CheckpointConfig(every=50),
    )


def vision_debug() -> TrainingRun:
    """Train a small model on text, images and videos, on two cores: --data.path examples.jsonl."""
    return TrainingRun(
        model=replace(_SMALL, vision=VisionVocabulary()),
        sequence_length=1024,
        batch_size=2,
        mesh="1,1,1,1",
        loop=LoopConfig(steps=100),
        data=VISION_DATA,
        optimizer=OptimizerConfig(
            learning_rate=3e-3, final_learning_rate=3e-4, warmup_steps=10, weight_decay=0.1
        ),
        checkpoint=CheckpointConfig(every=50),
    )


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
