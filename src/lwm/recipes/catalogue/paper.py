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
from lwm.training.text import ComputeConfig

_TEXT_BATCH, _VISION_BATCH = 4 << 20, 8 << 20
_IMAGES, _VIDEOS = ("text-image", "image-text"), ("text-video", "video-text")
VISION_DATA = DataConfig(
    fields_from_example="fields",  # examples name their own fields, or alternatives of them
    packing="pack",
    loss_weights="halves",
    drop_prompt=0.1,
)


_COMPUTE, _CHECKPOINT = ComputeConfig(remat="full"), CheckpointConfig(every=50)


def _text_stage(*, length: int, theta: float, steps: int, warmup: int, mesh: str) -> TrainingRun:
    return TrainingRun(
        model=ModelSettings(size="7b", rope_theta=theta),
        sequence_length=length,
        batch_size=_TEXT_BATCH // length,
        mesh=mesh,
        loop=LoopConfig(steps=steps),
        data=DataConfig(packing="concatenate", loss_weights="example"),
        optimizer=OptimizerConfig(
            learning_rate=4e-5, schedule="constant", warmup_steps=warmup, weight_decay=0.1
        ),
        compute=_COMPUTE,
        checkpoint=_CHECKPOINT,
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


def _vision_data(*kinds: str, text: float = 0.0, max_frames: int = 0) -> DataConfig:
    """Mix the kinds of data in equal parts, with a share of pure text."""
    mixture = {kind: DataSet(weight=(1 - text) / len(kinds)) for kind in kinds}
    if text:
        mixture["text"] = DataSet(weight=text, fields="text")
    return replace(VISION_DATA, mixture=mixture, max_frames=max_frames)


def _vision_stage(
    *,
    length: int,
    steps: int,
    warmup: int,
    rates: tuple[float, float],
    mesh: str,
    data: DataConfig,
) -> TrainingRun:
    highest, final = rates
    return TrainingRun(
        model=ModelSettings(size="7b", rope_theta=5e7, vision=VisionVocabulary()),
        sequence_length=length,
        batch_size=_VISION_BATCH // length,
        mesh=mesh,
        loop=LoopConfig(steps=steps),
        data=data,
        optimizer=OptimizerConfig(
            learning_rate=highest, final_learning_rate=final, warmup_steps=warmup, weight_decay=0.1
        ),
        compute=_COMPUTE,
        checkpoint=_CHECKPOINT,
    )


def vision_1k() -> TrainingRun:
    """Train the paper's vision stage 1: 7B, 1K tokens, images; --init text-1m with vision."""
    data, rates = _vision_data(*_IMAGES, text=0.16), (6e-4, 6e-5)
    return _vision_stage(
        length=1 << 10, steps=45_000, warmup=1000, rates=rates, mesh="1,-1,1,1", data=data
    )


def vision_8k() -> TrainingRun:
    """Train vision stage 2: 7B, 8K tokens, videos of 30 frames; --init the result of vision-1k."""
    data, rates = _vision_data(*_VIDEOS, text=0.16, max_frames=30), (6e-4, 6e-5)
    return _vision_stage(
        length=8 << 10, steps=14_000, warmup=500, rates=rates, mesh="1,-1,1,1", data=data
    )


def _chat_stage(*, length: int, steps: int, warmup: int, mesh: str) -> TrainingRun:
    data, rates = _vision_data(*_IMAGES, *_VIDEOS), (8e-5, 8e-5)
    return _vision_stage(
        length=length, steps=steps, warmup=warmup, rates=rates, mesh=mesh, data=data
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
