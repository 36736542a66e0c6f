"""Test reading and writing Hugging Face Llama directories against transformers: logits, tensors,
and one sentence for everything that is not a plain Llama."""

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import lwm
from lwm.checkpoints.names import HALF_SPLIT, TRANSPOSED
from lwm.checkpoints.open import open_checkpoint
from lwm.checkpoints.write import write_checkpoint
from lwm.core.errors import CheckpointError, LwmError

TOLERANCE = 1e-4
TOKENS = np.random.default_rng(0).integers(0, 101, (2, 30))

# Grouped key-value heads; one per query head; one for all, a larger head size and a tied head.
SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {"num_key_value_heads": 2, "rope_theta": 500_000.0},
    "full": {"num_key_value_heads": 4, "rms_norm_eps": 1e-5},
    "wide_tied": {"num_key_value_heads": 1, "head_dim": 24, "tie_word_embeddings": True},
}


def make(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    theta = settings.pop("rope_theta", 10_000.0)
    config = LlamaConfig(
        **{
            "vocab_size": 101,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "initializer_range": 0.15,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            **settings,
        }
    )
    model = LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


@torch.no_grad()
def peer_logits(model: LlamaForCausalLM) -> np.ndarray:
    return model(torch.tensor(TOKENS)).logits.float().numpy()


def stored(directory: Path) -> dict[str, np.ndarray]:
    result = {}
    for file in sorted(directory.glob("*.safetensors")):
        result |= safetensors.numpy.load_file(file)
    return result


def convert(source: Path, destination: Path, *, dtype: str = "float32", **settings: Any) -> None:
    write_checkpoint(
        open_checkpoint(str(source)),
        destination,
        form=settings.pop("form", "huggingface"),
        dtype=dtype,
        save_tokenizer=lambda directory: None,
        **settings,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    make(num_key_value_heads=2).save_pretrained(directory)
    return directory


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(data | changes), encoding="utf-8")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("part", ["5GB", "30KB"])
def test_logits_and_export_agree_with_transformers(tmp_path: Path, shape: str, part: str) -> None:
    peer = make(**SHAPES[shape])
    expected = peer_logits(peer)
    peer.save_pretrained(tmp_path / "theirs", max_shard_size=part)
    files = len(list((tmp_path / "theirs").glob("*.safetensors")))
    assert (files > 1) == (part == "30KB")

    logits = lwm.load(tmp_path / "theirs").logits(TOKENS).text
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)

    exported = tmp_path / "exported"
    convert(tmp_path / "theirs", exported, part_bytes=30_000 if files == 1 else 1 << 30)
    assert (len(list(exported.glob("*.safetensors"))) > 1) == (files == 1)
    again = LlamaForCausalLM.from_pretrained(exported).eval()
    np.testing.assert_allclose(peer_logits(again), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_import_then_export_is_the_identity(tmp_path: Path, shape: str) -> None:
    make(**SHAPES[shape]).save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "exported")
    convert(tmp_path / "theirs", tmp_path / "ours", form="lwm")
    convert(tmp_path / "ours", tmp_path / "back")
    expected = stored(tmp_path / "theirs")
    for result in (stored(tmp_path / "exported"), stored(tmp_path / "back")):
        assert result.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(result[name], array)


def test_bfloat16_directories(tmp_path: Path) -> None:
    peer: Any = make(num_key_value_heads=2)
    peer.to(torch.bfloat16)
    peer.save_pretrained(tmp_path / "theirs")
    assert open_checkpoint(str(tmp_path / "theirs")).stored_dtype == "bfloat16"
    logits = lwm.load(tmp_path / "theirs").logits(TOKENS).text  # computed in float32
    again = LlamaForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
    expected = peer_logits(again)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
    convert(tmp_path / "theirs", tmp_path / "exported", dtype="bfloat16")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "exported")
    assert again.dtype == torch.bfloat16
    for (name, ours), theirs in zip(again.named_parameters(), peer.parameters(), strict=True):
        assert torch.equal(ours.float(), theirs.float()), name


