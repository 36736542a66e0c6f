"""How a foreign format names and lays out each tensor: one declarative table a format, driving
both directions.

A row pairs our name (the path in the `Llama` tree, `layers.3.query`) with theirs and with the
layout theirs has. Reading turns their layout into ours, (in, out) with interleaved rotary pairs;
writing turns it back.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from lwm.core.params import ParamSpec
from lwm.models.llama import LlamaConfig, llama_params

Turn = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class Layout:
    """A pair of functions that undo each other, of an array and the size of a head."""

    inward: Turn
    outward: Turn
    transposed: bool


def _pairs_from_halves(x: np.ndarray, head_dim: int) -> np.ndarray:
    """(out, in) with pair i at rows i and i + d/2 -> (in, out) with it at columns 2i and 2i +
    1."""
    rows, columns = x.shape
    x = x.reshape(rows // head_dim, 2, head_dim // 2, columns)
    return x.swapaxes(1, 2).reshape(rows, columns).T


def _halves_from_pairs(x: np.ndarray, head_dim: int) -> np.ndarray:
    rows, columns = x.T.shape
    x = x.T.reshape(rows // head_dim, head_dim // 2, 2, columns)
    return x.swapaxes(1, 2).reshape(rows, columns)


AS_IS = Layout(lambda x, _: x, lambda x, _: x, transposed=False)
TRANSPOSED = Layout(lambda x, _: x.T, lambda x, _: x.T, transposed=True)
HALF_SPLIT = Layout(_pairs_from_halves, _halves_from_pairs, transposed=True)


@dataclass(frozen=True)
class Name:
    """One row of a table; `{layer}` stands for the number of the layer on both sides."""

    ours: str
    theirs: str
    layout: Layout


Table = tuple[Name, ...]

HUGGINGFACE: Table = (
    Name("embedding", "model.embed_tokens.weight", AS_IS),
    Name("layers.{layer}.attention_norm", "model.layers.{layer}.input_layernorm.weight", AS_IS),
    Name("layers.{layer}.query", "model.layers.{layer}.self_attn.q_proj.weight", HALF_SPLIT),
    Name("layers.{layer}.key", "model.layers.{layer}.self_attn.k_proj.weight", HALF_SPLIT),
    Name("layers.{layer}.value", "model.layers.{layer}.self_attn.v_proj.weight", TRANSPOSED),
    Name("layers.{layer}.output", "model.layers.{layer}.self_attn.o_proj.weight", TRANSPOSED),
    Name("layers.{layer}.mlp_norm", "model.layers.{layer}.post_attention_layernorm.weight", AS_IS),
    Name("layers.{layer}.gate", "model.layers.{layer}.mlp.gate_proj.weight", TRANSPOSED),
    Name("layers.{layer}.up", "model.layers.{layer}.mlp.up_proj.weight", TRANSPOSED),
    Name("layers.{layer}.down", "model.layers.{layer}.mlp.down_proj.weight", TRANSPOSED),
    Name("norm", "model.norm.weight", AS_IS),
    Name("head", "lm_head.weight", TRANSPOSED),
)

GGUF: Table = (
    Name("embedding", "token_embd.weight", AS_IS),
    Name("layers.{layer}.attention_norm", "blk.{layer}.attn_norm.weight", AS_IS),
    Name("layers.{layer}.query", "blk.{layer}.attn_q.weight", TRANSPOSED),
    Name("layers.{layer}.key", "blk.{layer}.attn_k.weight", TRANSPOSED),
    Name("layers.{layer}.value", "blk.{layer}.attn_v.weight", TRANSPOSED),
    Name("layers.{layer}.output", "blk.{layer}.attn_output.weight", TRANSPOSED),
    Name("layers.{layer}.mlp_norm", "blk.{layer}.ffn_norm.weight", AS_IS),
    Name("layers.{layer}.gate", "blk.{layer}.ffn_gate.weight", TRANSPOSED),
    Name("layers.{layer}.up", "blk.{layer}.ffn_up.weight", TRANSPOSED),
    Name("layers.{layer}.down", "blk.{layer}.ffn_down.weight", TRANSPOSED),
    Name("norm", "output_norm.weight", AS_IS),
    Name("head", "output.weight", TRANSPOSED),
)

ORIGINAL: Table = (
    Name("embedding", "transformer/wte/embedding", AS_IS),
    Name("layers.{layer}.attention_norm", "transformer/h/{layer}/attention_norm/kernel", AS_IS),
    Name("layers.{layer}.query", "transformer/h/{layer}/attention/wq/kernel", AS_IS),
    Name("layers.{layer}.key", "transformer/h/{layer}/attention/wk/kernel", AS_IS),
    Name("layers.{layer}.value", "transformer/h/{layer}/attention/wv/kernel", AS_IS),
    Name("layers.{layer}.output", "transformer/h/{layer}/attention/wo/kernel", AS_IS),
    Name("layers.{layer}.mlp_norm", "transformer/h/{layer}/ffn_norm/kernel", AS_IS),
    Name("layers.{layer}.gate", "transformer/h/{layer}/feed_forward/w1/kernel", AS_IS),
    Name("layers.{layer}.up", "transformer/h/{layer}/feed_forward/w3/kernel", AS_IS),
    Name("layers.{layer}.down", "transformer/h/{layer}/feed_forward/w2/kernel", AS_IS),
    Name("norm", "transformer/ln_f/kernel", AS_IS),
    Name("head", "lm_head/kernel", AS_IS),
)

NATIVE: Table = tuple(Name(row.ours, row.ours, AS_IS) for row in HUGGINGFACE)


def named_specs(config: LlamaConfig) -> dict[str, ParamSpec]:
    """Every parameter of a model by our name, layers one by one."""
    leaves = jax.tree_util.tree_leaves_with_path(llama_params(config, stacked=False))
    return {jax.tree_util.keystr(path, simple=True, separator="."): spec for path, spec in leaves}


def rows(table: Table, config: LlamaConfig) -> dict[str, Name]:
    """The table written out for a model: our name -> its row, layer numbers filled in."""
    written = {}
    for row in table:
        layers = range(config.num_layers) if "{layer}" in row.ours else (0,)
        for layer in layers:
            ours = row.ours.format(layer=layer)
            written[ours] = Name(ours, row.theirs.format(layer=layer), row.layout)
    return {name: written[name] for name in named_specs(config)}
