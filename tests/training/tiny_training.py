"""Share a tiny model, random packed batches, and trainings of it among the tests of training."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from lwm.core.mesh import make_mesh
from lwm.models.llama import LlamaConfig
from lwm.training.batches import Batch, BatchLayout
from lwm.training.optimizer import OptimizerConfig
from lwm.training.text import ComputeConfig, TextTraining

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
    num_kv_heads=4, head_dim=8, max_sequence_length=64,
)  # fmt: skip
TIED = replace(CONFIG, tie_embeddings=True, num_kv_heads=2)
ROWS, LENGTH = 8, 64


def tiny_training(
    mesh: str = "1,1,1,1",
    *,
    rows: int = ROWS,
    micro: int = 1,
    length: int = LENGTH,
    **changes: Any,
) -> TextTraining:
    devices = make_mesh(mesh)
    settings: dict[str, Any] = {
        "config": CONFIG,
        "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        "compute": ComputeConfig(loss_chunk=48),
        "steps": 20,
    }
    layout = BatchLayout(devices, rows, micro, length)
    return TextTraining(mesh=devices, layout=layout, **(settings | changes))


def abstract_batch(layout: BatchLayout) -> Any:
    ids, weights = (
        jax.ShapeDtypeStruct(layout.shape, dtype, sharding=layout.sharding)
        for dtype in ("int32", "float32")
    )
    arrays: Any = dict.fromkeys(Batch.__dataclass_fields__, ids) | {"weights": weights}
    return Batch(**arrays)


def packed_rows(seed: int, rows: int = ROWS, length: int = LENGTH) -> dict[str, np.ndarray]:
    """Return rows of random segments; positions restart in each, and some rows end in padding."""
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


def unpacked(packed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return each segment of packed rows in a padded row of its own."""
    rows = {name: [] for name in packed}
    for row, segments in enumerate(packed["segments"]):
        for segment in sorted(set(segments.tolist()) - {-1}):
            here = segments == segment
            for name, values in packed.items():
                padded = np.full(len(segments), -1 if name == "segments" else 0, values.dtype)
                padded[: here.sum()] = 0 if name == "segments" else values[row][here]
                rows[name].append(padded)
    return {name: np.stack(padded) for name, padded in rows.items()}


def trajectory(training: TextTraining, *, steps: int = 6) -> np.ndarray:
    """Return loss and gradient norm of each step on the same global batches."""
    state, step, values = training.first_state(), training.compiled_step(), []
    for number in range(steps):
        rows = {name: x[training.layout.rows] for name, x in packed_rows(number).items()}
        state, metrics = step(state, None, training.place(rows))
        values.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
    return np.array(values)
