"""Check the model against transformers' Llama with the same random weights, and its stacked,
unrolled, fused and sharded forms against each other."""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tiny_model import fuse

from lwm.attention.mask import side
from lwm.attention.reference import reference_attention
from lwm.core.errors import ConfigError
from lwm.core.mesh import make_mesh
from lwm.core.params import initialize
from lwm.core.sharding import DECODE, TRAINING
from lwm.models.forward import (
    embed_tokens,
    feed_forward,
    hidden_states,
    multiply,
    rms_norm,
    text_logits,
)
from lwm.models.llama import (
    MAX_LAYERS,
    Layer,
    Llama,
    LlamaConfig,
    llama_params,
    require_mesh,
)

FAST_COMPILE = {"xla_backend_optimization_level": 0}
CONFIG = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=8, max_sequence_length=64, rope_theta=500.0, rms_norm_eps=1e-5,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 19)).astype(np.int32)


def forward(weights: Llama, config: LlamaConfig, mesh: str | None = None) -> np.ndarray:
    positions = jnp.arange(TOKENS.shape[1])[None].repeat(2, 0)

    def attend(query: Any, key: Any, value: Any, _: Any) -> Any:
        tokens = side(positions)
        return reference_attention(query, key, value, tokens, tokens, causal=True), None

    device_mesh = None if mesh is None else make_mesh(mesh)

    def run(weights: Llama, tokens: Any) -> Any:
        hidden = hidden_states(
            weights, tokens, positions, config, attend, mesh=device_mesh, rules=TRAINING
        )
        return text_logits(weights, hidden)

    return np.asarray(jax.jit(run, compiler_options=FAST_COMPILE)(weights, TOKENS))


def interleaved(kernel: np.ndarray, head_dim: int) -> np.ndarray:
    """Convert a kernel of transformers, (out, in) with pairs in halves, to ours."""
    rows = [
        head + half * (head_dim // 2) + pair
        for head in range(0, len(kernel), head_dim)
        for pair in range(head_dim // 2)
        for half in (0, 1)
    ]
    return kernel[rows].T


def from_transformers(model: Any, config: LlamaConfig) -> Llama:
    """Convert weights by hand, independently of the name tables of checkpoints."""
    state = {name: x.detach().numpy() for name, x in model.state_dict().items()}

    def layer(i: int) -> Layer:
        at = f"model.layers.{i}."
        return Layer(
            attention_norm=state[at + "input_layernorm.weight"],
            query=interleaved(state[at + "self_attn.q_proj.weight"], config.head_dim),  # type: ignore[arg-type]
            key=interleaved(state[at + "self_attn.k_proj.weight"], config.head_dim),  # type: ignore[arg-type]
            value=state[at + "self_attn.v_proj.weight"].T,
            output=state[at + "self_attn.o_proj.weight"].T,
            mlp_norm=state[at + "post_attention_layernorm.weight"],
            gate=state[at + "mlp.gate_proj.weight"].T,
            up=state[at + "mlp.up_proj.weight"].T,
            down=state[at + "mlp.down_proj.weight"].T,
        )

    tree = Llama(
        embedding=state["model.embed_tokens.weight"],
        layers=tuple(layer(i) for i in range(config.num_layers)),
        norm=state["model.norm.weight"],
        head=None if config.tie_embeddings else state["lm_head.weight"].T,
    )
    return jax.tree.map(jnp.asarray, tree)


@pytest.mark.parametrize(
    ("kv_heads", "tied", "head_dim"),
    [(2, False, 8), (4, True, 8), (1, True, 12)],
    ids=["grouped, untied", "all heads, tied", "one key-value head, wider heads"],
)
def test_logits_equal_those_of_transformers(kv_heads: int, tied: bool, head_dim: int) -> None:
    config = replace(CONFIG, num_kv_heads=kv_heads, tie_embeddings=tied, head_dim=head_dim)
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=kv_heads, head_dim=head_dim,
            max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            initializer_range=0.3,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms of ones would hide a missing scale
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
        expected = theirs(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    actual = forward(from_transformers(theirs, config), config)
    assert np.abs(expected).max() > 1
    assert np.abs(actual - expected).max() <= 1e-4


def test_rms_norm_equals_that_of_transformers() -> None:
    x = np.random.default_rng(0).normal(size=(2, 5, 32), scale=0.01).astype(np.float32)
    theirs = transformers.models.llama.modeling_llama.LlamaRMSNorm(32, eps=1e-4)
    with torch.no_grad():
        theirs.weight.uniform_(-1, 1)
        expected = theirs(torch.tensor(x)).numpy()
    scale = jnp.asarray(theirs.weight.detach().numpy())
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), scale, 1e-4), expected, rtol=1e-5)


