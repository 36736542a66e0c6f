"""Define a run that compiles and trains in seconds, by flags of the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lwm.cli.train import configure
from lwm.recipes.assemble import train_model
from lwm.recipes.settings import TrainingRun
from lwm.training.metrics import read_metrics

MODEL = [
    "--model.vocab-size", "300", "--model.hidden-size", "32", "--model.intermediate-size", "48",
    "--model.num-heads", "4",
]  # fmt: skip
SIZES = ["--sequence-length", "32", "--batch-size", "4", "--compute.loss-chunk", "64"]
STEPS = 12


def write_text(path: Path, examples: int = 60) -> Path:
    random = np.random.default_rng(0)
    words = ["ark", "boat", "corn", "dove", "earth", "field", "gate", "house", "ivory", "jar"]
    lines = [
        json.dumps({"text": " ".join(random.choice(words, size=int(random.integers(5, 60))))})
        for _ in range(examples)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def settings(out: Path, data: Path, *more: str) -> list[str]:
    return [
        "--out", str(out), "--data.path", str(data), *MODEL, *SIZES, "--steps", str(STEPS),
        "--checkpoint.every", "4", "--mesh", "1,1,1,1", *more,
    ]  # fmt: skip


def run(out: Path, data: Path, *more: str) -> TrainingRun:
    return configure("debug", settings(out, data, *more))


def train(out: Path, data: Path, *more: str) -> list[float]:
    """Train in this process; return the loss of each step."""
    train_model(run(out, data, *more))
    return losses(out)


def losses(out: Path) -> list[float]:
    rows = [row for row in read_metrics(out / "metrics.jsonl") if row["split"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "lwm", "train", "debug", *arguments]


def spawn(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
    """Train in a new process group, with the suite's compile cache."""
    inherited: dict[str, Any] = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.values["jax_compilation_cache_dir"]),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
        **environment,
    }
    return subprocess.Popen(
        command(*arguments), env=inherited, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
