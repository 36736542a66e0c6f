"""Test the original's checkpoints of text models against its files and logits.

Forms that the fixtures lack (training states, the second scan axis, chunked arrays, bfloat16) are
rewritten from them with the msgpack package and compared tensor by tensor.
"""

import json
from pathlib import Path

import flax_files
import ml_dtypes
import numpy as np
import pytest

import lwm
from lwm.checkpoints.open import open_checkpoint
from lwm.core.errors import CheckpointError, ConfigError, LwmError

# The fixtures' own rounding is 1e-4 away from a float64 run.
TOLERANCE = 3e-4


def settings(directory: Path, **changes: object) -> str:
    file = directory / "config.json"
    file.write_text(json.dumps({**flax_files.SETTINGS, **changes}), encoding="utf-8")
    return str(file)


def tensors(model: str, config: str) -> dict[str, np.ndarray]:
    return dict(open_checkpoint(model, config=config).read())


@pytest.fixture(scope="module")
def single(originals: Path) -> lwm.Model:
    file = originals / "scan" / "text_streaming_params"
    return lwm.load(f"params::{file}", config=originals / "scan" / "text_config.json")


@pytest.mark.parametrize(
    ("layout", "form"),
    [
        ("scan", "flax_params::{}/text_params.msgpack"),
        ("unrolled", "params::{}/text_streaming_params"),
        ("unrolled", "flax_params::{}/text_params.msgpack"),
    ],
)
def test_logits_are_the_originals(originals: Path, layout: str, form: str) -> None:
    directory = originals / layout
    expected = np.load(directory / "text_expected.npz")
    model = lwm.load(form.format(directory), config=directory / "text_config.json")
    logits = model.logits(expected["tokens"])
    assert logits.vision is None
    assert logits.text.dtype == np.float32
    np.testing.assert_allclose(logits.text, expected["logits"], rtol=0, atol=TOLERANCE)


def test_logits_of_a_scanned_stream_are_the_originals(originals: Path, single: lwm.Model) -> None:
    expected = np.load(originals / "scan" / "text_expected.npz")
    logits = single.logits(expected["tokens"]).text
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("mesh", ["1,1,1,4", "1,2,2,1", "dp:1,fsdp:1,tp:2,sp:2"])
def test_a_mesh_changes_no_logits(originals: Path, single: lwm.Model, mesh: str) -> None:
    file = originals / "scan" / "text_streaming_params"
    model = lwm.load(f"params::{file}", config=originals / "scan" / "text_config.json", mesh=mesh)
    assert model.mesh is not None
    assert model.mesh.size == 4
    tokens = np.load(originals / "scan" / "text_expected.npz")["tokens"]
    expected = single.logits(tokens).text
    np.testing.assert_allclose(model.logits(tokens).text, expected, rtol=0, atol=1e-4)


def test_the_rewriter_writes_what_the_original_wrote(originals: Path, tmp_path: Path) -> None:
    """Check the helper that the tests below rely on."""
    written = originals / "scan" / "text_streaming_params"
    copy = flax_files.write_stream(tmp_path / "copy", flax_files.read_stream(written))
    assert copy.read_bytes() == written.read_bytes()


def test_training_states_contain_the_same_parameters(originals: Path, tmp_path: Path) -> None:
    config = str(originals / "scan" / "text_config.json")
    file = originals / "scan" / "text_streaming_params"
    arrays = flax_files.read_stream(file)
    state = {("step",): np.array(3, np.int32), ("opt_state", "0", "count"): np.array([1, 2])}
    state |= {("params", "params", *key): array for key, array in arrays.items()}
    state |= {("opt_state", "mu", *key): array for key, array in arrays.items()}
    rewritten = flax_files.write_stream(tmp_path / "state", state)
    expected = tensors(f"params::{file}", config)
    result = tensors(f"trainstate_params::{rewritten}", config)
    assert result.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(result[name], array)
    with pytest.raises(CheckpointError, match="trainstate_params::"):
        open_checkpoint(f"trainstate_params::{file}", config=config)


