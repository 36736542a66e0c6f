"""Test GGUF files written by the gguf package: logits against transformers with the dequantized
weights, and one sentence for every broken file."""

import contextlib
import struct
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quantization
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import lwm
from lwm.checkpoints.open import open_checkpoint
from lwm.core.errors import CheckpointError, LwmError
from lwm.engine.request import Request, Token
from lwm.engine.sampling import Sampling
from lwm.generation.load import open_tokenizer
from lwm.models.llama import FusedLayer
from lwm.models.quantized import QuantizedKernel, lay_out

# Rows of 256 numbers: the blocks of the K types are that long.
WIDTH, HEADS, KEY_HEADS, HEAD, VOCABULARY = 256, 8, 2, 32, 64
SHAPES = {
    "token_embd": (VOCABULARY, WIDTH),
    "blk.0.attn_q": (HEADS * HEAD, WIDTH),
    "blk.0.attn_k": (KEY_HEADS * HEAD, WIDTH),
    "blk.0.attn_v": (KEY_HEADS * HEAD, WIDTH),
    "blk.0.attn_output": (WIDTH, HEADS * HEAD),
    "blk.0.ffn_gate": (WIDTH, WIDTH),
    "blk.0.ffn_up": (WIDTH, WIDTH),
    "blk.0.ffn_down": (WIDTH, WIDTH),
    "output": (VOCABULARY, WIDTH),
}
NORMS = ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")
THEIRS = {
    "token_embd": "model.embed_tokens",
    "blk.0.attn_q": "model.layers.0.self_attn.q_proj",
    "blk.0.attn_k": "model.layers.0.self_attn.k_proj",
    "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
    "blk.0.attn_output": "model.layers.0.self_attn.o_proj",
    "blk.0.ffn_gate": "model.layers.0.mlp.gate_proj",
    "blk.0.ffn_up": "model.layers.0.mlp.up_proj",
    "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
    "output": "lm_head",
    "blk.0.attn_norm": "model.layers.0.input_layernorm",
    "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm",
    "output_norm": "model.norm",
}
THETA, EPSILON = 50_000.0, 1e-5
TOKENS = np.random.default_rng(1).integers(0, VOCABULARY, (2, 24))

Tensors = dict[str, tuple[np.ndarray, Quantization]]


