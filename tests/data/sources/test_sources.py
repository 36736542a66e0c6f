"""Check that sources return the records written, in any order and in another process, and report
broken ones by file and line."""

import gzip
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from small_data import records, write_lines

from lwm.core.errors import InputError
from lwm.data.examples.examples import Broken, Example
from lwm.data.sources import json_lines
from lwm.data.sources.array_record import (
    decode_example,
    encode_example,
    write_array_record,
)
from lwm.data.sources.opening import open_records
from lwm.data.sources.source import RecordSource

RECORDS = records()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lwm" / "data"


def read(source: RecordSource) -> list[Any]:
    """Return all records, read backwards by a pickled copy."""
    copy = pickle.loads(pickle.dumps(source))
    return [copy.read(i) for i in reversed(range(len(source)))][::-1]


def lines(path: Path) -> Path:
    return write_lines(path, RECORDS)


def test_json_lines(tmp_path: Path) -> None:
    source = open_records(str(lines(tmp_path / "a.jsonl")))
    assert read(source) == RECORDS
    assert source.place(4) == (str(tmp_path / "a.jsonl"), 5)


BLANK_OR_NOT = st.one_of(st.binary(max_size=20), st.text(" \t\r\v\f", max_size=20).map(str.encode))


@given(st.lists(BLANK_OR_NOT.map(lambda b: b.replace(b"\n", b"")), min_size=1), st.integers(1, 9))
def test_newlines_separate_lines(tmp_path_factory: Any, written: list[bytes], chunk: int) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(b"\n".join(written))
    expected = [n for n, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "_CHUNK", chunk)
        patch.setattr(json_lines, "_PART", chunk)
        if not expected:
            with pytest.raises(InputError, match=r"is empty|holds only blank lines"):
                json_lines.JsonLines(path, "a.jsonl")
            return
        source = json_lines.JsonLines(path, "a.jsonl")
    assert [source.place(i)[1] for i in range(len(source))] == expected


def test_lines_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "_CHUNK", 7)
    assert read(open_records(str(lines(tmp_path / "a.jsonl")))) == RECORDS


def test_windows_line_ends_byte_order_marks_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n   \n{"text": "b"}\n\n')
    source = open_records(str(path))
    assert read(source) == [{"text": "a"}, {"text": "b"}]
    assert source.place(1)[1] == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "is not JSON"),
        (b"[1, 2]", "holds a JSON list"),
        (b"3", "holds a JSON int"),
        (b'{"text": "\xff"}', "is not UTF-8"),
        (b"[" * 100_000, "is not JSON that can be read"),
        (b'{"text": ' + b"1" * 10_000 + b"}", "is not JSON that can be read"),
    ],
)
def test_broken_lines(tmp_path: Path, line: bytes, message: str) -> None:
    source = open_records(str(write_lines(tmp_path / "a.jsonl", [RECORDS[0], line, RECORDS[1]])))
    assert source.read(2) == RECORDS[1]
    with pytest.raises(Broken, match=message):
        source.read(1)


def test_long_lines_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "_MAX_LINE_BYTES", 1 << 20)
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a" * (1 << 20)}, RECORDS[0]])
    source = open_records(str(path))
    assert source.read(1) == RECORDS[0]
    with pytest.raises(Broken, match="longer than 1 MB"):
        source.read(0)


