"""Figures of a run: rows kept over restarts, pictures, other places that are told."""

import json
import time

import pytest

from lwm.training.metrics import Metrics, TrackingConfig, draw_curve, read_metrics


def row(step: int, loss: float = 1.0, split: str = "train") -> dict:
    return {"step": step, "split": split, "loss": loss}


def write(run, steps, *, after=0, tracking=TrackingConfig()):
    metrics = Metrics(run, tracking, after=after, settings={"recipe": "debug"})
    for step in steps:
        metrics.write(row(step, 1.0 / step))
    metrics.close()


def test_rows_beyond_the_checkpoint_are_written_anew(tmp_path):
    write(tmp_path, range(1, 8))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "spl')  # where the power was cut
    write(tmp_path, range(5, 7), after=4)
    assert [found["step"] for found in read_metrics(tmp_path / "metrics.jsonl")] == [
        *range(1, 5), 5, 6,
    ]  # fmt: skip


def test_what_is_not_finite_stays_valid_json(tmp_path):
    metrics = Metrics(tmp_path, TrackingConfig(), after=0, settings={})
    metrics.write(row(1, float("nan")))
    metrics.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0], parse_constant=pytest.fail)["loss"] is None


def test_the_curve_is_a_picture_of_both_splits(tmp_path):
    rows = [row(step, 5.0 / step) for step in range(1, 50)]
    alone = draw_curve(rows, tmp_path / "alone.png").read_bytes()
    both = draw_curve([*rows, row(30, 2.0, "evaluation")], tmp_path / "both.png").read_bytes()
    assert alone.startswith(b"\x89PNG")
    assert alone != both


def test_tensorboard_gets_every_figure_of_a_row(tmp_path):
    write(tmp_path, range(1, 4), tracking=TrackingConfig(tensorboard=True))
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert content.count(b"train/loss") == 3
    assert b"train/step" not in content


def test_weights_and_biases_works_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracking = TrackingConfig(wandb="lwm-tests", wandb_mode="offline")
    write(tmp_path, range(1, 4), tracking=tracking)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (log,) = run.glob("run-*.wandb")
    patience = time.monotonic() + 60  # its own process may write a moment later
    while b"train/loss" not in log.read_bytes():
        assert time.monotonic() < patience
        time.sleep(0.1)


def test_a_resumed_run_is_the_same_one_for_weights_and_biases(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracking = TrackingConfig(wandb="lwm-tests", wandb_mode="offline")
    for steps in (range(1, 3), range(3, 5)):
        write(tmp_path, steps, tracking=tracking)
    runs = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({run.stem for run in runs}) == 1
