"""What a model costs: parameters, floating-point operations, memory. Arithmetic alone, no
arrays."""

from lwm.core.params import count
from lwm.models.llama import LlamaConfig, llama_params

BYTES = {"float32": 4, "bfloat16": 2}


def parameter_count(config: LlamaConfig) -> int:
    """All parameters; a tied head counts once."""
    return count(llama_params(config, stacked=False))


def forward_flops(config: LlamaConfig, tokens: int, context: int = 0) -> float:
    """Count the operations to run `tokens` new tokens after `context` cached ones, head included.

    A multiply-add counts as two. Attention is counted over the pairs that causality allows.
    """
    pairs = tokens * context + tokens * (tokens + 1) // 2
    return _kernel_flops(config, tokens) + _attention_flops(config, pairs)


def training_flops(config: LlamaConfig, *, tokens: int, pairs: int, adapters: int = 0) -> float:
    """Count the operations of a forward and a backward pass, recomputation left out.

    A backward pass computes the gradients of both factors of a product, each for the price of the
    product: kernels cost 3 x 2 x parameters x tokens, and attention 3 x 4 x layers x heads x
    head_dim x pairs. Beside adapters the kernels are frozen and get no gradient: they cost 2 x 2 x
    parameters x tokens, and the adapters 3 x 2 x parameters x tokens.

    Args:
        tokens: tokens that are not padding.
        pairs: pairs of a query and a key that causality and segments allow.
        adapters: parameters of the adapters; 0 if the whole model is trained.

    Source: Kaplan et al. 2020 (arXiv 2001.08361), section 2.1, here with causal attention.
    """
    kernels = (2 if adapters else 3) * _kernel_flops(config, tokens)
    return kernels + 6.0 * adapters * tokens + 3 * _attention_flops(config, pairs)


def _kernel_flops(config: LlamaConfig, tokens: int) -> float:
    layer = llama_params(config, stacked=False).layers
    assert isinstance(layer, tuple)
    kernels = count(layer) - 2 * config.hidden_size * config.num_layers
    return 2.0 * (kernels + config.table_size * config.hidden_size) * tokens


def _attention_flops(config: LlamaConfig, pairs: int) -> float:
    return 4.0 * config.num_layers * config.num_heads * config.head_dim * pairs


def weight_bytes(config: LlamaConfig, dtype: str) -> int:
    return parameter_count(config) * BYTES[dtype]


def cache_bytes(config: LlamaConfig, tokens: int, dtype: str, slots: int = 1) -> int:
    """Keys and values of `tokens` positions in every layer."""
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return slots * tokens * per_token * BYTES[dtype]
