"""Check `lwm eval needle` and `multi-needle` as whole commands."""

import json
from pathlib import Path

import pytest
from commands import Run
from random_llama import CONTEXT

THETA = ("--theta", "20000")


@pytest.fixture
def haystack(tmp_path: Path) -> Path:
    path = tmp_path / "haystack.txt"
    path.write_text("The river ran past the mill. Few knew how old it was. " * 200)
    return path


def test_needle_runs_report_and_resume(
    run: Run, tiny: Path, haystack: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = ("eval", "needle", tiny, "--haystack", haystack, *THETA, "--lengths", "500",
             "--depths", "0,50,100", "--max-tokens", "4", "--out", out)  # fmt: skip
    ran = run(*asked)
    assert ran.code == 0, ran.err
    assert "of 3" in ran.out
    file = out / "results.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["depth_percent"] for row in rows] == [0, 50, 100]
    assert rows[0].keys() >= {"context_length", "depth_percent", "response", "answer", "correct",
                              "seed"}  # fmt: skip
    for name in ("report.html", "heat_map.png", "heat_map.svg"):
        assert (out / name).stat().st_size > 1000
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + lines[1][:20])  # as a crash leaves it
    again = run(*asked)
    assert again.code == 0, again.err
    assert file.read_bytes() == b"".join(lines)
    several = run(
        "eval", "multi-needle", tiny, "--haystack", haystack, *THETA, "--lengths", "500",
        "--depths", "0,50,100", "--score", "logits", "--needles", "3", "--retrieve", "2",
        "--out", tmp_path / "several",
    )  # fmt: skip
    assert several.code == 0, several.err
    (row,) = map(json.loads, (tmp_path / "several" / "results.jsonl").read_text().splitlines())
    assert len(row["correct"]) == len(row["answer"]) == len(row["depth_percent"]) == 2


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (("--lengths", CONTEXT + 1), (f"{CONTEXT + 1}", f"{CONTEXT}", "--theta")),
        (("--lengths", "100000", *THETA), ("99,800", "--haystack")),
        (("--lengths", "500", "--depths", "0,101", *THETA), ("101", "0 to 100")),
        (("--lengths", "many"), ("'many'", "1024:8192:4")),
        (("--lengths", "500", "--rounds", "0", *THETA), ("rounds is 0",)),
        (("--lengths", "500", "--haystack", "missing.txt", *THETA), ("missing.txt",)),
        (("--lengths", "500", "--template", "other", *THETA), ("'other'", "chatml")),
    ],
)
def test_impossible_needle_runs_are_refused(
    run: Run,
    tiny: Path,
    haystack: Path,
    tmp_path: Path,
    flags: tuple[object, ...],
    messages: tuple[str, ...],
) -> None:
    out = tmp_path / "out"
    ran = run("eval", "needle", tiny, "--haystack", haystack, "--out", out, *flags)
    assert ran.code == 2, ran.out
    assert all(text in ran.err for text in messages), ran.err
    assert "Traceback" not in ran.err
    assert not out.exists()


def test_the_directory_of_another_run_is_refused(
    run: Run, tiny: Path, haystack: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.jsonl").write_text('{"context_length": 500}\n')
    asked = (
        "eval",
        "needle",
        tiny,
        "--haystack",
        haystack,
        *THETA,
        "--lengths",
        "500",
        "--out",
        out,
    )
    assert "without settings.json" in run(*asked).err
    (out / "settings.json").write_text('{"evaluation": "needle", "seed": 4}')
    ran = run(*asked)
    assert ran.code == 2
    assert "holds another run" in ran.err
