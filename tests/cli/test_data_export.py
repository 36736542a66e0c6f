"""Check `lwm data export`: the exported file, and the sentence for a missing field."""

import json
from pathlib import Path

from commands import Run

from lwm.data.sources.opening import open_records


def test_export_writes_what_training_and_haystacks_read(run: Run, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"body": "once upon a time", "id": 7}, {"body": "the answer", "id": 8}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    ran = run("data", "export", source, "--field", "body", "--out", out, "--characters", 20)
    assert (ran.code, ran.out) == (0, f"{out}\n")
    assert "2 rows, 20 characters" in ran.err
    written = open_records(str(out))
    assert [written.read(i) for i in range(len(written))] == [
        {"text": "once upon a time"}, {"text": "the "},
    ]  # fmt: skip
    ran = run("data", "export", source, "--out", tmp_path / "other.jsonl")
    assert (ran.code, ran.out) == (2, "")
    assert "no field 'text'; it has 'body', 'id': name one of them with --field" in ran.err
    assert not (tmp_path / "other.jsonl").exists()
