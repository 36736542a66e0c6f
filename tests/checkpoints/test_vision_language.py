"""Test vision-language models in every format: the original's logits of both vocabularies, and the
same model after each conversion."""

import json
from pathlib import Path
from typing import Any

import flax_files
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import lwm
from lwm.checkpoints.names import (
    AS_IS,
    TRANSPOSED,
    NameRow,
    from_stored,
    stored_tensors,
    to_stored,
)
from lwm.checkpoints.open import open_checkpoint
from lwm.checkpoints.write import write_checkpoint
from lwm.core.errors import CheckpointError, ConfigError, InputError
from lwm.models.llama import LlamaConfig
from lwm.models.vision_tokens import VisionVocabulary

# The fixtures' own rounding is 1e-4 away from a float64 run.
TOLERANCE = 3e-4


def model_of(originals: Path, layout: str) -> dict[str, Any]:
    directory = originals / layout
    return {
        "model": f"params::{directory / 'vision_streaming_params'}",
        "config": str(directory / "vision_config.json"),
    }


def assert_originals(model: lwm.Model, originals: Path, layout: str) -> None:
    expected = np.load(originals / layout / "vision_expected.npz")
    logits = model.logits(expected["tokens"], vision_mask=expected["vision_mask"])
    assert logits.vision is not None
    np.testing.assert_allclose(logits.text, expected["text_logits"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(logits.vision, expected["vision_logits"], rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def unrolled(originals: Path) -> lwm.Model:
    return lwm.load(**model_of(originals, "unrolled"))


def test_logits_are_the_originals(originals: Path, unrolled: lwm.Model) -> None:
    assert_originals(unrolled, originals, "unrolled")
    assert_originals(lwm.load(**model_of(originals, "scan")), originals, "scan")


@pytest.mark.parametrize("mesh", ["1,1,1,4", "1,2,2,1"])
def test_a_mesh_changes_no_logits(originals: Path, mesh: str) -> None:
    assert_originals(lwm.load(**model_of(originals, "scan"), mesh=mesh), originals, "scan")


def test_every_format_of_the_original_gives_the_same_tensors(
    originals: Path, tmp_path: Path
) -> None:
    arguments = model_of(originals, "scan")
    arrays = flax_files.read_stream(originals / "scan" / "vision_streaming_params")
    expected = dict(open_checkpoint(**arguments).read())
    state = {("params", "params", *key): array for key, array in arrays.items()}
    transposed = {
        key: np.moveaxis(array, 0, 1) if "scan_decoder" in key else array
        for key, array in arrays.items()
    }
    settings = json.loads(Path(arguments["config"]).read_text(encoding="utf-8"))
    (tmp_path / "transposed.json").write_text(json.dumps({**settings, "param_scan_axis": 1}))
    files = {
        f"trainstate_params::{flax_files.write_stream(tmp_path / 'state', state)}": arguments[
            "config"
        ],
        f"flax_params::{flax_files.write_map(tmp_path / 'tree', arrays)}": arguments["config"],
        f"params::{flax_files.write_stream(tmp_path / 'transposed', transposed)}": tmp_path
        / "transposed.json",
    }
    for model, config in files.items():
        result = dict(open_checkpoint(model, config=str(config)).read())
        assert result.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(result[name], array)


def test_text_and_vision_tables_are_concatenated(originals: Path) -> None:
    arrays = flax_files.read_stream(originals / "unrolled" / "vision_streaming_params")
    checkpoint = open_checkpoint(**model_of(originals, "unrolled"))
    result = dict(checkpoint.read())
    assert (checkpoint.config.vocab_size, checkpoint.config.table_size) == (96, 160)
    tables = [arrays["transformer", part, "embedding"] for part in ("wte", "vte")]
    np.testing.assert_array_equal(result["embedding"], np.concatenate(tables))
    heads = [arrays[part, "kernel"] for part in ("lm_head", "vision_head")]
    np.testing.assert_array_equal(result["head"], np.concatenate(heads, axis=1))
    # Writing splits them again.
    config = checkpoint.config
    for name, parts in stored_tensors(checkpoint.table, config).items():
        for stored_name, array in to_stored(parts, result[name], config.head_dim):
            np.testing.assert_array_equal(array, arrays[tuple(stored_name.split("/"))])


def test_parts_may_be_transposed() -> None:
    config = LlamaConfig(
        vocab_size=5, hidden_size=4, intermediate_size=2, num_layers=1, num_heads=2,
        num_kv_heads=2, head_dim=2, max_sequence_length=8,
        vision=VisionVocabulary(size=3, codes=1, codes_per_frame=1),
    )  # fmt: skip
    table = (
        NameRow("embedding", "a", AS_IS, "text"), NameRow("embedding", "b", AS_IS, "vision"),
        NameRow("head", "c", TRANSPOSED, "text"), NameRow("head", "d", TRANSPOSED, "vision"),
    )  # fmt: skip
    stored = stored_tensors(table, config)
    assert [part.shape for part in stored["embedding"] + stored["head"]] == [
        (5, 4), (3, 4), (5, 4), (3, 4),
    ]  # fmt: skip
    for name, shape in (("embedding", (8, 4)), ("head", (4, 8))):
        array = np.random.default_rng(0).normal(size=shape)
        parts = dict(to_stored(stored[name], array, 2))
        assert [x.shape for x in parts.values()] == [part.shape for part in stored[name]]
        np.testing.assert_array_equal(from_stored(stored[name], parts.__getitem__, 2), array)


def test_vision_settings_must_match_the_file(originals: Path, tmp_path: Path) -> None:
    directory = originals / "unrolled"
    vision, text = directory / "vision_config.json", directory / "text_config.json"
    with pytest.raises(
        CheckpointError, match=r"vision-language.*vte/embedding.*\"vision_vocab_size\": 64"
    ):
        lwm.load(f"params::{directory / 'vision_streaming_params'}", config=text)
    with pytest.raises(CheckpointError, match=r"text checkpoint.*omit vision_vocab_size .64."):
        lwm.load(f"flax_params::{directory / 'text_params.msgpack'}", config=vision)
    arrays = flax_files.read_stream(directory / "vision_streaming_params")
    half = {key: array for key, array in arrays.items() if key[0] != "vision_head"}
    file = flax_files.write_stream(tmp_path / "half", half)
    with pytest.raises(CheckpointError, match="'vision_head/kernel' is missing"):
        lwm.load(f"params::{file}", config=vision)
    arrays["vision_head", "kernel"] = arrays["vision_head", "kernel"][:, :-1]
    file = flax_files.write_stream(tmp_path / "misshaped", arrays)
    with pytest.raises(CheckpointError, match=r"vision_head/kernel'.*\[32, 63\].*\[32, 64\]"):
        lwm.load(f"params::{file}", config=vision)


@pytest.mark.parametrize(
    ("settings", "codes", "per_frame"),
    [
        ({"vision_vocab_size": 8448}, 8192, 256),
        ({"vision_vocab_size": 64}, 62, 256),
        ({"vision_vocab_size": 1280}, 1024, 256),
        ({"vision_vocab_size": 64, "vision_codes": 32, "vision_codes_per_frame": 4}, 32, 4),
    ],
)
def test_codes_follow_from_the_table_size(
    tmp_path: Path, settings: dict[str, int], codes: int, per_frame: int
) -> None:
    arrays = flax_files.small_model()
    size = settings["vision_vocab_size"]
    arrays["transformer", "vte", "embedding"] = np.zeros((size, 4), np.float32)
    arrays["vision_head", "kernel"] = np.zeros((4, size), np.float32)
    file = flax_files.write_stream(tmp_path / "file", arrays)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(flax_files.SETTINGS | settings), encoding="utf-8")
    vision = open_checkpoint(f"params::{file}", config=str(config)).config.vision
    assert vision == VisionVocabulary(size=size, codes=codes, codes_per_frame=per_frame)
    config.write_text(json.dumps(flax_files.SETTINGS | {"vision_vocab_size": 2}))
    with pytest.raises(ConfigError, match=r"vision.codes is 0"):
        open_checkpoint(f"params::{file}", config=str(config))


def write(arguments: dict[str, Any], destination: Path, form: Any) -> Path:
    write_checkpoint(
        open_checkpoint(**arguments), destination, form=form, dtype="float32",
        save_tokenizer=lambda directory: None,
    )  # fmt: skip
    return destination


def test_every_conversion_keeps_the_model(originals: Path, tmp_path: Path) -> None:
    arguments = model_of(originals, "unrolled")
    ours = write(arguments, tmp_path / "ours", "lwm")
    theirs = write({"model": str(ours)}, tmp_path / "theirs", "huggingface")
    again = write({"model": str(theirs)}, tmp_path / "again", "lwm")
    first = open_checkpoint(**arguments)
    expected = dict(first.read())
    for directory in (ours, theirs, again):
        checkpoint = open_checkpoint(str(directory))
        assert checkpoint.config == first.config
        for name, array in checkpoint.read():
            np.testing.assert_array_equal(array, expected[name])
    assert_originals(lwm.load(again), originals, "unrolled")


def test_transformers_computes_the_logits_of_both_vocabularies(
    originals: Path, tmp_path: Path
) -> None:
    directory = write(model_of(originals, "unrolled"), tmp_path / "theirs", "huggingface")
    expected = np.load(originals / "unrolled" / "vision_expected.npz")
    peer: Any = LlamaForCausalLM.from_pretrained(directory).eval()
    assert peer.config.vocab_size == 160
    tokens = expected["tokens"] + 96 * expected["vision_mask"]
    with torch.no_grad():
        logits = peer(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits[..., :96], expected["text_logits"], atol=TOLERANCE)
    np.testing.assert_allclose(logits[..., 96:], expected["vision_logits"], atol=TOLERANCE)


def test_vision_ids_that_leave_none_for_text_are_refused(originals: Path, tmp_path: Path) -> None:
    directory = write(model_of(originals, "unrolled"), tmp_path / "theirs", "huggingface")
    file = directory / "config.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    for vision, message in (
        ({**data["lwm_vision"], "size": 160}, "leaves none for text"),
        ({"size": "many"}, "'lwm_vision.size'"),
        (7, "'lwm_vision'"),
    ):
        file.write_text(json.dumps({**data, "lwm_vision": vision}), encoding="utf-8")
        with pytest.raises((CheckpointError, ConfigError), match=message):
            open_checkpoint(str(directory))


def test_without_a_mask_all_tokens_are_text(unrolled: lwm.Model) -> None:
    tokens = np.arange(20)[None]
    plain = unrolled.logits(tokens)
    masked = unrolled.logits(tokens, vision_mask=np.zeros((1, 20), bool))
    assert plain.vision is not None
    assert (plain.text.shape, plain.vision.shape) == ((1, 20, 96), (1, 20, 64))
    np.testing.assert_array_equal(plain.text, masked.text)
    np.testing.assert_array_equal(plain.vision, masked.vision)  # type: ignore[arg-type]


def test_ids_and_masks_that_do_not_fit_are_refused(originals: Path, unrolled: lwm.Model) -> None:
    mask = np.array([[False, True]])
    with pytest.raises(InputError, match=r"vision tokens run from 64 to 64.*0 to 63"):
        unrolled.logits([[1, 64]], vision_mask=mask)
    with pytest.raises(InputError, match=r"tokens run from 96 to 96.*0 to 95"):
        unrolled.logits([[96, 1]], vision_mask=mask)
    with pytest.raises(InputError, match=r"vision tokens run from -1"):
        unrolled.logits([[1, -1]], vision_mask=mask)
    with pytest.raises(InputError, match=r"vision_mask has shape \[1, 2\].*\[1, 3\]"):
        unrolled.logits([[1, 2, 3]], vision_mask=mask)
    with pytest.raises(InputError, match=r"type int64"):
        unrolled.logits([[1, 2]], vision_mask=[[0, 1]])
