"""Test our model directory: exact round trips, complete or not at all."""

import json
from pathlib import Path
from typing import Any

import flax_files
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import lwm
from lwm.checkpoints.formats.safetensors import SafetensorsDirectory, write_safetensors
from lwm.checkpoints.open import open_checkpoint
from lwm.checkpoints.write import write_checkpoint
from lwm.core.errors import CheckpointError, InputError, LwmError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    directory = tmp_path_factory.mktemp("source")
    (directory / "config.json").write_text(json.dumps(flax_files.SETTINGS), encoding="utf-8")
    file = flax_files.write_stream(directory / "params", flax_files.small_model())
    return f"params::{file}", str(directory / "config.json")


def write_ours(source: tuple[str, str], destination: Path, **settings: Any) -> Path:
    write_checkpoint(
        open_checkpoint(source[0], config=source[1]),
        destination,
        form="lwm",
        dtype=settings.pop("dtype", "float32"),
        save_tokenizer=settings.pop("save_tokenizer", lambda directory: None),
        **settings,
    )
    return destination


@pytest.mark.parametrize("part_bytes", [1 << 30, 100, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_round_trip_is_exact(
    source: tuple[str, str], tmp_path: Path, part_bytes: int, dtype: str
) -> None:
    directory = write_ours(source, tmp_path / "ours", part_bytes=part_bytes, dtype=dtype)
    files = sorted(file.name for file in directory.glob("*.safetensors"))
    assert (files == ["model.safetensors"]) == (part_bytes == 1 << 30)
    original = open_checkpoint(source[0], config=source[1])
    again = open_checkpoint(str(directory))
    assert again.config == original.config
    assert again.stored_dtype == dtype
    kind = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    result = dict(again.read())
    for name, array in original.read():
        np.testing.assert_array_equal(result[name], array.astype(kind))
    assert list(tmp_path.iterdir()) == [directory]


def test_logits_survive_the_round_trip(source: tuple[str, str], tmp_path: Path) -> None:
    directory = write_ours(source, tmp_path / "ours", part_bytes=100)
    tokens = np.array([[1, 2, 3, 4, 5]])
    before = lwm.load(source[0], config=source[1]).logits(tokens).text
    np.testing.assert_array_equal(lwm.load(directory).logits(tokens).text, before)


def test_the_index_has_the_form_of_hugging_face(tmp_path: Path) -> None:
    arrays = {f"tensor{i}": np.full((i + 1, 3), i, np.float32) for i in range(6)}
    write_safetensors(tmp_path, iter(arrays.items()), part_bytes=60)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    assert index["weight_map"].keys() == arrays.keys()
    for name, file in index["weight_map"].items():
        loaded = safetensors.numpy.load_file(tmp_path / file)
        np.testing.assert_array_equal(loaded[name], arrays[name])
        assert len(loaded) == 1 or sum(array.nbytes for array in loaded.values()) <= 60


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 200))
@settings(max_examples=40, deadline=None)
def test_parts_contain_every_tensor(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], part_bytes: int
) -> None:
    directory = tmp_path_factory.mktemp("parts")
    arrays = {f"t{i}": np.arange(n, dtype=np.float32) for i, n in enumerate(lengths)}
    write_safetensors(directory, iter(arrays.items()), part_bytes=part_bytes)
    tensors = SafetensorsDirectory(directory)
    assert tensors.shapes() == {name: array.shape for name, array in arrays.items()}
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors.read(name), array)


def test_existing_destinations_are_not_changed(source: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(InputError, match=f"{name} exists"):
            write_ours(source, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
    assert (tmp_path / "file").read_text(encoding="utf-8") == "content"


def test_a_failed_conversion_leaves_nothing(source: tuple[str, str], tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{", encoding="utf-8")
        raise InputError("the tokenizer cannot be saved")

    with pytest.raises(InputError, match="cannot be saved"):
        write_ours(source, tmp_path / "ours", save_tokenizer=fail)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be written"):
        write_ours(source, tmp_path / "file" / "ours")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(version=2), "format version 2"),
        (lambda data: data.pop("model"), "no settings of a model"),
        (lambda data: data["model"].pop("num_heads"), "'num_heads'"),
        (lambda data: data["model"].update(num_layers="many"), "'num_layers'"),
        (lambda data: data["model"].update(num_layers=10**10), "num_layers.*10000000000"),
        (lambda data: data["model"].update(wings=2), "'wings'"),
        (lambda data: data["model"].update(num_layers=3), r"'layers.2.\S+' is missing"),
        (lambda data: data["model"].update(vocab_size=9), r"'embedding'.*\[8, 4\].*\[9, 4\]"),
        (lambda data: data["model"].update(rope_theta=0), "rope_theta"),
    ],
)
def test_wrong_settings_are_named(
    source: tuple[str, str], tmp_path: Path, change: Any, message: str
) -> None:
    directory = write_ours(source, tmp_path / "ours")
    file = directory / "config.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(LwmError, match=message) as raised:
        open_checkpoint(str(directory))
    assert "\n" not in str(raised.value)


def test_configurations_that_are_no_json_object_are_refused(
    source: tuple[str, str], tmp_path: Path
) -> None:
    directory = write_ours(source, tmp_path / "ours")
    for text, message in (("[]", "an object is needed"), ("{", "JSON"), ("[" * 99999, "JSON")):
        (directory / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(LwmError, match=message):
            open_checkpoint(str(directory))


def test_the_tokenizer_is_saved_beside_the_weights(
    source: tuple[str, str], tmp_path: Path
) -> None:
    directory = write_ours(
        source,
        tmp_path / "ours",
        save_tokenizer=lambda path: (path / "tokenizer.json").write_text("{}") and None,
    )
    assert (directory / "tokenizer.json").is_file()
    model = lwm.load(directory)  # a broken tokenizer matters only to text
    assert model.logits(np.array([[1, 2]])).text.shape == (1, 2, 8)
    with pytest.raises(CheckpointError, match=r"tokenizer.json"):
        model.generate("text")
