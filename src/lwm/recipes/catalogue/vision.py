"""The paper's vision stages: text, pictures and videos in one model, the context ever longer.

Source: LargeWorldModel paper (arXiv 2402.08268), section 4 and the tables of appendix F: 8M tokens
a batch, theta 5e7, cosine, TPU v4-1024. The paper drops prompts for classifier-free guidance
without saying how often; one in ten is usual (Ho & Salimans 2022, arXiv 2207.12598).
"""

from lwm.data.config import DataConfig, DataSet
from lwm.models.vision_tokens import VisionVocabulary
from lwm.recipes.settings import ModelSettings, TrainingRun
from lwm.training.checkpointing import CheckpointConfig
from lwm.training.loop import LoopConfig
from lwm.training.optimizer import OptimizerConfig
from lwm.training.step import ComputeConfig

BATCH_TOKENS = 8 << 20
DROP_PROMPT = 0.1
FRAMES = 30
"""Of a video in the second stage."""

_OWN_FIELDS = "fields"
"""Key under which an example that holds vision brings its own fields, or alternatives of them."""


def _mixture(text: float, *kinds: str) -> dict[str, DataSet]:
    """The kinds in equal parts, and a share of pure text."""
    share = (1 - text) / len(kinds)
    seen = {kind: DataSet(weight=share) for kind in kinds}
    return seen | {"text": DataSet(weight=text, fields="text")} if text else seen


def _chats() -> dict[str, DataSet]:
    return _mixture(0.0, "text-image", "image-text", "text-video", "video-text")


def _stage(
    *,
    length: int,
    steps: int,
    warmup: int,
    rates: tuple[float, float],
    mesh: str,
    mixture: dict[str, DataSet],
    max_frames: int = 0,
) -> TrainingRun:
    highest, lowest = rates
    return TrainingRun(
        model=ModelSettings(size="7b", rope_theta=5e7, vision=VisionVocabulary()),
        sequence_length=length,
        batch_size=BATCH_TOKENS // length,
        mesh=mesh,
        loop=LoopConfig(steps=steps),
        data=DataConfig(
            mixture=mixture,
            fields_from_example=_OWN_FIELDS,
            packing="pack",
            loss_weights="halves",
            drop_prompt=DROP_PROMPT,
            max_frames=max_frames,
        ),
        optimizer=OptimizerConfig(
            learning_rate=highest,
            final_learning_rate=lowest,
            schedule="cosine",
            warmup_steps=warmup,
            weight_decay=0.1,
        ),
        compute=ComputeConfig(remat="full"),
        checkpoint=CheckpointConfig(every=50),
    )


def vision_debug() -> TrainingRun:
    """A small model of text, pictures and videos, for two cores: --data.path examples.jsonl."""
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
        data=DataConfig(
            fields_from_example=_OWN_FIELDS,
            packing="pack",
            loss_weights="halves",
            drop_prompt=DROP_PROMPT,
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, final_learning_rate=3e-4, warmup_steps=10, weight_decay=0.1
        ),
        checkpoint=CheckpointConfig(every=50),
    )


def vision_1k() -> TrainingRun:
    """The paper's first vision stage: 7B, 1K tokens, pictures; --init text-1m that sees."""
    return _stage(
        length=1 << 10,
        steps=45_000,
        warmup=1000,
        rates=(6e-4, 6e-5),
        mesh="1,-1,1,1",
        mixture=_mixture(0.16, "text-image", "image-text"),
    )


def vision_8k() -> TrainingRun:
    """The second: 8K tokens, videos of 30 frames, 14,000 steps; --init the result of vision-1k."""
    return _stage(
        length=8 << 10,
        steps=14_000,
        warmup=500,
        rates=(6e-4, 6e-5),
        mesh="1,-1,1,1",
        mixture=_mixture(0.16, "text-video", "video-text"),
        max_frames=FRAMES,
    )


def vision_32k() -> TrainingRun:
    """The third: 32K tokens, chats of four kinds, 1,200 steps; --init the result of vision-8k."""
    return _stage(
        length=32 << 10,
        steps=1200,
        warmup=100,
        rates=(8e-5, 8e-5),
        mesh="1,-1,4,1",
        mixture=_chats(),
    )


def vision_128k() -> TrainingRun:
    """The fourth: 128K tokens, chats of four kinds, 450 steps; --init the result of vision-32k."""
    return _stage(
        length=128 << 10,
        steps=450,
        warmup=50,
        rates=(8e-5, 8e-5),
        mesh="1,-1,8,1",
        mixture=_chats(),
    )


def vision_1m() -> TrainingRun:
    """The fifth: 1M tokens, chats of four kinds, 50 steps; --init the result of vision-128k."""
    return _stage(
        length=1 << 20,
        steps=50,
        warmup=5,
        rates=(8e-5, 8e-5),
        mesh="1,-1,16,4",
        mixture=_chats(),
    )
