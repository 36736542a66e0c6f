"""Check that a run counts broken examples."""

from pathlib import Path

import pytest
from tiny_run import train, write_text

from lwm.training.metrics import read_metrics


def test_a_run_counts_broken_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_text(tmp_path / "text.jsonl")
    data.write_text(data.read_text() + "{\n" * 14)
    train(tmp_path / "run", data, "--data.max-broken", "0.5")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["broken"] > 1
    assert f"{rows[-1]['broken']} broken examples skipped; see" in capsys.readouterr().err
