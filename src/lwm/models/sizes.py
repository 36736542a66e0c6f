"""List the original's sizes by name, and calculate what a model of any size costs."""

import jax

from lwm.core.errors import ConfigError
from lwm.core.params import count
from lwm.models.llama import LlamaConfig, llama_params

BYTES = {"float32": 4, "bfloat16": 2}

# From LargeWorldModel/LWM. Name: hidden size, feed-forward size, layers, heads, context, epsilon.
_SIZES = {
    "debug": (256, 256, 2, 2, 2048, 1e-6),
    "200m": (1024, 2048, 14, 8, 2048, 1e-6),
    "1b": (2048, 5504, 22, 16, 2048, 1e-6),
    "3b": (3200, 8640, 26, 32, 2048, 1e-6),
    "7b": (4096, 11008, 32, 32, 4096, 1e-6),
    "13b": (5120, 13824, 40, 40, 2048, 1e-6),
    "30b": (6656, 17920, 60, 52, 2048, 1e-6),
    "65b": (8192, 22016, 80, 64, 2048, 1e-5),
}

NAMES = tuple(_SIZES)


def size(name: str) -> LlamaConfig:
    """Return the configuration of a named size; raise ConfigError if there is none."""
    if name not in _SIZES:
        raise ConfigError(f"there is no model size {name!r}; choose one of {', '.join(NAMES)}")
    hidden, mlp, layers, heads, length, epsilon = _SIZES[name]
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_sequence_length=length,
        rms_norm_eps=epsilon,
    )


def parameter_count(config: LlamaConfig) -> int:
    """Count all parameters; a tied head counts once."""
    return count(llama_params(config, stacked=False))


def training_flops(config: LlamaConfig, *, tokens: int, pairs: int, adapters: int = 0) -> float:
    """Count the operations of a forward and a backward pass, without recomputation.

    Kernels cost one product forward and two backward, or one if adapters get their gradient.

    Args:
        tokens: tokens that are not padding.
        pairs: pairs of a query and a key that causality and segments allow.
        adapters: parameters of the adapters; 0 if the whole model is trained.

    Source: Kaplan et al. 2020 (arXiv 2001.08361), section 2.1, here with causal attention.
    """
    layers = llama_params(config, stacked=False).layers
    kernels = [spec for spec in jax.tree.leaves(layers) if len(spec.shape) == 2]
    parameters = count(kernels) + config.table_size * config.hidden_size
    products = (4.0 if adapters else 6.0) * parameters * tokens
    attention = 12.0 * config.num_layers * config.num_heads * config.head_dim * pairs
    return products + 6.0 * adapters * tokens + attention


def weight_bytes(config: LlamaConfig, dtype: str) -> int:
    """Return the size of all parameters in a type of `BYTES`."""
    return parameter_count(config) * BYTES[dtype]


def cache_bytes(config: LlamaConfig, tokens: int, dtype: str, slots: int = 1) -> int:
    """Return the size of the keys and values of `tokens` positions in every layer."""
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return slots * tokens * per_token * BYTES[dtype]