def test_layers_scanned_on_the_second_axis(originals: Path, tmp_path: Path) -> None:
    config = json.loads((originals / "scan" / "text_config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "param_scan_axis": 1}))
    file = originals / "scan" / "text_streaming_params"
    transposed = {
        key: np.moveaxis(array, 0, 1) if "scan_decoder" in key else array
        for key, array in flax_files.read_stream(file).items()
    }
    rewritten = flax_files.write_stream(tmp_path / "transposed", transposed)
    expected = tensors(f"params::{file}", str(originals / "scan" / "text_config.json"))
    result = tensors(f"params::{rewritten}", str(tmp_path / "config.json"))
    for name, array in expected.items():
        np.testing.assert_array_equal(result[name], array)


def test_chunked_arrays_are_joined(originals: Path, tmp_path: Path) -> None:
    directory = originals / "unrolled"
    config = str(directory / "text_config.json")
    arrays = flax_files.read_stream(directory / "text_streaming_params")

    def encoder(array: np.ndarray) -> object:
        return (
            flax_files.encode_chunked(array, 700) if array.size > 700 else flax_files.encode(array)
        )

    stream = flax_files.write_stream(tmp_path / "stream", arrays, encoder=encoder)
    tree = flax_files.write_map(tmp_path / "tree", arrays, encoder=encoder)
    expected = tensors(f"params::{directory / 'text_streaming_params'}", config)
    for model in (f"params::{stream}", f"flax_params::{tree}"):
        result = tensors(model, config)
        for name, array in expected.items():
            np.testing.assert_array_equal(result[name], array)


def test_bfloat16_arrays(originals: Path, tmp_path: Path) -> None:
    directory = originals / "unrolled"
    config = str(directory / "text_config.json")
    arrays = flax_files.read_stream(directory / "text_streaming_params")
    halved = {key: array.astype(ml_dtypes.bfloat16) for key, array in arrays.items()}
    file = flax_files.write_stream(tmp_path / "halved", halved)
    checkpoint = open_checkpoint(f"params::{file}", config=config)
    assert checkpoint.stored_dtype == "bfloat16"
    full = tensors(f"params::{directory / 'text_streaming_params'}", config)
    for name, array in checkpoint.read():
        assert array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array, full[name].astype(ml_dtypes.bfloat16))
    expected = np.load(directory / "text_expected.npz")
    logits = lwm.load(f"params::{file}", config=config, dtype="bfloat16")
    error = np.abs(logits.logits(expected["tokens"]).text - expected["logits"])
    assert error.mean() < 0.05 * np.abs(expected["logits"]).mean()


def test_config_may_be_a_size(tmp_path: Path) -> None:
    layer = {
        "attention/wq": (256, 256), "attention/wk": (256, 256), "attention/wv": (256, 256),
        "attention/wo": (256, 256), "feed_forward/w1": (256, 256), "feed_forward/w2": (256, 256),
        "feed_forward/w3": (256, 256), "attention_norm": (256,), "ffn_norm": (256,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "transformer/wte/embedding": (32000, 256),
        "transformer/ln_f/kernel": (256,),
        "lm_head/kernel": (256, 32000),
    }
    for name, shape in layer.items():
        shapes[f"transformer/h/scan_decoder/{name}/kernel"] = (2, *shape)
    arrays = {tuple(name.split("/")): np.zeros(s, np.float16) for name, s in shapes.items()}
    file = flax_files.write_stream(tmp_path / "debug", arrays)
    checkpoint = open_checkpoint(f"params::{file}", config="debug")
    assert (checkpoint.config.num_layers, checkpoint.config.vocab_size) == (2, 32000)
    with pytest.raises(CheckpointError, match="correct --config"):
        open_checkpoint(f"params::{file}", config="200m")


def test_settings_may_extend_a_size_and_use_newer_keys(tmp_path: Path) -> None:
    file = flax_files.write_stream(tmp_path / "file", flax_files.small_model())
    newer = {"max_position_embeddings": 96, "rope_theta": 5e6, "size": "7b", "max_sequence": 1}
    small = {
        k: v for k, v in flax_files.SETTINGS.items() if k not in ("theta", "max_sequence_length")
    }
    (tmp_path / "config.json").write_text(json.dumps(small | newer), encoding="utf-8")
    config = open_checkpoint(f"params::{file}", config=str(tmp_path / "config.json")).config
    assert (config.max_sequence_length, config.rope_theta) == (96, 5e6)
    assert (config.vocab_size, config.rms_norm_eps) == (8, 1e-6)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    arrays = flax_files.small_model()
    del arrays["transformer", "h", "1", "feed_forward", "w3", "kernel"]
    file = flax_files.write_stream(tmp_path / "file", arrays)
    with pytest.raises(
        CheckpointError, match="'transformer/h/1/feed_forward/w3/kernel' is missing"
    ):
        open_checkpoint(f"params::{file}", config=settings(tmp_path))


def test_a_misshaped_tensor_is_named_with_both_shapes(tmp_path: Path) -> None:
    arrays = flax_files.small_model()
    arrays["transformer", "h", "0", "attention", "wo", "kernel"] = np.zeros((4, 5), np.float32)
    file = flax_files.write_map(tmp_path / "file", arrays)
    with pytest.raises(CheckpointError, match=r"0/attention/wo/kernel'.*\[4, 5\].*\[4, 4\]"):
        open_checkpoint(f"flax_params::{file}", config=settings(tmp_path))


def test_a_misshaped_scanned_tensor_is_named(originals: Path, tmp_path: Path) -> None:
    arrays = flax_files.read_stream(originals / "scan" / "text_streaming_params")
    key = ("transformer", "h", "scan_decoder", "attention", "wq", "kernel")
    arrays[key] = arrays[key][:, :, :60]
    file = flax_files.write_stream(tmp_path / "file", arrays)
    with pytest.raises(CheckpointError, match=r"scan_decoder/attention/wq/kernel'.*\[2, 64, 60\]"):
        open_checkpoint(f"params::{file}", config=str(originals / "scan" / "text_config.json"))


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    arrays = flax_files.small_model()
    arrays["transformer", "h", "0", "attention", "bias"] = np.zeros(4, np.float32)
    file = flax_files.write_stream(tmp_path / "file", arrays)
    with pytest.raises(CheckpointError, match="'transformer/h/0/attention/bias' has no place"):
        open_checkpoint(f"params::{file}", config=settings(tmp_path))


def test_truncated_files_are_refused(originals: Path, tmp_path: Path) -> None:
    for name, kind in (
        ("text_streaming_params", "params"),
        ("text_params.msgpack", "flax_params"),
    ):
        whole = (originals / "unrolled" / name).read_bytes()
        cut = tmp_path / name
        cut.write_bytes(whole[: len(whole) * 2 // 3])
        with pytest.raises(CheckpointError, match="cut short"):
            open_checkpoint(
                f"{kind}::{cut}", config=str(originals / "unrolled" / "text_config.json")
            )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": "two"}, "'num_hidden_layers' \\('two'\\)"),
        ({"num_attention_heads": 3, "hidden_size": 20}, r"heads \(3\).*hidden_size \(20\)"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"theta": -1.0}, "rope_theta is -1.0"),
        ({"theta": True}, "'rope_theta' \\(True\\)"),
        ({"num_key_value_heads": 1}, r"num_key_value_heads \(1\)"),
        ({"size": "8b"}, "no model size '8b'"),
        ({"num_hidden_layers": 10**9}, "num_layers is 1000000000"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
    ],
)
def test_wrong_settings_are_named(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    file = flax_files.write_stream(tmp_path / "file", flax_files.small_model())
    with pytest.raises(LwmError, match=message):
        open_checkpoint(f"params::{file}", config=settings(tmp_path, **changes))


def test_missing_settings_are_refused(tmp_path: Path) -> None:
    file = flax_files.write_stream(tmp_path / "file", flax_files.small_model())
    with pytest.raises(ConfigError, match="add --config"):
        open_checkpoint(f"params::{file}")
    with pytest.raises(ConfigError, match=r"'8b'.*7b"):
        open_checkpoint(f"params::{file}", config="8b")
    broken = tmp_path / "broken.json"
    broken.write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid JSON"):
        open_checkpoint(f"params::{file}", config=str(broken))
    del_key = {key: value for key, value in flax_files.SETTINGS.items() if key != "vocab_size"}
    broken.write_text(json.dumps(del_key), encoding="utf-8")
    with pytest.raises(ConfigError, match="'vocab_size' is wrong: Field required"):
        open_checkpoint(f"params::{file}", config=str(broken))
