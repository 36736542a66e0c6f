"""Define recipes for small machines, and for fine-tuning on chats."""

from lwm.data.config import DataConfig
from lwm.models.vision_tokens import VisionVocabulary
from lwm.recipes.catalogue.paper import VISION_DATA
from lwm.recipes.settings import ModelSettings, TrainingRun
from lwm.training.checkpointing import CheckpointConfig
from lwm.training.loop import LoopConfig
from lwm.training.optimizer import OptimizerConfig
from lwm.training.step import ComputeConfig


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
        model=ModelSettings(
            size="debug",
            vocab_size=2048,
            hidden_size=192,
            intermediate_size=512,
            num_layers=3,
            num_heads=3,
            num_kv_heads=1,
            tie_embeddings=True,
        ),
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
        model=ModelSettings(
            size="debug",
            vocab_size=2048,
            hidden_size=192,
            intermediate_size=512,
            num_layers=3,
            num_heads=3,
            num_kv_heads=1,
            vision=VisionVocabulary(),
        ),
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