def test_configs_of_transformers_4_are_read(broken: Path) -> None:
    data = json.loads((broken / "config.json").read_text(encoding="utf-8"))
    del data["rope_parameters"], data["head_dim"]
    data |= {"rope_theta": 1234.0, "rope_scaling": None}
    (broken / "config.json").write_text(json.dumps(data), encoding="utf-8")
    config = open_checkpoint(str(broken)).config
    assert (config.rope_theta, config.head_dim) == (1234.0, 16)


@given(heads=st.integers(1, 5), half=st.integers(1, 6), width=st.integers(1, 9))
def test_layouts_are_inverses(heads: int, half: int, width: int) -> None:
    kernel = np.arange(heads * 2 * half * width).reshape(heads * 2 * half, width)
    for layout in (HALF_SPLIT, TRANSPOSED):
        converted = layout.from_file(kernel, 2 * half)
        assert converted.shape == kernel.shape[::-1]
        np.testing.assert_array_equal(layout.to_file(converted, 2 * half), kernel)
    # Pair i of a head lies at rows i and i + half there, at columns 2i and 2i + 1 here.
    columns = HALF_SPLIT.from_file(kernel, 2 * half)
    np.testing.assert_array_equal(columns[:, 0], kernel[0])
    np.testing.assert_array_equal(columns[:, 1], kernel[half])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "type 'gemma'"),
        ({"model_type": None}, "type None"),
        ({"attention_bias": True}, r"self_attn.\w+.bias' is missing"),
        ({"mlp_bias": True}, r"mlp.\w+.bias' is missing"),
        ({"hidden_act": "gelu"}, "'hidden_act' \\('gelu'\\)"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": "big"}}, "'rope_theta' \\('big'\\)"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "rope_theta"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"hidden_size": "64"}, "'hidden_size' \\('64'\\)"),
        ({"hidden_size": 64.5}, "'hidden_size' \\(64.5\\)"),
        ({"num_hidden_layers": None}, "'num_hidden_layers'"),
        ({"num_hidden_layers": True}, "'num_hidden_layers' \\(True\\)"),
        ({"num_hidden_layers": 10**12}, "num_layers is 1000000000000"),
        ({"num_hidden_layers": 3}, r"'model.layers.2.\S+' is missing"),
        ({"num_attention_heads": 0}, "'num_attention_heads' \\(0\\)"),
        ({"num_key_value_heads": 3}, r"num_heads \(4\).*num_kv_heads \(3\)"),
        ({"num_key_value_heads": -1}, "num_kv_heads is -1"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"vocab_size": 100}, r"'model.embed_tokens.weight'.*\[101, 64\].*\[100, 64\]"),
        ({"vocab_size": 10**30}, r"'model.embed_tokens.weight'"),
        ({"intermediate_size": 97}, r"mlp.gate_proj.weight'.*\[96, 64\].*\[97, 64\]"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ],
)
def test_unsupported_models_and_wrong_settings_are_refused(
    broken: Path, changes: dict[str, Any], message: str
) -> None:
    change_config(broken, **changes)
    with pytest.raises(LwmError, match=message) as raised:
        open_checkpoint(str(broken))
    assert "\n" not in str(raised.value)