def test_a_changed_file_is_reported(tmp_path: Path) -> None:
    source = open_records(str(lines(tmp_path / "a.jsonl")))
    write_lines(tmp_path / "a.jsonl", RECORDS[:-1])
    with pytest.raises(InputError, match="was changed after it was opened"):
        source.read(0)


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Index files of any size, and list the files that are scanned."""
    names: list[str] = []
    scan = json_lines._scan

    def counted(file: Any) -> Any:
        names.append(Path(file.name).name)
        return scan(file)

    monkeypatch.setattr(json_lines, "_INDEXED_BYTES", 1)
    monkeypatch.setattr(json_lines, "_scan", counted)
    return names


def test_a_large_file_is_scanned_once(tmp_path: Path, cache: Path, scans: list[str]) -> None:
    """Check that later starts use the stored index, until size or time of the file change."""
    path = write_lines(tmp_path / "a.jsonl", [RECORDS[0], b"", RECORDS[1]])
    for _ in range(3):
        source = open_records(str(path))
        assert read(source) == RECORDS[:2]
        assert source.place(1)[1] == 3
    assert scans == ["a.jsonl"]
    assert len(list(cache.iterdir())) == 1
    times = path.stat()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    open_records(str(path))
    assert len(scans) == 2
    lines(path)
    assert read(open_records(str(path))) == RECORDS
    assert len(scans) == 3
    assert len(list(cache.iterdir())) == 1  # the new index replaces the old one


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_a_corrupted_index_is_rebuilt(
    tmp_path: Path, cache: Path, scans: list[str], damage: str
) -> None:
    path = lines(tmp_path / "a.jsonl")
    open_records(str(path))
    (stored,) = cache.iterdir()
    data = bytearray(stored.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    stored.write_bytes({"cut": data[:-50], "empty": b"", "other": b"text"}.get(damage, data))
    assert read(open_records(str(path))) == RECORDS
    assert read(open_records(str(path))) == RECORDS
    assert len(scans) == 2


def test_an_index_that_cannot_be_written_is_omitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scans: list[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = lines(tmp_path / "a.jsonl")
    for _ in range(2):
        assert read(open_records(str(path))) == RECORDS
    assert len(scans) == 2


def test_processes_write_one_index_together(tmp_path: Path, cache: Path) -> None:
    path = lines(tmp_path / "a.jsonl")
    code = (
        "import sys; from pathlib import Path; from lwm.data.sources import json_lines\n"
        "json_lines._INDEXED_BYTES = 1\n"
        "print(len(json_lines.JsonLines(Path(sys.argv[1]), sys.argv[1])))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    assert [int(process.communicate()[0]) for process in started] == [len(RECORDS)] * 3
    assert len(list(cache.iterdir())) == 1


def compressed(data: bytes, kind: str) -> bytes:
    if kind == "gzip":
        return gzip.compress(data)
    if kind == "zstd":
        return zstandard.compress(data)
    half = len(data) // 2  # as parallel packers write
    pack = gzip.compress if kind == "gzips" else zstandard.compress
    return pack(data[:half]) + pack(data[half:])


@pytest.mark.parametrize("kind", ["gzip", "zstd", "gzips", "zstds"])
@pytest.mark.parametrize("remote", [False, True])
def test_compressed_files(tmp_path: Path, cache: Path, kind: str, remote: bool) -> None:
    """Check that compression is detected by content, not by name, and happens once."""
    plain = lines(tmp_path / "plain").read_bytes()
    url = f"memory://test/{kind}.jsonl" if remote else str(tmp_path / "a.jsonl")
    with fsspec.open(url, "wb") as file:
        file.write(compressed(plain, kind))  # type: ignore[union-attr]
    for _ in range(2):
        assert read(open_records(url)) == RECORDS
        assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_corrupted_compressed_files_are_refused(
    tmp_path: Path, cache: Path, kind: str, damage: str
) -> None:
    good = bytearray(compressed(lines(tmp_path / "plain").read_bytes(), kind))
    if damage == "cut":
        del good[len(good) // 2 :]
    else:
        for at in range(12, len(good), 3):
            good[at] ^= 0x5A
    (tmp_path / "a.jsonl").write_bytes(bytes(good))
    with pytest.raises(InputError, match=r"is cut short|cannot be unpacked"):
        open_records(str(tmp_path / "a.jsonl"))
    assert not list(cache.iterdir())  # no partial file remains


def test_a_changed_file_gets_a_new_copy(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    for count in (3, 5):
        path.write_bytes(gzip.compress(write_lines(tmp_path / "b", RECORDS[:count]).read_bytes()))
        assert len(open_records(str(path))) == count


def test_remote_globs(tmp_path: Path) -> None:
    for name, part in (("b", RECORDS[10:]), ("a", RECORDS[:10])):
        with fsspec.open(f"memory://shards/{name}.jsonl", "wb") as file:
            file.write(write_lines(tmp_path / "x", part).read_bytes())  # type: ignore[union-attr]
    source = open_records("memory://shards/*.jsonl")
    assert read(source) == RECORDS
    assert source.place(10) == ("memory:///shards/b.jsonl", 1)


@pytest.mark.parametrize("pattern", ["b.jsonl", "*.jsonl"])
@pytest.mark.parametrize("before", ["", "simplecache::"])
def test_files_in_an_archive(tmp_path: Path, pattern: str, before: str) -> None:
    """Check addresses that lead through another one."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(write_lines(tmp_path / "a", RECORDS[:10]), "b.jsonl")
        archive.write(write_lines(tmp_path / "a", RECORDS[10:]), "c.jsonl")
    source = open_records(f"{before}zip://{pattern}::{tmp_path}/x.zip")
    assert read(source) == (RECORDS[:10] if pattern == "b.jsonl" else RECORDS)
    assert source.place(1) == (f"{before}zip://b.jsonl::{tmp_path}/x.zip", 2)


