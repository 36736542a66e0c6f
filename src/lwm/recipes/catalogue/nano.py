"""Define the stages of `nano`, a world model that two cores train; `docs/nano.md` runs them.

Each stage reads what `lwm data world` wrote under `runs/nano`, and starts from the one before it.
"""

from dataclasses import replace

from lwm.attention.api import AttentionConfig
from lwm.data.config import DataConfig, DataSet
from lwm.data.images import ImageDataConfig
from lwm.models.vision_tokens import VisionVocabulary
from lwm.models.vqgan import VQGANConfig
from lwm.recipes.settings import ModelSettings, TrainingRun, VqganRun
from lwm.training.checkpointing import CheckpointConfig
from lwm.training.loop import LoopConfig
from lwm.training.optimizer import OptimizerConfig
from lwm.training.text import ComputeConfig
from lwm.training.vqgan import ReconstructionConfig

_FILES = "runs/nano"
_MODEL = ModelSettings(
    size="debug",
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=640,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    tie_embeddings=True,
)
# Guidance by 5 ruins what this small model draws, and so do codes that are nearly impossible.
_VISION = VisionVocabulary(size=2176, codes=1920, codes_per_frame=64, guidance=1.0, min_p=0.1)


def nano_vqgan() -> VqganRun:
    """Train the VQGAN of nano: 64 x 64 pixels as 8 x 8 codes, on pictures of the world."""
    return VqganRun(
        model=VQGANConfig(
            image_size=64,
            patch_size=4,
            local_encoder=True,
            hidden_channels=64,
            channel_multipliers=(1, 2),
            residual_blocks=2,
            latent_channels=32,
            scalar_levels=(8, 8, 6, 5),
            codebook_size=1920,
            code_channels=4,
            norm_groups=8,
        ),
        batch_size=32,
        mesh="1,1,1,1",
        loop=LoopConfig(steps=5000, evaluate_every=500, evaluation_batches=8),
        data=ImageDataConfig(
            path=f"{_FILES}/pictures", held_out=("held-out-*",), source_size=64, smallest=1.0,
            colors=0.0,
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, final_learning_rate=5e-5, warmup_steps=100, beta2=0.99,
            weight_decay=0.01,
        ),
        reconstruction=ReconstructionConfig(absolute=1.0, squared=5.0),
        checkpoint=CheckpointConfig(every=500),
    )  # fmt: skip


def _stage(
    *,
    length: int,
    rows: int,
    steps: int,
    theta: float,
    rate: float,
    data: DataConfig,
    init: str = "",
    vision: VisionVocabulary | None = None,
    block: int = 512,
) -> TrainingRun:
    return TrainingRun(
        model=replace(_MODEL, rope_theta=theta, vision=vision),
        init=init and f"{_FILES}/{init}",
        tokenizer="" if init else f"{_FILES}/tokenizer",
        sequence_length=length,
        batch_size=rows,
        mesh="1,1,1,1",
        loop=LoopConfig(steps=steps),
        data=data,
        optimizer=OptimizerConfig(
            method="muon", learning_rate=rate, final_learning_rate=rate / 20,
            warmup_steps=min(steps // 10, 100),
        ),
        # In rows of many short examples, smaller blocks skip more of what is masked.
        compute=ComputeConfig(
            remat="none", attention=AttentionConfig(query_block=block, key_block=block)
        ),
        checkpoint=CheckpointConfig(every=steps // 10),
    )  # fmt: skip


def _texts(name: str) -> DataConfig:
    return DataConfig(path=f"{_FILES}/{name}*.jsonl", fields_from_example="fields", packing="pack")


def nano_lists() -> TrainingRun:
    """Train nano to copy: lists to repeat, in rows of 96 tokens, theta 1e4."""
    return _stage(length=96, rows=32, steps=450, theta=1e4, rate=2.5e-3, data=_texts("lists-96"))


def nano_text() -> TrainingRun:
    """Teach nano to find facts in short texts: 256 tokens."""
    return _stage(
        length=256, rows=12, steps=2400, theta=1e4, rate=1.5e-3, data=_texts("texts-256"),
        init="lists",
    )  # fmt: skip


def nano_text_2k() -> TrainingRun:
    """Extend nano to 2K tokens, theta 1e5."""
    return _stage(
        length=2048, rows=4, steps=250, theta=1e5, rate=1e-3, data=_texts("texts-2k"), init="text"
    )


def nano_text_8k() -> TrainingRun:
    """Extend nano to 8K tokens, theta 5e5."""
    return _stage(
        length=8192, rows=1, steps=80, theta=5e5, rate=5e-4, data=_texts("texts-8k"),
        init="text-2k",
    )  # fmt: skip


def nano_text_32k() -> TrainingRun:
    """Extend nano to 32K tokens, theta 2e6."""
    return _stage(
        length=32768, rows=1, steps=12, theta=2e6, rate=5e-4, data=_texts("texts-32k"),
        init="text-8k",
    )  # fmt: skip


def _vision_data(**weights: float) -> DataConfig:
    mixture = {
        name.replace("_", "-"): DataSet(
            weight=weight, path=f"{_FILES}/{name.replace('_', '-')}*.jsonl"
        )
        for name, weight in weights.items()
    }
    return DataConfig(
        mixture=mixture, fields_from_example="fields", packing="pack", loss_weights="halves",
        drop_prompt=0.1,
    )  # fmt: skip


def nano_images() -> TrainingRun:
    """Teach nano, with vision tokens added after its texts, to draw and to see images."""
    return _stage(
        length=1024, rows=8, steps=1200, theta=2e6, rate=2e-3, init="text-vision", vision=_VISION,
        block=128,
        data=_vision_data(images=0.9, texts_256=0.1),
    )  # fmt: skip


def nano_videos() -> TrainingRun:
    """Teach nano videos of 8 frames."""
    return _stage(
        length=2048, rows=4, steps=2600, theta=2e6, rate=2e-3, init="images", vision=_VISION,
        block=128,
        data=_vision_data(images=0.25, videos=0.62, texts_256=0.1, texts_2k=0.03),
    )  # fmt: skip


def nano_chat() -> TrainingRun:
    """Join what nano has learned in rows of 16K tokens, with videos of 16 frames."""
    return _stage(
        length=16384, rows=1, steps=90, theta=2e6, rate=5e-4, init="videos", vision=_VISION,
        data=_vision_data(
            images=0.25, videos=0.3, long_videos=0.2, texts_2k=0.2, texts_16k=0.05
        ),
    )  # fmt: skip
