"""Provide a random model that compiles in seconds, and its plain forward pass as a reference."""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lwm.attention.api import AttentionConfig
from lwm.core.mesh import make_mesh
from lwm.core.params import initialize, shardings
from lwm.core.sharding import DECODE
from lwm.engine.scoring import TokenRows, forward_logits
from lwm.models.llama import FusedLayer, Llama, LlamaConfig, llama_params

# Large weights, so that the likeliest token does not depend on the order of sums.
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=8, max_sequence_length=4096, initializer_range=0.3,
)  # fmt: skip
LONGEST = 320


@cache
def weights(mesh: str | None = None) -> Llama:
    specs = llama_params(CONFIG, stacked=False)
    tree = initialize(specs, jax.random.key(1), jnp.float32)
    if mesh is None:
        return tree
    return jax.device_put(tree, shardings(specs, make_mesh(mesh), DECODE))


def fuse(layer: Any) -> FusedLayer:
    return FusedLayer(
        attention_norm=layer.attention_norm,
        attention_in=jnp.concatenate([layer.query, layer.key, layer.value], axis=1).T,
        output=layer.output.T,
        mlp_norm=layer.mlp_norm,
        mlp_in=jnp.concatenate([layer.gate, layer.up], axis=1).T,
        down=layer.down.T,
    )


@cache
def fused() -> Llama:
    """Return the same weights in the form for one device."""
    layers = tuple(fuse(layer) for layer in weights().layers)  # type: ignore[union-attr]
    return replace(weights(), layers=layers)


@cache
def _forward() -> Any:
    config = AttentionConfig(implementation="reference")
    return jax.jit(partial(forward_logits, config=CONFIG, attention_config=config))


def full_logits(tokens: Any) -> np.ndarray:
    """Return logits [seq, vocab] by dense attention, without blocks or cache."""
    row = np.zeros((1, LONGEST), np.int32)
    row[0, : len(tokens)] = tokens
    positions = np.arange(LONGEST, dtype=np.int32)[None]
    rows: Any = TokenRows(row, positions, np.zeros_like(row))  # type: ignore[arg-type]
    out = _forward()(weights(), rows)
    return np.asarray(out)[0, : len(tokens)]


def following(prompt: Any, answer: Any) -> np.ndarray:
    """Return the logits that each token of an answer was sampled from, [answer, vocab]."""
    return full_logits([*prompt, *answer])[len(prompt) - 1 : -1]


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([length, seed]).integers(0, CONFIG.vocab_size, length).tolist()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    exact = logits.astype(np.float64)
    shifted = exact - exact.max()
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
