"""Define the paper's stages: 7B on books, then on text, images and videos, at growing length.

Source: LargeWorldModel paper (arXiv 2402.08268): table 11 for text, with 4M tokens per batch and a
constant learning rate of 4e-5; section 4 and the tables of appendix F for vision, with 8M tokens
per batch, theta 5e7 and a cosine schedule. The paper drops prompts for classifier-free guidance
without saying how often; one in ten is usual (Ho & Salimans 2022, arXiv 2207.12598).
"""

from dataclasses import replace

from lwm.data.config import DataConfig, DataSet
from lwm.models.vision_tokens import VisionVocabulary
from lwm.recipes.settings import ModelSettings, TrainingRun
from lwm.training.checkpointing import CheckpointConfig
from lwm.training.loop import LoopConfig
from lwm.training.optimizer import OptimizerConfig
from lwm.training.step import ComputeConfig

_TEXT_BATCH, _VISION_BATCH = 4 << 20, 8 << 20
_FRAMES = 30  # of a video in the second vision stage
VISION_DATA = DataConfig(
    fields_from_example="fields",  # examples name their own fields, or alternatives of them
    packing="pack",
    loss_weights="halves",
    drop_prompt=0.1,
)


def _stage(
    *,
    model: ModelSettings,
    length: int,
    batch: int,
    mesh: str,
    steps: int,
    data: DataConfig,
    optimizer: OptimizerConfig,
) -> TrainingRun:
    return TrainingRun(
        model=model,
        sequence_length=length,
        batch_size=batch // length,
        mesh=mesh,
        loop=LoopConfig(steps=steps),
        data=data,
        optimizer=optimizer,
        compute=ComputeConfig(remat="full"),
        checkpoint=CheckpointConfig(every=50),
    )


def _text_stage(*, length: int, theta: float, steps: int, warmup: int, mesh: str) -> TrainingRun:
    return _stage(
        model=ModelSettings(size="7b", rope_theta=theta),
        length=length,
        batch=_TEXT_BATCH,
        mesh=mesh,
        steps=steps,
        data=DataConfig(packing="concatenate", loss_weights="example"),
        optimizer=OptimizerConfig(
            learning_rate=4e-5, schedule="constant", warmup_steps=warmup, weight_decay=0.1
        ),
    )


def text_32k() -> TrainingRun:
    """Train the paper's text stage 1: 7B, 32K tokens, theta 1e6; --init Llama 2 7B."""
    return _text_stage(length=32 << 10, theta=1e6, steps=1200, warmup=100, mesh="1,-1,4,1")


def text_128k() -> TrainingRun:
    """Train text stage 2: 7B, 128K tokens, theta 1e7; --init the result of text-32k."""
    return _text_stage(length=128 << 10, theta=1e7, steps=3000, warmup=200, mesh="1,-1,8,1")


def text_256k() -> TrainingRun:
    """Train text stage 3: 7B, 256K tokens, theta 1e7; --init the result of text-128k."""
    return _text_stage(length=256 << 10, theta=1e7, steps=3000, warmup=200, mesh="1,-1,16,1")


def text_512k() -> TrainingRun:
    """Train text stage 4: 7B, 512K tokens, theta 2.5e7; --init the result of text-256k."""
    return _text_stage(length=512 << 10, theta=2.5e7, steps=720, warmup=50, mesh="1,-1,16,2")


def text_1m() -> TrainingRun:
    """Train text stage 5: 7B, 1M tokens, theta 5e7; --init the result of text-512k."""
    return _text_stage(length=1 << 20, theta=5e7, steps=450, warmup=25, mesh="1,-1,16,4")


def _vision_stage(
    *,
    length: int,
    steps: int,
    warmup: int,
    rates: tuple[float, float],
    mesh: str,
    kinds: tuple[str, ...],
    text: float = 0.0,
    max_frames: int = 0,
) -> TrainingRun:
    """Mix the kinds of data in equal parts, with a share of pure text."""
    mixture = {kind: DataSet(weight=(1 - text) / len(kinds)) for kind in kinds}
    if text:
        mixture["text"] = DataSet(weight=text, fields="text")
    return _stage(
        model=ModelSettings(size="7b", rope_theta=5e7, vision=VisionVocabulary()),
        length=length,
        batch=_VISION_BATCH,
        mesh=mesh,
        steps=steps,
        data=replace(VISION_DATA, mixture=mixture, max_frames=max_frames),
        optimizer=OptimizerConfig(
            learning_rate=rates[0],
            final_learning_rate=rates[1],
            warmup_steps=warmup,
            weight_decay=0.1,
        ),
    )


def vision_1k() -> TrainingRun:
    """Train the paper's vision stage 1: 7B, 1K tokens, images; --init text-1m with vision."""
    return _vision_stage(
        length=1 << 10,
        steps=45_000,
        warmup=1000,
        rates=(6e-4, 6e-5),
        mesh="1,-1,1,1",
        kinds=("text-image", "image-text"),
        text=0.16,
    )


def vision_8k() -> TrainingRun:
    """Train vision stage 2: 7B, 8K tokens, videos of 30 frames; --init the result of vision-1k."""
    return _vision_stage(
        length=8 << 10,
        steps=14_000,
        warmup=500,
        rates=(6e-4, 6e-5),
        mesh="1,-1,1,1",
        kinds=("text-video", "video-text"),
        text=0.16,
        max_frames=_FRAMES,
    )


def _chat_stage(*, length: int, steps: int, warmup: int, mesh: str) -> TrainingRun:
    kinds = ("text-image", "image-text", "text-video", "video-text")
    return _vision_stage(
        length=length, steps=steps, warmup=warmup, rates=(8e-5, 8e-5), mesh=mesh, kinds=kinds
    )


def vision_32k() -> TrainingRun:
    """Train vision stage 3: 7B, 32K tokens, chats; --init the result of vision-8k."""
    return _chat_stage(length=32 << 10, steps=1200, warmup=100, mesh="1,-1,4,1")


def vision_128k() -> TrainingRun:
    """Train vision stage 4: 7B, 128K tokens, chats; --init the result of vision-32k."""
    return _chat_stage(length=128 << 10, steps=450, warmup=50, mesh="1,-1,8,1")


def vision_1m() -> TrainingRun:
    """Train vision stage 5: 7B, 1M tokens, chats; --init the result of vision-128k."""
    return _chat_stage(length=1 << 20, steps=50, warmup=5, mesh="1,-1,16,4")
