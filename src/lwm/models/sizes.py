"""List the eight sizes of the original by name.

Source: LargeWorldModel/LWM; all are Llama 1 shapes.
"""

from lwm.core.errors import ConfigError
from lwm.models.llama import LlamaConfig

# name: hidden size, feed-forward size, layers, heads, context, epsilon of the norms
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
