"""The paper's text stages: 7B on books, the context doubled stage by stage by a larger RoPE theta.

Source: LargeWorldModel paper (arXiv 2402.08268), table 11: 4M tokens a batch, constant learning
rate 4e-5, TPU v4-512.
"""

from lwm.data.config import DataConfig
from lwm.recipes.settings import ModelSettings, TrainingRun
from lwm.training.checkpointing import CheckpointConfig
from lwm.training.loop import LoopConfig
from lwm.training.optimizer import OptimizerConfig
from lwm.training.step import ComputeConfig

BATCH_TOKENS = 4 << 20


def _stage(*, length: int, theta: float, steps: int, warmup: int, mesh: str) -> TrainingRun:
    return TrainingRun(
        model=ModelSettings(size="7b", rope_theta=theta),
        sequence_length=length,
        batch_size=BATCH_TOKENS // length,
        mesh=mesh,
        loop=LoopConfig(steps=steps),
        data=DataConfig(packing="concatenate", loss_weights="example"),
        optimizer=OptimizerConfig(
            learning_rate=4e-5, schedule="constant", warmup_steps=warmup, weight_decay=0.1
        ),
        compute=ComputeConfig(remat="full"),
        checkpoint=CheckpointConfig(every=50),
    )


def text_32k() -> TrainingRun:
    """The paper's first text stage: 7B, 32K tokens, theta 1e6, 1,200 steps; --init Llama 2 7B."""
    return _stage(length=32 << 10, theta=1e6, steps=1200, warmup=100, mesh="1,-1,4,1")


def text_128k() -> TrainingRun:
    """The second: 128K tokens, theta 1e7, 3,000 steps; --init the result of text-32k."""
    return _stage(length=128 << 10, theta=1e7, steps=3000, warmup=200, mesh="1,-1,8,1")


def text_256k() -> TrainingRun:
    """The third: 256K tokens, theta 1e7, 3,000 steps; --init the result of text-128k."""
    return _stage(length=256 << 10, theta=1e7, steps=3000, warmup=200, mesh="1,-1,16,1")


def text_512k() -> TrainingRun:
    """The fourth: 512K tokens, theta 2.5e7, 720 steps; --init the result of text-256k."""
    return _stage(length=512 << 10, theta=2.5e7, steps=720, warmup=50, mesh="1,-1,16,2")


def text_1m() -> TrainingRun:
    """The fifth: 1M tokens, theta 5e7, 450 steps; --init the result of text-512k."""
    return _stage(length=1 << 20, theta=5e7, steps=450, warmup=25, mesh="1,-1,16,4")
