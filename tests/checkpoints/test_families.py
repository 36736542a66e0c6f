"""Check every family and variant of docs/checkpoints.md against transformers with random weights,
at positions beyond the original length of its rotary embedding."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from gguf import GGMLQuantizationType as Quantization
from tokenizers import models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import lwm
from lwm.checkpoints.open import open_checkpoint
from lwm.checkpoints.write import Format, write_checkpoint
from lwm.core.errors import CapacityError, LwmError
from lwm.engine.request import Request
from lwm.engine.sampling import GREEDY

VOCABULARY, LENGTH, ORIGINAL = 98, 100, 32
HEADS, KEY_HEADS, HEAD = 4, 2, 32
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH))
TOLERANCE = 2e-4


def rope(**settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 500.0, "factor": 4.0, **settings}}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINALLY = {"original_max_position_embeddings": ORIGINAL}
VARIANTS: dict[str, tuple[type[PreTrainedModel], type, dict[str, Any]]] = {
    "Llama 3.1 to 3.3": (
        LlamaForCausalLM,
        LlamaConfig,
        rope(rope_type="llama3", **LLAMA3, **ORIGINALLY),
    ),
    "linear": (LlamaForCausalLM, LlamaConfig, rope(rope_type="linear", factor=3.5)),
    "yarn": (LlamaForCausalLM, LlamaConfig, rope(rope_type="yarn", **ORIGINALLY)),
    "yarn, mscale": (
        LlamaForCausalLM,
        LlamaConfig,
        rope(rope_type="yarn", mscale=0.7, mscale_all_dim=1.2, truncate=False, beta_fast=8.0,
             beta_slow=2.0, **ORIGINALLY),
    ),
    "yarn, attention factor": (
        LlamaForCausalLM,
        LlamaConfig,
        rope(rope_type="yarn", attention_factor=1.3, **ORIGINALLY),
    ),
    "dynamic": (
        LlamaForCausalLM,
        LlamaConfig,
        {"max_position_embeddings": ORIGINAL, **rope(rope_type="dynamic")},
    ),
    "biases": (
        LlamaForCausalLM,
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "hidden_act": "swish"},
    ),
    "Mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "Mistral, unused window": (MistralForCausalLM, MistralConfig, {"sliding_window": 4096}),
    "Qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "Qwen2 with yarn, tied": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"tie_word_embeddings": True, **rope(rope_type="yarn", **ORIGINALLY)},
    ),
}  # fmt: skip


def make(variant: str) -> Any:
    kind, config, settings = VARIANTS[variant]
    torch.manual_seed(0)
    model = kind(
        config(
            **{
                "vocab_size": VOCABULARY,
                "hidden_size": HEADS * HEAD,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": HEADS,
                "num_key_value_heads": KEY_HEADS,
                "max_position_embeddings": 128,
                "initializer_range": 0.1,
                **settings,
            }
        )
    ).eval()
    for name, weight in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


@torch.no_grad()
def peer_logits(model: Any) -> np.ndarray:
    return model(torch.tensor(TOKENS)).logits.float().numpy()


def convert(source: Path, destination: Path, form: Format) -> Path:
    checkpoint = open_checkpoint(str(source))
    write_checkpoint(
        checkpoint, destination, form=form, dtype="float32", save_tokenizer=lambda _: None
    )
    assert open_checkpoint(str(destination)).config == checkpoint.config
    return destination


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(tmp_path: Path, variant: str) -> None:
    model = make(variant)
    model.save_pretrained(tmp_path / "theirs")
    expected = peer_logits(model)
    assert expected.std() > 0.3
    logits = lwm.load(tmp_path / "theirs").logits(TOKENS).text
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
    convert(tmp_path / "theirs", tmp_path / "ours", "lwm")
    exported = convert(tmp_path / "ours", tmp_path / "exported", "huggingface")
    again = AutoModelForCausalLM.from_pretrained(exported).eval()
    np.testing.assert_allclose(peer_logits(again), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("variant", ["Llama 3.1 to 3.3", "Qwen2 with yarn, tied"])
@pytest.mark.parametrize("mesh", [None, "1,1,2,2"])
def test_generation_continues_as_in_transformers(
    tmp_path: Path, variant: str, mesh: str | None
) -> None:
    theirs = make(variant)
    theirs.save_pretrained(tmp_path)
    prompt = TOKENS[:1, :90]
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(torch.tensor(prompt), max_new_tokens=8, do_sample=False)
    model = lwm.load(tmp_path, mesh=mesh)
    engine = model.engine_for(90, 8)
    request = Request(prompt=prompt[0].tolist(), max_tokens=8, sampling=GREEDY)
    tokens = [token.token for token in engine.stream(request)]
    assert tokens == expected[0, 90:].tolist()


def test_dynamic_scaling_is_refused_in_generation_beyond_the_original_length(
    tmp_path: Path,
) -> None:
    make("dynamic").save_pretrained(tmp_path)
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    model = lwm.load(tmp_path)
    assert model.config.max_sequence_length == 4 * ORIGINAL
    model.generate("a " * (ORIGINAL - 4), max_tokens=50)
    assert model.timings.prompt + model.timings.answer <= ORIGINAL
    with pytest.raises(CapacityError, match=rf"{ORIGINAL}, .*dynamic RoPE scaling"):
        model.generate("a " * ORIGINAL)


def edited(directory: Path, **changes: Any) -> str:
    make("Qwen2" if changes.get("model_type") == "qwen2" else "Mistral").save_pretrained(directory)
    file = directory / "config.json"
    data = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(data), encoding="utf-8")
    return str(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_type": "longrope", "short_factor": [1.0] * 16}, "'longrope'"),
        ({"rope_type": "mrope"}, "'mrope'"),
        ({"rope_type": ["yarn"]}, "yarn"),
        ({"rope_type": "linear"}, "no 'factor'"),
        ({"rope_type": "linear", "factor": -1.0}, r"'factor' \(-1.0\)"),
        ({"rope_type": "linear", "factor": "many"}, "'factor'"),
        ({"rope_type": "llama3", "factor": 8.0}, "no 'low_freq_factor'"),
        ({"rope_type": "llama3", "factor": 8.0, **LLAMA3, "low_freq_factor": 4.0}, "less than"),
        ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}, "theta above 1"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ],
)
def test_wrong_scaling_is_refused_in_one_sentence(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    rope_parameters = {"rope_theta": 500.0, **changes}
    with pytest.raises(LwmError, match=message) as raised:
        open_checkpoint(edited(tmp_path, rope_parameters=rope_parameters))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 2},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8, **LLAMA3, **ORIGINALLY},
    ],
)
def test_the_keys_of_older_versions_mean_the_same(tmp_path: Path, scaling: dict[str, Any]) -> None:
    old = edited(tmp_path / "a", rope_scaling=scaling, rope_theta=77.0, rope_parameters=None)
    new = edited(tmp_path / "b", rope_parameters={**scaling, "rope_theta": 77.0})
    config = open_checkpoint(old).config
    assert config == open_checkpoint(new).config
    assert config.rope_theta == 77.0
    assert config.rope_scaling is not None
    assert config.rope_scaling.factor == scaling["factor"]


QWEN2 = {"model_type": "qwen2", "sliding_window": 64, "layer_types": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 64}, "sliding window of 64"),
        ({"sliding_window": 64, "layer_types": ["full_attention"] * 2}, None),
        (QWEN2, None),
        ({**QWEN2, "use_sliding_window": True, "max_window_layers": 1}, "window of 64"),
        ({**QWEN2, "use_sliding_window": True, "max_window_layers": 2}, None),
        ({"model_type": "gemma"}, "'gemma'"),
        ({"hidden_act": "gelu"}, "'gelu'"),
    ],
)
def test_a_sliding_window_is_refused_if_it_is_used(
    tmp_path: Path, changes: dict[str, Any], message: str | None
) -> None:
    model = edited(tmp_path, **changes)
    if message is None:
        assert open_checkpoint(model).config.num_layers == 2
        return
    with pytest.raises(LwmError, match=message):
        open_checkpoint(model)


MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(model: Any, file: Path, kind: Quantization) -> dict[str, np.ndarray]:
    """Write a model as llama.cpp's converter does; return its weights after quantization."""
    config = model.config
    architecture = "qwen2" if config.model_type == "qwen2" else "llama"
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    parameters = config.rope_parameters
    writer.add_rope_freq_base(parameters["rope_theta"])
    if parameters["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(parameters["rope_type"]))
        writer.add_rope_scaling_factor(parameters["factor"])
        if parameters["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(ORIGINAL)
    if parameters["rope_type"] == "llama3":
        rotary: Any = model.model.rotary_emb
        plain = 1.0 / parameters["rope_theta"] ** (np.arange(0, HEAD, 2, dtype="f4") / HEAD)
        factors = (plain / rotary.inv_freq.numpy()).astype(np.float32)
        writer.add_tensor("rope_freqs.weight", factors, raw_dtype=Quantization.F32)
    weights = {}
    for name, tensor in model.state_dict().items():
        whole, _, suffix = name.rpartition(".")
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        stored = WHOLE.get(whole)
        if stored is None:
            _, _, layer, module = whole.split(".", 3)
            stored = f"blk.{layer}.{MODULES[module]}"
            if architecture == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
                halves = array.reshape(-1, 2, HEAD // 2, *array.shape[1:])
                array = halves.swapaxes(1, 2).reshape(array.shape)
        used = kind if array.ndim == 2 else Quantization.F32
        data = gguf.quantize(np.ascontiguousarray(array), used)
        writer.add_tensor(f"{stored}.{suffix}", data, raw_dtype=used)
        weights[name] = gguf.dequantize(data, used)
        if stored.endswith(("attn_q", "attn_k")) and architecture == "llama":
            pairs = weights[name].reshape(-1, HEAD // 2, 2, *array.shape[1:])
            weights[name] = pairs.swapaxes(1, 2).reshape(array.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.mark.parametrize(
    ("variant", "kind"),
    [
        ("Llama 3.1 to 3.3", Quantization.F32),
        ("linear", Quantization.F32),
        ("yarn", Quantization.Q8_0),
        ("biases", Quantization.F32),
        ("Mistral", Quantization.F16),
        ("Qwen2", Quantization.Q8_0),
        ("Qwen2 with yarn, tied", Quantization.F32),
    ],
)
def test_gguf_logits_equal_those_of_transformers(
    tmp_path: Path, variant: str, kind: Quantization
) -> None:
    model = make(variant)
    file = tmp_path / "model.gguf"
    weights = write_gguf(model, file, kind)
    state = {name: torch.tensor(array) for name, array in weights.items()}
    model.load_state_dict(state, strict="lm_head.weight" in state)
    logits = lwm.load(file).logits(TOKENS).text
    np.testing.assert_allclose(logits, peer_logits(model), rtol=0, atol=TOLERANCE)
    exported = convert(file, tmp_path / "exported", "huggingface")
    again = AutoModelForCausalLM.from_pretrained(exported).eval()
    np.testing.assert_allclose(peer_logits(again), peer_logits(model), rtol=0, atol=TOLERANCE)


def test_llama_3_is_recognized_by_its_factors(tmp_path: Path) -> None:
    parameters = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, **LLAMA3}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=HEADS * HEAD, intermediate_size=32,
            num_hidden_layers=1, num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS,
            max_position_embeddings=131_072,
            rope_parameters={**parameters, "original_max_position_embeddings": 8192},
        )
    )  # fmt: skip
    write_gguf(model, tmp_path / "model.gguf", Quantization.F32)
    config = open_checkpoint(str(tmp_path / "model.gguf")).config
    assert config.rope_scaling is not None
    assert config.rope_scaling.rope_type == "llama3"
    assert (config.rope_scaling.factor, config.max_sequence_length) == (32.0, 131_072)