def test_missing_and_unknown_tensors_are_named(broken: Path) -> None:
    tensors = stored(broken)
    name = "model.layers.1.mlp.up_proj.weight"
    file = broken / "model.safetensors"
    without = {key: array for key, array in tensors.items() if key != name}
    safetensors.numpy.save_file(without, file)
    with pytest.raises(CheckpointError, match=f"'{name}' is missing"):
        open_checkpoint(str(broken))
    bias = {"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}
    safetensors.numpy.save_file(tensors | bias, file)
    with pytest.raises(CheckpointError, match=r"q_proj.bias' has no place"):
        open_checkpoint(str(broken))
    safetensors.numpy.save_file({k: a.astype(np.int32) for k, a in tensors.items()}, file)
    with pytest.raises(CheckpointError, match="stored as I32"):
        open_checkpoint(str(broken))


def test_truncated_files_are_refused(broken: Path) -> None:
    file = broken / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model.safetensors is broken or cut short"):
            open_checkpoint(str(broken))


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 90_000_000) + b"{}",
        b'{"a":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,9223372036854775807]}}',
        b'{"a":{"dtype":"F32","shape":[1073741824],"data_offsets":[0,4294967296]}}',
        b'{"a":',
    ],
)
def test_headers_with_impossible_sizes_are_refused(broken: Path, header: bytes) -> None:
    prefix = struct.pack("<Q", len(header)) if header.startswith(b"{") else b""
    (broken / "model.safetensors").write_bytes(prefix + header + b"1234")
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="broken or cut short") as raised:
            open_checkpoint(str(broken))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "model-00001-of-00002.safetensors"}}, "download it again"),
        ({"weight_map": {"a": "../outside.safetensors"}}, "'../outside.safetensors'"),
        ({"weight_map": {"a": "{absolute}"}}, "outside.safetensors'"),
        ({"weight_map": {"a": ""}}, "names the file ''"),
        ({"weight_map": {"a": 3}}, "no weight_map"),
        ({"weight_map": {}}, "is missing"),
        ({}, "no weight_map"),
    ],
)
def test_wrong_indexes_are_refused(broken: Path, index: dict[str, Any], message: str) -> None:
    outside = broken.parent / "outside.safetensors"
    (broken / "model.safetensors").rename(outside)
    text = json.dumps(index).replace("{absolute}", str(outside))
    (broken / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    try:
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(str(broken))
    finally:
        outside.unlink()


def test_directories_without_weights_are_refused(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor"):
        open_checkpoint(str(broken))


def shard(directory: Path, stale: dict[str, np.ndarray]) -> dict[str, str]:
    """Split a model into two files with an index, and put more tensors into the second."""
    tensors = stored(directory)
    (directory / "model.safetensors").unlink()
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {name: files["layers.1" in name] for name in tensors}
    for file in files:
        part = {name: tensors[name] for name in tensors if index[name] == file}
        part |= stale if file == files[1] else {}
        safetensors.numpy.save_file(part, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return index


def test_the_index_decides_which_tensors_are_read(tmp_path: Path) -> None:
    """Check a stale copy of an indexed tensor, and a tensor that the index does not name."""
    peer = make()
    peer.save_pretrained(tmp_path)
    stale = {"model.norm.weight": np.full(64, 7, np.float32), "some.other": np.ones(3, np.float32)}
    index = shard(tmp_path, stale)
    np.testing.assert_allclose(
        lwm.load(tmp_path).logits(TOKENS).text, peer_logits(peer), atol=TOLERANCE
    )
    index["model.norm.weight"] = index["model.layers.0.mlp.up_proj.weight"]
    index["model.layers.1.mlp.up_proj.weight"] = index["model.norm.weight"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.* in model-00001.* lacks"):
        open_checkpoint(str(tmp_path))


def test_a_tied_configuration_with_another_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    tensors = stored(tmp_path / "tied")
    embedding = tensors["model.embed_tokens.weight"]
    for head, tied in ((embedding.copy(), True), (embedding[::-1].copy(), False)):
        file = tmp_path / "tied" / "model.safetensors"
        safetensors.numpy.save_file({**tensors, "lm_head.weight": head}, file, {"format": "pt"})
        expected = peer_logits(LlamaForCausalLM.from_pretrained(tmp_path / "tied").eval())
        model = lwm.load(tmp_path / "tied")
        np.testing.assert_allclose(model.logits(TOKENS).text, expected, atol=TOLERANCE)
        assert model.config.tie_embeddings is tied
        assert ("lm_head.weight" in capsys.readouterr().err) is not tied
    for form in ("huggingface", "lwm"):
        convert(tmp_path / "tied", tmp_path / form, form=form)
        again = lwm.load(tmp_path / form).logits(TOKENS).text
        np.testing.assert_allclose(again, expected, atol=TOLERANCE)