def test_several_files_of_several_kinds(tmp_path: Path) -> None:
    write_lines(tmp_path / "2.jsonl", RECORDS[10:20])
    write_lines(tmp_path / "1.jsonl", RECORDS[:10])
    pq.write_table(pa.Table.from_pylist(RECORDS[20:]), tmp_path / "3.parquet")
    source = open_records(f"{tmp_path}/*.jsonl, {tmp_path}/3.parquet,book")
    result = read(source)
    assert result[: len(RECORDS)] == RECORDS
    assert result[len(RECORDS)]["book"] == "Genesis"
    assert source.place(10) == (str(tmp_path / "2.jsonl"), 1)
    assert source.place(len(RECORDS) + 1) == ("the King James Bible", 2)


def test_parquet(tmp_path: Path) -> None:
    rows = [
        {"text": f"t{i}", "codes": [i, i + 1], "messages": [{"role": "user", "content": "a"}]}
        for i in range(3000)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a", row_group_size=700)
    assert read(open_records(str(tmp_path / "a"))) == rows


def test_parquet_with_dictionaries(tmp_path: Path) -> None:
    """Check row groups with a dictionary each."""
    rows = [{"text": f"t{i}", "topic": f"o{i // 9}"} for i in range(2100)]
    numbers = pa.dictionary(pa.int32(), pa.string())
    schema = pa.schema([("text", pa.string()), ("topic", numbers)])
    with pq.ParquetWriter(tmp_path / "a", schema) as writer:
        for part in (rows[:1050], rows[1050:]):
            writer.write_table(pa.Table.from_pylist(part, schema))
    assert read(open_records(str(tmp_path / "a"))) == rows


def test_parquet_with_an_unsupported_column(tmp_path: Path) -> None:
    rows = [{"topics": [f"o{i}"]} for i in range(300)]
    numbers = pa.schema([("topics", pa.list_(pa.dictionary(pa.int32(), pa.string())))])
    pq.write_table(pa.Table.from_pylist(rows, numbers), tmp_path / "a", row_group_size=70)
    with pytest.raises(InputError, match="has a column that cannot be read"):
        open_records(str(tmp_path / "a"))


@pytest.mark.parametrize("format", ["auto", "parquet"])
def test_broken_parquet(tmp_path: Path, format: str) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1" + b"nothing of the kind" * 10)
    with pytest.raises(InputError, match="is not a Parquet file"):
        open_records(str(path), format)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    with pytest.raises(InputError, match="has no rows"):
        open_records(str(path), format)


@st.composite
def tokenized_columns(draw: st.DrawFn) -> tuple[list[int], list[bool], list[bool]]:
    token = st.tuples(st.integers(0, 2**31 - 1), st.booleans(), st.booleans())
    columns = list(zip(*draw(st.lists(token, min_size=1)), strict=True))
    return list(columns[0]), list(columns[1]), list(columns[2])


def example_of(columns: tuple[list[int], list[bool], list[bool]]) -> Example:
    tokens, weights, vision = columns
    return Example(
        tokens=np.array(tokens, np.int32),
        weights=np.array(weights, np.float32),
        vision=np.array(vision, bool),
    )


def same(one: Example, other: Example) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        and getattr(one, name).dtype == getattr(other, name).dtype
        for name in ("tokens", "weights", "vision")
    )


