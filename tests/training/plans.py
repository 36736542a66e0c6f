"""A tiny model, random packed batches, and plans over them, shared by this room's tests."""

from dataclasses import replace
from typing import Any

import numpy as np

from lwm.core.mesh import make_mesh
from lwm.models.llama import LlamaConfig
from lwm.models.lora import LoraConfig
from lwm.training.batches import Layout
from lwm.training.optimizer import OptimizerConfig
from lwm.training.plan import Plan
from lwm.training.step import ComputeConfig

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
    num_kv_heads=4, head_dim=8, max_sequence_length=64,
)  # fmt: skip
ROWS, LENGTH = 8, 64


def plan(mesh: str = "1,1,1,1", **changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "config": CONFIG,
        "mesh": make_mesh(mesh),
        "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        "compute": ComputeConfig(loss_chunk=48),
        "lora": LoraConfig(),
        "steps": 20,
    }
    return Plan(**(settings | changes))


def layout(chosen: Plan, micro: int = 1) -> Layout:
    return Layout(chosen.mesh, ROWS, micro, LENGTH)


def packed_rows(seed: int, rows: int = ROWS, length: int = LENGTH) -> dict[str, np.ndarray]:
    """Rows of random segments, positions starting anew in each, padding at the end of some."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, CONFIG.vocab_size, (rows, length + 1), dtype=np.int32)
    segments = np.sort(random.integers(0, 3, (rows, length)), axis=1).astype(np.int32)
    segments[::3, -7:] = -1
    starts = np.diff(segments, axis=1, prepend=-9) != 0
    index = np.broadcast_to(np.arange(length), (rows, length))
    first = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    weights = random.random((rows, length)) * (random.random((rows, length)) < 0.7)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.where(segments >= 0, weights, 0.0).astype(np.float32),
        "positions": (index - first).astype(np.int32),
        "segments": segments,
    }


def trajectory(chosen: Plan, *, micro: int = 1, steps: int = 6) -> np.ndarray:
    """Loss and gradient norm of each step on the same global batches."""
    state, step, laid = chosen.first_state(None, seed=0), chosen.step(), layout(chosen, micro)
    found = []
    for number in range(steps):
        rows = {name: x[laid.rows] for name, x in packed_rows(number).items()}
        state, figures = step(state, None, laid.place(rows))
        found.append([float(figures.loss), float(figures.gradient_norm)])
    return np.array(found)


def tied() -> LlamaConfig:
    return replace(CONFIG, tie_embeddings=True, num_kv_heads=2)
