"""What a model costs: parameters, floating-point operations, memory. Arithmetic alone, no
arrays."""

from lwm.core.params import count
from lwm.models.llama import LlamaConfig, llama_params

BYTES = {"float32": 4, "bfloat16": 2}


def parameter_count(config: LlamaConfig) -> int:
    """All parameters; a tied head counts once."""
    return count(llama_params(config, stacked=False))


def forward_flops(config: LlamaConfig, tokens: int, context: int = 0) -> float:
    """Operations to run `tokens` new tokens after `context` cached ones, causal, head included.

    A multiply-add counts as two. Attention is counted over the pairs that causality allows.
    """
    layer = llama_params(config, stacked=False).layers
    assert isinstance(layer, tuple)
    matrices = count(layer) - 2 * config.hidden_size * config.num_layers
    matrices += config.table_size * config.hidden_size
    pairs = tokens * context + tokens * (tokens + 1) / 2
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * pairs
    return 2.0 * matrices * tokens + attention


def training_flops(config: LlamaConfig, batch: int, sequence: int) -> float:
    """Operations of one forward and backward pass without recomputation: three forwards (Kaplan et
    al. 2020)."""
    return 3.0 * batch * forward_flops(config, sequence)


def weight_bytes(config: LlamaConfig, dtype: str) -> int:
    return parameter_count(config) * BYTES[dtype]


def cache_bytes(config: LlamaConfig, tokens: int, dtype: str, slots: int = 1) -> int:
    """Keys and values of `tokens` positions in every layer."""
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return slots * tokens * per_token * BYTES[dtype]
