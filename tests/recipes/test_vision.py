"""Check the vision stages: the paper's table, data sets by flags, a small run."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_run import MODEL

from lwm.cli.train import configure
from lwm.core.errors import ConfigError
from lwm.models.llama import LlamaConfig
from lwm.models.vision_tokens import VisionVocabulary
from lwm.recipes.assemble import train_model
from lwm.recipes.catalogue.index import recipe
from lwm.recipes.inspection import inspect_rows
from lwm.recipes.settings import TrainingRun
from lwm.training.metrics import read_metrics

SMALL = [
    *MODEL, "--model.num-kv-heads", "4", "--model.vision.codes", "16", "--model.vision.size", "20",
    "--model.vision.codes-per-frame", "4", "--sequence-length", "64", "--batch-size", "2",
]  # fmt: skip


def test_the_stages_are_the_papers():
    """Check context, tokens per batch, steps, warm-up, learning rates and mesh."""
    table = {
        "vision-1k": (1 << 10, 45000, 1000, 6e-4, 6e-5, "1,-1,1,1"),
        "vision-8k": (8 << 10, 14000, 500, 6e-4, 6e-5, "1,-1,1,1"),
        "vision-32k": (32 << 10, 1200, 100, 8e-5, 8e-5, "1,-1,4,1"),
        "vision-128k": (128 << 10, 450, 50, 8e-5, 8e-5, "1,-1,8,1"),
        "vision-1m": (1 << 20, 50, 5, 8e-5, 8e-5, "1,-1,16,4"),
    }
    for name, (length, steps, warmup, highest, lowest, mesh) in table.items():
        run = recipe(name)
        assert (run.sequence_length, run.batch_size * length) == (length, 8 << 20)
        assert (run.loop.steps, run.optimizer.warmup_steps) == (steps, warmup)
        rates = run.optimizer.learning_rate, run.optimizer.final_learning_rate
        assert (rates, run.optimizer.schedule) == ((highest, lowest), "cosine")
        assert (run.mesh, run.model.size, run.model.rope_theta) == (mesh, "7b", 5e7)
        weights = {kind: part.weight for kind, part in run.data.mixture.items()}
        assert sum(weights.values()) == pytest.approx(1)
        if length <= 8 << 10:
            assert weights.pop("text") == 0.16
        assert len(set(weights.values())) == 1
        config = run.model.resolve(length, None, "")
        assert config.table_size == 32000 + 8448


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "images.jsonl"
    random = np.random.default_rng(0)
    lines = [
        {
            "vision": random.integers(0, 16, 4 * int(random.integers(1, 4))).tolist(),
            "caption": f"picture {n}",
            "fields": ["[caption],vision", "[vision],caption"],
        }
        for n in range(30)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def run(out: Path, *more: str) -> TrainingRun:
    return configured("vision-debug", "--out", str(out), *SMALL, *more)


def configured(name: str, *settings: str) -> TrainingRun:
    return configure(name, settings)


def test_a_small_run_reports_text_and_vision_separately(data, tmp_path):
    words = tmp_path / "words.jsonl"
    words.write_text('{"text": "so many words"}\n' * 9, encoding="utf-8")
    train_model(
        run(
            tmp_path / "run", "--steps", "3",
            "--data.mixture.images.path", str(data), "--data.mixture.images.weight", "3",
            "--data.mixture.words.path", str(words), "--data.mixture.words.fields", "text",
            "--data.held-out", "0.2", "--evaluate-every", "3",
        )
    )  # fmt: skip
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["split"] for row in rows] == ["train"] * 3 + ["evaluation"]
    for row in rows:
        assert row["vision_targets"] > 0
        assert {"text_loss", "vision_loss", "text_accuracy", "vision_accuracy"} <= row.keys()
        assert abs(row["vision_loss"] - np.log(20)) < 1
    assert all(row["text_targets"] + row["vision_targets"] == row["targets"] for row in rows[:3])
    saved = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert saved["model"]["vision"]["codes"] == 16
    assert list(saved["run"]["data"]["mixture"]) == ["images", "words"]


def test_rows_show_vision_as_frames(data, tmp_path):
    shown = "\n".join(inspect_rows(run(tmp_path / "run", "--data.path", str(data)), 2))
    assert "<1 frame of 4 codes>" in shown
    assert "<3 frames of 4 codes>" in shown
    assert "'<vision>'" in shown
    assert "of vision)" in shown


def test_flags_replace_the_recipes_settings():
    run = configured("vision-1k", "--data.path", "a.jsonl", "--data.fields", "[caption],vision")
    assert (run.data.path, run.data.mixture) == ("a.jsonl", {})
    assert (run.data.fields, run.data.fields_from_example) == ("[caption],vision", "")
    small = configured("vision-1k", "--model.size", "debug", "--data.mixture.text.weight", "0")
    assert small.model.vision == VisionVocabulary()
    assert small.data.mixture["text"].weight == 0
    more = configured("chat", "--data.mixture.mine.path", "a.jsonl")
    assert more.data.sets()["mine"][1].messages == "messages"


def sized(vision: VisionVocabulary | None) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=4,
        num_kv_heads=4, head_dim=8, max_sequence_length=64, vision=vision,
    )  # fmt: skip


def test_a_start_with_another_vision_vocabulary_is_refused():
    model = configured("vision-1k", "--model.size", "").model
    with pytest.raises(ConfigError, match=r"MINE is a text model.*lwm convert MINE.*--add-vision"):
        model.resolve(64, sized(None), "MINE")
    other = sized(VisionVocabulary(codes=64, size=8448))
    with pytest.raises(ConfigError, match=r"vision.codes 64.*has 8192.*--model.vision.codes"):
        model.resolve(64, other, "MINE")
    assert model.resolve(64, sized(VisionVocabulary()), "MINE").vision == VisionVocabulary()
    chat = configured("chat").model
    assert chat.resolve(64, other, "MINE").vision == other.vision