def write_gguf(
    file: Path, tensors: Mapping[str, tuple[np.ndarray, Quantization]], **changes: Any
) -> Path:
    # A change to None omits a key.
    architecture = changes.pop("architecture", "llama")
    header: dict[str, Any] = {
        "context_length": 512,
        "embedding_length": WIDTH,
        "block_count": 1,
        "feed_forward_length": WIDTH,
        "head_count": HEADS,
        "head_count_kv": KEY_HEADS,
        "layer_norm_rms_eps": EPSILON,
        "rope_freq_base": THETA,
        "rope_dimension_count": HEAD,
        **changes,
    }
    writer = gguf.GGUFWriter(file, architecture)
    for name, value in header.items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(f"{name}.weight", array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def random_tensors(kind: Quantization) -> Tensors:
    # The norms are float32. Types that gguf cannot quantize in Python are random blocks with
    # scales of a sensible size.
    random = np.random.default_rng(2)
    tensors: Tensors = {}
    for name, shape in SHAPES.items():
        weights = random.normal(scale=0.08, size=shape).astype(np.float32)
        if kind in SCALES_AT:
            size = gguf.GGML_QUANT_SIZES[kind][1]
            data = random.integers(0, 256, (shape[0], shape[1] // 256 * size), np.uint8)
            for at in SCALES_AT[kind]:
                scale = np.float16(random.uniform(1e-4, 2e-4))
                data[:, at : at + 2] = np.frombuffer(scale.tobytes(), np.uint8)
        else:
            data = gguf.quantize(weights, kind)
        tensors[name] = (data, kind)
    for name in NORMS:
        norm = random.uniform(0.5, 1.5, WIDTH).astype(np.float32)
        tensors[name] = (norm, Quantization.F32)
    return tensors


# Where a block's float16 scales lie, in ggml's block_q4_K, block_q5_K and block_q6_K.
SCALES_AT = {Quantization.Q4_K: (0, 2), Quantization.Q5_K: (0, 2), Quantization.Q6_K: (208,)}


def peer(tensors: Tensors) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        rms_norm_eps=EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings="output" not in tensors,
    )
    model = LlamaForCausalLM(config).eval()
    state = {}
    for name, (data, kind) in tensors.items():
        weights = gguf.dequantize(data, kind)
        if name.endswith(("attn_q", "attn_k")):
            pairs = weights.reshape(-1, HEAD // 2, 2, WIDTH)
            weights = pairs.swapaxes(1, 2).reshape(weights.shape)
        state[f"{THEIRS[name]}.weight"] = torch.tensor(weights)
    model.load_state_dict(state, strict="output" in tensors)
    return model


@torch.no_grad()
def peer_logits(tensors: Tensors) -> np.ndarray:
    return peer(tensors)(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize(
    "kind",
    [
        Quantization.F32, Quantization.F16, Quantization.BF16, Quantization.Q8_0,
        Quantization.Q4_0, Quantization.Q4_1, Quantization.Q4_K, Quantization.Q5_K,
        Quantization.Q6_K,
    ],
)  # fmt: skip
def test_logits_equal_transformers_with_dequantized_weights(
    tmp_path: Path, kind: Quantization
) -> None:
    tensors = random_tensors(kind)
    file = write_gguf(tmp_path / "model.gguf", tensors)
    checkpoint = open_checkpoint(str(file))
    assert checkpoint.stored_dtype == kind.name
    logits = lwm.load(file).logits(TOKENS).text
    expected = peer_logits(tensors)
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "kind",
    [
        Quantization.Q8_0, Quantization.Q4_0, Quantization.Q4_1, Quantization.Q4_K,
        Quantization.Q5_K, Quantization.Q6_K,
    ],
)  # fmt: skip
def test_quantized_kernels_equal_the_files_and_stay_quantized(
    tmp_path: Path, kind: Quantization
) -> None:
    file = write_gguf(tmp_path / "model.gguf", random_tensors(kind))
    checkpoint = open_checkpoint(str(file))
    read, quantized = checkpoint.reader(), checkpoint.quantized_reader()
    names = checkpoint.quantized_names()
    assert {"embedding", "layers.0.key", "layers.0.down", "head"} <= names.keys()
    for ours in names:
        kernel, dense = jax.device_put(lay_out(quantized(ours))), read(ours)
        expected = dense if ours == "embedding" else dense.T
        np.testing.assert_array_equal(kernel.dequantize(), expected)
    assert "norm" not in names
    model, dense_model = lwm.load(file), lwm.load(file, mesh="1,1,1,1")
    kernels = [layer.mlp_in for layer in model.weights.layers]  # type: ignore[union-attr]
    assert all(isinstance(kernel, QuantizedKernel) for kernel in [model.weights.head, *kernels])
    assert not isinstance(dense_model.weights.embedding, QuantizedKernel)
    for loaded, quantized in ((model, True), (dense_model, False)):
        assert checkpoint.weight_bytes("float32", keep_quantized=quantized) == weight_bytes(loaded)
    np.testing.assert_allclose(
        model.logits(TOKENS).text, dense_model.logits(TOKENS).text, atol=1e-4
    )
    said = [list(sampled(each)) for each in (model, dense_model)]
    assert [token.token for token in said[0]] == [token.token for token in said[1]]
    logprobs = [[token.logprob for token in tokens] for tokens in said]
    np.testing.assert_allclose(logprobs[0], logprobs[1], atol=1e-4)


def weight_bytes(model: lwm.Model) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(model.weights))


def sampled(model: lwm.Model) -> Iterator[Token]:
    request = Request(prompt=TOKENS[0].tolist(), max_tokens=8, sampling=Sampling(temperature=0.0))
    return model.engine_for(24, 8).stream(request)


def test_a_fused_kernel_uses_the_smallest_block_size_of_its_parts(
    tmp_path: Path,
) -> None:
    """Check a file of the mixture Q4_K_M; a part that is not quantized makes the kernel dense."""
    tensors = random_tensors(Quantization.Q4_K)
    other = random_tensors(Quantization.Q6_K)
    tensors |= {name: other[name] for name in ("blk.0.attn_v", "blk.0.ffn_down")}
    tensors["blk.0.ffn_up"] = random_tensors(Quantization.F16)["blk.0.ffn_up"]
    file = write_gguf(tmp_path / "model.gguf", tensors)
    model = lwm.load(file)
    layer = model.weights.layers[0]  # type: ignore[index]
    assert isinstance(layer, FusedLayer)
    kernels = (layer.attention_in, layer.output, layer.down)
    assert all(isinstance(kernel, QuantizedKernel) for kernel in kernels)
    blocks = [kernel.values.shape[2] for kernel in kernels if isinstance(kernel, QuantizedKernel)]
    assert blocks == [16, 32, 16]
    assert not isinstance(layer.mlp_in, QuantizedKernel)
    expected = open_checkpoint(str(file)).weight_bytes("float32", keep_quantized=True)
    assert expected == weight_bytes(model)
    np.testing.assert_allclose(model.logits(TOKENS).text, peer_logits(tensors), atol=1e-4)


def test_a_model_without_output_is_tied(tmp_path: Path) -> None:
    tensors = random_tensors(Quantization.F16)
    del tensors["output"]
    file = write_gguf(tmp_path / "model.gguf", tensors)
    logits = lwm.load(file).logits(TOKENS).text
    np.testing.assert_allclose(logits, peer_logits(tensors), rtol=0, atol=1e-4)


def test_settings_come_from_the_header(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(
        str(write_gguf(tmp_path / "m.gguf", random_tensors(Quantization.F32)))
    )
    config = checkpoint.config
    assert (config.rope_theta, config.rms_norm_eps) == (THETA, EPSILON)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (HEADS, KEY_HEADS, HEAD)
    assert (config.max_sequence_length, config.vocab_size) == (512, VOCABULARY)
    assert checkpoint.vocabulary is None


def test_tensors_of_many_rows_are_read_in_chunks(tmp_path: Path) -> None:
    tensors = random_tensors(Quantization.F32)
    rows = 9000
    random = np.random.default_rng(3).normal(size=(rows, WIDTH)).astype(np.float32)
    data = gguf.quantize(random, Quantization.Q8_0)
    for name in ("token_embd", "output"):
        tensors[name] = (data, Quantization.Q8_0)
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "model.gguf", tensors)))
    expected = gguf.dequantize(data, Quantization.Q8_0)
    result = dict(checkpoint.read())
    np.testing.assert_array_equal(result["embedding"], expected)
    np.testing.assert_array_equal(result["head"], expected.T)
    kernel = jax.device_put(lay_out(checkpoint.quantized_reader()("head")))
    np.testing.assert_array_equal(kernel.dequantize(), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gemma"}, "architecture 'gemma'"),
        ({"block_count": 2}, r"'blk.1.\S+' is missing"),
        ({"block_count": 2**32 - 1}, "num_layers is 4294967295"),
        ({"block_count": None}, "no 'llama.block_count'"),
        ({"head_count": 0}, "0 heads"),
        ({"head_count_kv": 3}, r"num_heads \(8\).*num_kv_heads \(3\)"),
        ({"head_count_kv": [2, 2]}, "head_count_kv"),
        ({"embedding_length": 2**31}, "llama.rope.dimension_count"),
        ({"feed_forward_length": 255}, r"'blk.0.ffn_gate.weight'.*\[256, 256\].*\[255, 256\]"),
        ({"rope_dimension_count": 16}, "llama.rope.dimension_count"),
        ({"rope_scaling_type": gguf.RopeScalingType.LONGROPE}, "longrope"),
        ({"sliding_window": 256}, "sliding window of 256"),
        ({"layer_norm_rms_eps": None}, "layer_norm_rms_epsilon"),
        ({"rope_freq_base": float("nan")}, "rope_theta is nan"),
    ],
)
def test_unsupported_models_and_wrong_headers_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    file = write_gguf(tmp_path / "model.gguf", random_tensors(Quantization.F32), **changes)
    with pytest.raises(LwmError, match=message) as raised:
        open_checkpoint(str(file))
    assert "\n" not in str(raised.value)


