"""Check `lwm eval video-needle` as a whole command, with random weights."""

import json
from pathlib import Path

import pytest
import tyro
from commands import Run
from test_vision_verbs import make_vqgan

from lwm.cli.evaluate import video_needle
from lwm.core.errors import CapacityError, InputError


def test_video_needle_reports_and_resumes(
    run: Run, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    multimodal, out = tmp_path / "multimodal", tmp_path / "out"
    vqgan = make_vqgan(tmp_path / "vqgan")
    done = run("convert", tiny, multimodal, "--add-vision", "--vqgan", vqgan)
    assert done.code == 0, done.err
    asked = [str(multimodal), "--frames", "2,5", "--depths", "0,100", "--rounds", "2",
             "--max-tokens", "3", "--out", str(out)]  # fmt: skip
    with pytest.raises(CapacityError, match="--theta"):
        tyro.cli(video_needle, args=asked)
    assert not out.exists()
    asked += ["--theta", "20000"]
    tyro.cli(video_needle, args=asked)
    first = (out / "results.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in first.splitlines()]
    assert [(row["frames"], row["depth_percent"], row["seed"]) for row in rows] == [
        (frames, depth, seed) for frames in (2, 5) for seed in (0, 1) for depth in (0.0, 100.0)
    ]
    assert [row["place"] for row in rows] == [1, 2, 1, 2, 1, 5, 1, 5]
    names = {path.name for path in out.iterdir()}
    assert names >= {"report.html", "heat_map.png", "heat_map.svg", "by_length.png", "cards.png"}
    assert capsys.readouterr().out.splitlines()[-1] == str(out / "report.html")
    # A run that was interrupted in the middle of a row ends with the same rows.
    (out / "results.jsonl").write_text(first[: len(first) // 2], encoding="utf-8")
    tyro.cli(video_needle, args=asked)
    assert (out / "results.jsonl").read_text(encoding="utf-8") == first
    with pytest.raises(InputError, match="another run"):
        tyro.cli(video_needle, args=[*asked, "--score", "logits"])


def test_a_text_model_is_refused_before_anything_is_written(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="text model"):
        tyro.cli(video_needle, args=[str(tiny), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
