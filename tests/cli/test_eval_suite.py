"""Check `lwm eval suite` as a whole command."""

import json
from pathlib import Path

from commands import Run
from random_llama import CONTEXT

ASKED = ("eval", "suite", "infinitebench")
SMALL = ("--tasks", "passkey,number_string", "--samples", "2", "--theta", "20000")


def test_a_suite_prints_scores_and_resumes(run: Run, tiny: Path, tmp_path: Path) -> None:
    asked = (*ASKED, tiny, *SMALL, "--lengths", "400,500", "--out", tmp_path / "out")
    ran = run(*asked)
    assert ran.code == 0, ran.err
    for shown in ("passkey", "number_string", "mean", "400", "below 400 tokens"):
        assert shown in ran.out
    file = tmp_path / "out" / "results.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["task"], row["context_length"], row["seed"]) for row in rows] == [
        (task, length, seed)
        for length in (400, 500)
        for task in ("passkey", "number_string")
        for seed in (0, 1)
    ]
    assert all(row["prompt_tokens"] < row["context_length"] for row in rows)

    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:5]) + lines[5][:20])  # as a crash leaves it
    again = run(*asked)
    assert again.code == 0, again.err
    assert file.read_bytes() == b"".join(lines)
    assert again.out == ran.out

    other = run(*asked, "--template", "none")
    assert other.code == 2
    assert "template" in other.err


def test_impossible_suites_are_refused(run: Run, tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "squad.json"
    broken.write_text('{"data": [')
    out = ("--out", tmp_path / "out")
    small = tmp_path / "small.txt"
    small.write_text("Once upon a time there was a house.")
    for suite, flags, message in (
        ("infinitebench", ("--lengths", CONTEXT + 1), f"{CONTEXT + 1} and the context"),
        ("infinitebench", ("--lengths", CONTEXT), f"context length is {CONTEXT}"),
        ("ruler", ("--squad", broken), str(broken)),
        ("ruler", ("--tasks", "vt,qa_2"), "--hotpot"),
        ("ruler", ("--tasks", "needles"), "niah_single_1"),
        ("babilong", ("--samples", 0, "--lengths", CONTEXT), "samples is 0"),
        (
            "babilong",
            ("--haystack", small, "--lengths", 4000, "--theta", 1e5),
            "context length is 4,000",
        ),
    ):
        ran = run("eval", "suite", suite, tiny, *flags, *out)
        assert ran.code == 2, ran
        assert message in ran.err
        assert ran.err.count("\n") <= 3
        assert not out[1].exists()