@given(tokenized_columns())
def test_records_decode_to_their_examples(
    columns: tuple[list[int], list[bool], list[bool]],
) -> None:
    example = example_of(columns)
    assert same(decode_example(encode_example(example)), example)


@given(tokenized_columns(), st.data())
def test_corrupted_records_decode_to_their_size_or_are_broken(
    columns: Any, data: st.DataObject
) -> None:
    record = bytearray(encode_example(example_of(columns)))
    del record[data.draw(st.integers(0, len(record))) :]
    for _ in range(data.draw(st.integers(0, 3))):
        if record:
            record[data.draw(st.integers(0, len(record) - 1))] = data.draw(st.integers(0, 255))
    try:
        example = decode_example(bytes(record))
    except Broken:
        return
    assert 5 * len(example) + 8 == len(record)


def test_array_record(tmp_path: Path) -> None:
    examples = [example_of(([i, i + 1], [False, True], [False, False])) for i in range(50)]
    path = tmp_path / "out" / "a.array_record"
    assert write_array_record(path, iter(examples)) == 50
    source = open_records(str(path))
    assert all(same(a, b) for a, b in zip(read(source), examples, strict=True))
    with pytest.raises(InputError, match="exists"):
        write_array_record(path, examples)


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Any:
        yield example_of(([1], [True], [False]))
        raise InputError("enough")

    with pytest.raises(InputError, match="enough"):
        write_array_record(tmp_path / "a.array_record", failing())
    assert not list(tmp_path.glob("*a.array_record*"))


def test_broken_array_records(tmp_path: Path) -> None:
    path = tmp_path / "a.array_record"
    write_array_record(path, [example_of(([i], [True], [False])) for i in range(50)])
    data = bytearray(path.read_bytes())
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="not a complete ArrayRecord file"):
        open_records(str(path))
    data[100:130] = bytes(30)
    path.write_bytes(data)
    with pytest.raises(Broken, match="cannot be read"):
        open_records(str(path)).read(0)
    (tmp_path / "b").write_text("text\n" * 100_000)
    with pytest.raises(InputError, match="not a complete ArrayRecord file"):
        open_records(str(tmp_path / "b"), "array_record")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "no data is given"),
        (" , ", "no data is given"),
        ("{tmp}/absent.jsonl", "no data file matches .*absent"),
        ("{tmp}/*.jsonl", "no data file matches"),
        ("{tmp}", "is a directory"),
        ("{tmp}/empty", "is empty"),
        ("memory://absent/a.jsonl", "cannot be reached"),
        ("memory://absent/*.jsonl", "no data file matches"),
        ("nonsense://a.jsonl", "cannot be opened"),
    ],
)
def test_missing_data_is_refused(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(InputError, match=message):
        open_records(path.format(tmp=tmp_path))


def test_an_unwritable_cache_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"{}"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="XDG_CACHE_HOME"):
        open_records(str(tmp_path / "a.gz"))


def test_hugging_face_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install lwm\[huggingface\]"):
        open_records("hf:name")


def test_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the calls of the library, which need not be installed."""
    calls = []

    def load_dataset(*arguments: Any, **settings: Any) -> list[dict[str, str]]:
        calls.append((*arguments, settings))
        if arguments[0] == "bad":
            raise ValueError("no\nsuch dataset")
        return RECORDS

    library = ModuleType("datasets")
    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert read(open_records("hf:owner/name:en:validation")) == RECORDS
    assert read(open_records("hf:owner/name")) == RECORDS
    assert read(open_records("owner/name", "huggingface")) == RECORDS
    plain = ("owner/name", None, {"split": "train"})
    assert calls == [("owner/name", "en", {"split": "validation"}), plain, plain]
    with pytest.raises(InputError, match=r"'bad' cannot be loaded \(no such dataset\)"):
        open_records("hf:bad")
