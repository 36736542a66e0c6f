"""Provide a random vision-language model whose frames have four codes, and a tokenizer for it."""

import json
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import decoders, pre_tokenizers

from lwm.attention.api import AttentionConfig
from lwm.core.params import initialize
from lwm.data.text.tokenizer import Tokenizer
from lwm.engine.scoring import TokenRows, forward_logits
from lwm.generation.model import Model
from lwm.models.llama import Llama, LlamaConfig, llama_params
from lwm.models.vision_tokens import VisionVocabulary

VISION = VisionVocabulary(size=24, codes=20, codes_per_frame=4)
CONFIG = LlamaConfig(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2,
    num_kv_heads=2, head_dim=16, max_sequence_length=256, initializer_range=0.3, vision=VISION,
)  # fmt: skip
LONGEST = 192


@cache
def weights() -> Llama:
    return initialize(llama_params(CONFIG, stacked=False), jax.random.key(3), jnp.float32)


@cache
def tokenizer() -> Tokenizer:
    """Make a token for each byte, one that begins a text and one that ends it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {text: i + 2 for i, text in enumerate(alphabet)}
    added = [
        {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, text in enumerate(("<s>", "</s>"))
    ]  # fmt: skip
    backend = tokenizers.Tokenizer.from_str(
        json.dumps(
            {
                "version": "1.0", "added_tokens": added, "normalizer": None,
                "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False,
                                  "trim_offsets": True, "use_regex": False},
                "post_processor": None, "decoder": None,
                "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
            }
        )
    )  # fmt: skip
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return Tokenizer(backend=backend, bos="<s>", eos=(1,))


def model(config: LlamaConfig = CONFIG) -> Model:
    return Model(
        source="tiny-vision-model",
        config=config,
        weights=weights(),
        open_tokenizer=tokenizer,
        dtype="float32",
        mesh=None,
    )


@cache
def _forward() -> Any:
    attention = AttentionConfig(implementation="reference")
    return jax.jit(partial(forward_logits, config=CONFIG, attention_config=attention))


def following(prompt: Any, answer: Any) -> np.ndarray:
    """Compute the logits that each token of an answer was sampled from, [answer, table]."""
    text = [*prompt, *answer]
    row = np.zeros((1, LONGEST), np.int32)
    row[0, : len(text)] = text
    positions = np.arange(LONGEST, dtype=np.int32)[None]
    rows: Any = TokenRows(row, positions, np.zeros_like(row))  # type: ignore[arg-type]
    out = _forward()(weights(), rows)
    return np.asarray(out)[0, len(prompt) - 1 : len(text) - 1]


def ids(text: str) -> list[int]:
    return tokenizer().encode_controlled(text)
