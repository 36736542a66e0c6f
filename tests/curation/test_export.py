"""Check the export of every kind of source: its lines, limits, skipped rows and refusals."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given

from lwm.core.errors import ConfigError, InputError
from lwm.curation.export import export_texts

TEXTS = ["once upon\na time", "ein Löwe ▁", "  kept  ", 'the "end"']


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[str]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(set(line) == {"text"} for line in lines)
    return [line["text"] for line in lines]


def lines(directory: Path) -> str:
    jsonl(directory / "a.jsonl", [{"body": text, "n": 1} for text in TEXTS[:2]])
    jsonl(directory / "b.jsonl", [{"body": text} for text in TEXTS[2:]])
    return str(directory / "*.jsonl")


def parquet(directory: Path) -> str:
    pq.write_table(pa.table({"n": [1, 2, 3, 4], "body": TEXTS}), directory / "t.parquet")
    return str(directory / "t.parquet")


def saved(directory: Path) -> str:
    """Save a data set with splits by `save_to_disk`."""
    splits = DatasetDict({"train": Dataset.from_dict({"body": TEXTS})})
    splits.save_to_disk(directory / "saved")
    return str(directory / "saved")


def repository(directory: Path) -> str:
    """Make a directory with the layout of the hub."""
    (directory / "data").mkdir()
    pq.write_table(pa.table({"body": TEXTS}), directory / "data" / "train-00000.parquet")
    return f"hf:{directory}"


@pytest.mark.parametrize("source", [lines, parquet, saved, repository])
def test_every_kind_of_source_is_exported(source: Callable[[Path], str], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    out = tmp_path / "out.jsonl"
    done = export_texts(source(tmp_path / "in"), out, field="body")
    assert read(out) == TEXTS
    assert (done.rows, done.characters) == (4, sum(map(len, TEXTS)))


@given(st.integers(1, 6), st.integers(1, 60))
def test_limits_are_respected(rows: int, characters: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        source = jsonl(Path(directory, "in.jsonl"), [{"text": text} for text in TEXTS])
        out = Path(directory, "out.jsonl")
        done = export_texts(str(source), out, rows=rows, characters=characters)
        written = read(out)
    whole = "".join(TEXTS[:rows])
    assert "".join(written) == whole[:characters]
    assert (done.rows, done.characters) == (len(written), len("".join(written)))


def test_broken_and_empty_rows_are_skipped_and_reported(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "one"}\n\n{"text": null}\n{"te\n{"text": "two"}\n[]\n')
    done = export_texts(str(source), tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl") == ["one", "two"]
    assert str(done).startswith(
        "2 rows, 6 characters; skipped 1 without text; skipped 2 broken, the first "
        f"{source}, line 4: it is not JSON"
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": "a"}, {"body": 1, "id": 2}],
            r"line 2 has no field 'text'; it has 'body', 'id'",
        ),
        ([{"text": 7}], r"the field 'text' of .*line 1 is a int, not text"),
        ([{"text": " "}], r"no text in the field 'text' \(0 rows, .* skipped 1 without text\)"),
    ],
)
def test_refused_exports_leave_no_file(rows: list, message: str, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", rows)
    with pytest.raises(InputError, match=message):
        export_texts(str(source), tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == [source]


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", [{"text": "a"}])
    with pytest.raises(InputError, match="exists"):
        export_texts(str(source), source)
    with pytest.raises(InputError, match=r"directory .*deep does not exist"):
        export_texts(str(source), tmp_path / "deep" / "out.jsonl")
    with pytest.raises(ConfigError, match="rows is 0"):
        export_texts(str(source), tmp_path / "out.jsonl", rows=0)
    with pytest.raises(ConfigError, match="characters is -1"):
        export_texts(str(source), tmp_path / "out.jsonl", characters=-1)
    with pytest.raises(InputError, match="cannot be loaded"):
        export_texts(f"hf:{tmp_path / 'nowhere'}", tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == [source]


def test_an_interrupted_export_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = jsonl(tmp_path / "in.jsonl", [{"text": "a"}, {"text": "b"}])

    def stop(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("lwm.curation.export.json.dumps", stop)
    with pytest.raises(KeyboardInterrupt):
        export_texts(str(source), tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == [source]