@cache
def unrolled() -> Llama:
    """Return random weights of `CONFIG`, large enough that every part matters."""
    config = replace(CONFIG, initializer_range=0.3)
    return initialize(llama_params(config, stacked=False), jax.random.key(0), jnp.float32)


@cache
def expected_logits() -> np.ndarray:
    return forward(unrolled(), CONFIG)


def with_layers(layers: Any) -> Llama:
    return replace(unrolled(), layers=layers)


def test_stacked_layers_equal_unrolled_layers() -> None:
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *unrolled().layers)  # type: ignore[misc]
    assert stacked.query.shape == (3, 32, 32)
    assert llama_params(CONFIG, stacked=True).layers.query.shape == (3, 32, 32)  # type: ignore[union-attr]
    actual = forward(with_layers(stacked), CONFIG)
    np.testing.assert_allclose(actual, expected_logits(), atol=2e-5)


def test_fused_layers_equal_plain_layers() -> None:
    actual = forward(with_layers(tuple(fuse(x) for x in unrolled().layers)), CONFIG)  # type: ignore[union-attr]
    np.testing.assert_allclose(actual, expected_logits(), atol=2e-5)


@pytest.mark.parametrize("rows", [(1, 1), (1, 2), (3, 4), (2, 8), (1, 17), (5, 9), (2, 1, 3)])
def test_products_of_few_rows_are_exact(rows: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(*rows, 24)).astype(np.float32)
    kernel = random.normal(size=(40, 24)).astype(np.float32)
    out = jax.jit(multiply, compiler_options=FAST_COMPILE)(x, kernel)
    np.testing.assert_allclose(out, x @ kernel.T, atol=1e-5)


@pytest.mark.parametrize("mesh", ["1,2,2,1", "2,1,2,1"])
def test_sharded_weights_and_rows_give_the_same_logits(mesh: str) -> None:
    np.testing.assert_allclose(forward(unrolled(), CONFIG, mesh), expected_logits(), atol=2e-5)


def test_a_sharded_embedding_looks_up_the_same_rows() -> None:
    table = unrolled().embedding
    embedded = embed_tokens(table, jnp.asarray(TOKENS), make_mesh("1,1,4,1"), DECODE)
    np.testing.assert_array_equal(embedded, np.asarray(table)[TOKENS])


@pytest.mark.parametrize(
    ("length", "block", "shards"), [(18, 1024, 1), (18, 7, 1), (20, 3, 2), (18, 4, 4), (20, 1, 4)]
)
@pytest.mark.parametrize("fused", [False, True])
def test_feed_forward_in_blocks_equals_the_whole(
    length: int, block: int, shards: int, fused: bool
) -> None:
    layer: Any = unrolled().layers[0]  # type: ignore[index]
    x = np.random.default_rng(2).normal(size=(2, length, 32)).astype(np.float32)
    gate, up, down = (np.asarray(w, np.float64) for w in (layer.gate, layer.up, layer.down))
    hidden = x @ gate
    expected = (hidden / (1 + np.exp(-hidden)) * (x @ up)) @ down
    run = jax.jit(partial(feed_forward, block=block, shards=shards), compiler_options=FAST_COMPILE)
    actual = run(fuse(layer) if fused else layer, jnp.asarray(x))
    np.testing.assert_allclose(actual, expected, atol=2e-4)


def test_feed_forward_in_blocks_has_the_gradient_of_the_whole() -> None:
    layer: Any = unrolled().layers[0]  # type: ignore[index]
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 18, 32)).astype(np.float32))

    def loss(layer: Any, block: int) -> jax.Array:
        return (feed_forward(layer, x, block=block, shards=2) ** 2).sum()

    whole, blocks = (
        jax.jit(jax.grad(partial(loss, block=block)), compiler_options=FAST_COMPILE)(layer)
        for block in (100, 4)
    )
    for name in ("gate", "up", "down"):
        expected = np.asarray(getattr(whole, name))
        error = np.abs(np.asarray(getattr(blocks, name)) - expected).max()
        assert error <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, r"num_heads \(4\).*num_kv_heads \(3\)"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"num_layers": MAX_LAYERS + 1}, "num_layers"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **changes)


def test_a_mesh_that_does_not_divide_the_model_is_refused() -> None:
    require_mesh(CONFIG, make_mesh("1,2,2,1"), DECODE)
    with pytest.raises(ConfigError, match=r"kv heads \(2\).* 4 parts"):
        require_mesh(CONFIG, make_mesh("1,1,4,1"), DECODE)
