"""Check the rows that a run's metrics keep, the plot, and the trackers."""

import json
import time

import pytest

from lwm.training.metrics import Metrics, TrackingConfig, plot_losses, read_metrics


def row(step: int, loss: float = 1.0, split: str = "train") -> dict:
    return {"step": step, "split": split, "loss": loss}


def write(run, steps, *, after=0, tracking=TrackingConfig()):
    metrics = Metrics(run, tracking, after=after, settings={"recipe": "debug"})
    for step in steps:
        metrics.write(row(step, 1.0 / step))
    metrics.close()


def test_rows_after_the_checkpoint_are_written_again(tmp_path):
    write(tmp_path, range(1, 8))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "spl')  # as a power failure leaves it
    write(tmp_path, range(5, 7), after=4)
    steps = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_values_that_are_not_finite_are_null(tmp_path):
    metrics = Metrics(tmp_path, TrackingConfig(), after=0, settings={})
    metrics.write(row(1, float("nan")))
    metrics.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0], parse_constant=pytest.fail)["loss"] is None


def test_the_plot_shows_both_splits(tmp_path):
    rows = [row(step, 5.0 / step) for step in range(1, 50)]
    plot_losses(rows, tmp_path / "train.png")
    plot_losses([*rows, row(30, 2.0, "evaluation")], tmp_path / "both.png")
    train, both = ((tmp_path / f"{name}.png").read_bytes() for name in ("train", "both"))
    assert train.startswith(b"\x89PNG")
    assert train != both


def test_tensorboard_gets_every_value_of_a_row(tmp_path):
    write(tmp_path, range(1, 4), tracking=TrackingConfig(tensorboard=True))
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert content.count(b"train/loss") == 3
    assert b"train/step" not in content


def test_weights_and_biases_works_offline_and_resumes_its_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracking = TrackingConfig(wandb="lwm-tests", wandb_mode="offline")
    for steps in (range(1, 3), range(3, 5)):
        write(tmp_path, steps, tracking=tracking)
    logs = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({log.stem for log in logs}) == 1
    deadline = time.monotonic() + 60  # another process may write the log a moment later
    while not all(b"train/loss" in log.read_bytes() for log in logs):
        assert time.monotonic() < deadline
        time.sleep(0.1)