def test_missing_misshaped_and_unsupported_tensors_are_named(tmp_path: Path) -> None:
    tensors = random_tensors(Quantization.F32)
    without = {name: value for name, value in tensors.items() if name != "blk.0.ffn_up"}
    with pytest.raises(CheckpointError, match=r"'blk.0.ffn_up.weight' is missing"):
        open_checkpoint(str(write_gguf(tmp_path / "without.gguf", without)))
    del without["token_embd"]
    with pytest.raises(CheckpointError, match=r"'token_embd.weight' is missing"):
        open_checkpoint(str(write_gguf(tmp_path / "embedding.gguf", without)))
    other = tensors | {"blk.0.ffn_up": (np.zeros((WIDTH, 96), np.float32), Quantization.F32)}
    with pytest.raises(CheckpointError, match=r"ffn_up.weight'.*\[256, 96\].*\[256, 256\]"):
        open_checkpoint(str(write_gguf(tmp_path / "shape.gguf", other)))
    more = tensors | {"blk.0.ffn_gate_inp": (np.zeros((8, WIDTH), np.float32), Quantization.F32)}
    with pytest.raises(CheckpointError, match=r"'blk.0.ffn_gate_inp.weight' has no place"):
        open_checkpoint(str(write_gguf(tmp_path / "experts.gguf", more)))
    q5 = gguf.quantize(np.zeros((WIDTH, WIDTH), np.float32), Quantization.Q5_1)
    with pytest.raises(CheckpointError, match=r"quantized as Q5_1.*Q4_K"):
        open_checkpoint(
            str(
                write_gguf(
                    tmp_path / "type.gguf", tensors | {"blk.0.ffn_up": (q5, Quantization.Q5_1)}
                )
            )
        )
    for count, factor in ((HEAD, 1.0), (HEAD // 2, np.nan), (HEAD // 2, 0.0)):
        factors = np.full(count, factor, np.float32), Quantization.F32
        with pytest.raises(LwmError, match=r"rope_scaling\.factors"):
            open_checkpoint(
                str(write_gguf(tmp_path / "factors.gguf", tensors | {"rope_freqs": factors}))
            )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("whole") / "model.gguf"
    tokens = ["<unk>", "<s>", "</s>", *(f"▁piece{i}" for i in range(VOCABULARY - 3))]
    write_gguf(
        file,
        random_tensors(Quantization.Q4_0),
        tokenizer_model="llama",
        token_list=tokens,
        token_scores=[0.0] * VOCABULARY,
        token_types=[2, 3, 3] + [1] * (VOCABULARY - 3),
        bos_token_id=1,
        eos_token_id=2,
        chat_template="{{ messages }}",
    )
    return file.read_bytes()


def test_truncated_files_are_refused(tmp_path: Path, whole: bytes) -> None:
    file = tmp_path / "cut.gguf"
    for length in (0, 3, 4, 8, 20, 24, 60, 200, 1000, 3000, len(whole) // 2, len(whole) - 40):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="broken or cut short") as raised:
            open_checkpoint(str(file))
        assert "\n" not in str(raised.value)


def header(tensors: int, pairs: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + rest


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


ARCHITECTURE = string(b"general.architecture") + struct.pack("<I", 8) + string(b"llama")


def tensor(*sizes: int, kind: int = 0, offset: int = 0) -> bytes:
    return (
        string(b"token_embd.weight")
        + struct.pack("<I", len(sizes))
        + struct.pack(f"<{len(sizes)}Q", *sizes)
        + struct.pack("<IQ", kind, offset)
    )


@pytest.mark.parametrize(
    "content",
    [
        b"GGML" + bytes(60),
        b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
        header(0, 2**63),
        header(2**63, 0),
        header(2**64 - 1, 2**64 - 1),
        header(0, 1, struct.pack("<Q", 2**63)),
        header(0, 1, struct.pack("<Q", 2**64 - 1) + bytes(20)),
        header(0, 1, string(b"a") + struct.pack("<IQ", 8, 2**62)),
        header(0, 1, string(b"a") + struct.pack("<IIQ", 9, 4, 2**62)),
        header(0, 1, string(b"a") + struct.pack("<IIQ", 9, 9, 2**62)),
        header(0, 1, string(b"a") + struct.pack("<I", 77)),
        header(0, 2, (string(b"a") + struct.pack("<II", 4, 1)) * 2),
        header(0, 1, string(b"general.alignment") + struct.pack("<II", 4, 0)),
        header(0, 1, string(b"\xff\xfe") + struct.pack("<II", 4, 1)),
        header(1, 1, ARCHITECTURE + string(b"t") + struct.pack("<I", 2**32 - 1)),
        header(1, 1, ARCHITECTURE + tensor(2**40, 2**10)),
        header(1, 1, ARCHITECTURE + tensor(2**32, 2**32)),
        header(1, 1, ARCHITECTURE + tensor(2**63, 2**63)),
        header(1, 1, ARCHITECTURE + tensor(4, 4, offset=2**63)),
        header(1, 1, ARCHITECTURE + tensor(4, 4, offset=2**64 - 1)),
        header(1, 1, ARCHITECTURE + tensor(4, 4, kind=4000)),
        header(1, 1, ARCHITECTURE + tensor(31, 4, kind=2)),
        header(2, 1, ARCHITECTURE + tensor(1, 1) * 2 + bytes(200)),
        header(0, 1, string(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 2000),
    ],
)
def test_headers_with_impossible_sizes_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "absurd.gguf"
    file.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"broken or cut short|has no '") as raised:
            open_checkpoint(str(file))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "pair",
    [
        string(b"general.architecture") + struct.pack("<I", 8) + string(b"\xff\xff"),
        string(b"general.architecture") + struct.pack("<II", 4, 1),
        string(b"general.name") + struct.pack("<II", 4, 1),
    ],
    ids=["not UTF-8", "a number", "another key"],
)
def test_headers_without_an_architecture_are_refused(tmp_path: Path, pair: bytes) -> None:
    file = tmp_path / "nameless.gguf"
    file.write_bytes(header(0, 1, pair + bytes(64)))
    with pytest.raises(CheckpointError, match=r"general.architecture"):
        open_checkpoint(str(file))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_scores": [0.0] * 4}, "5 tokens.*4 scores"),
        ({"bos_token_id": 77}, "beginning-of-text token is 77"),
        ({"eos_token_id": 5}, "end-of-text token is 5"),
        (
            {"tokenizer_model": "gpt2", "tokenizer_pre": "poro-chat", "token_merges": ["a b"]}
            | {"token_list": ["<s>", "</s>", "a", "b", "ab"]},
            "poro-chat",
        ),
        ({"tokenizer_model": "gpt2", "token_merges": ["a zebra"]}, "do not fit together"),
        ({"tokenizer_model": "gpt2"}, "no 'tokenizer.ggml.merges'"),
        ({"token_list": [b"a", b"b", b"c", b"d", b"e", b"f"]}, "6 tokens"),
    ],
)
def test_inconsistent_tokenizers_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    fields: dict[str, Any] = {
        "tokenizer_model": "llama",
        "token_list": ["<unk>", "<s>", "</s>", "a", "b"],
        "token_scores": [0.0] * 5,
        "token_types": [2, 3, 3, 1, 1],
        **changes,
    }
    file = write_gguf(tmp_path / "model.gguf", random_tensors(Quantization.F32), **fields)
    with pytest.raises(CheckpointError, match=message) as raised:
        open_tokenizer(open_checkpoint(str(file)), None)
    assert "\n" not in str(raised.value)


def test_negative_token_ids_are_refused(tmp_path: Path, whole: bytes) -> None:
    key = b"tokenizer.ggml.bos_token_id"
    at = whole.index(key) + len(key)
    damaged = whole[:at] + struct.pack("<Ii", 5, -100_000) + whole[at + 8 :]
    (tmp_path / "model.gguf").write_bytes(damaged)
    with pytest.raises(CheckpointError, match="beginning-of-text token is -100000"):
        open_tokenizer(open_checkpoint(str(tmp_path / "model.gguf")), None)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_random_damage_raises_no_other_error(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, data: st.DataObject
) -> None:
    # Only in the header: any bytes are valid weights.
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, 3800))
        damage = data.draw(st.binary(min_size=1, max_size=8))
        content[at : at + len(damage)] = damage
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    file = tmp_path_factory.getbasetemp() / "damaged.gguf"
    file.write_bytes(content)
    with contextlib.suppress(LwmError):
        open_checkpoint(str(file))
