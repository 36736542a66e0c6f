"""How a foreign format names and lays out each tensor: one declarative table a format, driving
both directions.

A row pairs our name (the path in the `Llama` tree, `layers.3.query`) with theirs and with the
layout theirs has. Reading turns their layout into ours, (in, out) with interleaved rotary pairs;
writing turns it back. Where a format keeps the ids of text and of vision in tensors of their own,
each has a row, and ours is both, one behind the other.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

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
    """One line of a table; `{layer}` stands for the number of the layer on both sides.

    Args:
        part: the ids whose entries theirs holds; None where it holds those of all.
    """

    ours: str
    theirs: str
    layout: Layout
    part: Literal["text", "vision"] | None = None


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
    Name("embedding", "transformer/wte/embedding", AS_IS, "text"),
    Name("embedding", "transformer/vte/embedding", AS_IS, "vision"),
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
    Name("head", "lm_head/kernel", AS_IS, "text"),
    Name("head", "vision_head/kernel", AS_IS, "vision"),
)

NATIVE: Table = tuple(Name(row.ours, row.ours, AS_IS) for row in HUGGINGFACE)


def named_specs(config: LlamaConfig) -> dict[str, ParamSpec]:
    """Every parameter of a model by our name, layers one by one."""
    leaves = jax.tree_util.tree_leaves_with_path(llama_params(config, stacked=False))
    return {jax.tree_util.keystr(path, simple=True, separator="."): spec for path, spec in leaves}


@dataclass(frozen=True)
class Row:
    """A line of a table, written out for a model.

    Args:
        shape: of theirs.
        axis: of ours, along which theirs is the part from `start` to `stop`.
    """

    theirs: str
    layout: Layout
    shape: tuple[int, ...]
    axis: int
    start: int
    stop: int


def rows(table: Table, config: LlamaConfig) -> dict[str, tuple[Row, ...]]:
    """The table written out for a model: our name -> its rows, the parts of ours in order."""
    specs = named_specs(config)
    written: dict[str, tuple[Row, ...]] = dict.fromkeys(specs, ())
    for name in table:
        if name.part == "vision" and config.vision is None:
            continue
        for layer in range(config.num_layers) if "{layer}" in name.ours else (0,):
            ours = name.ours.format(layer=layer)
            if ours in specs:  # a tied head has no tensor
                row = _row(name, name.theirs.format(layer=layer), specs[ours], config)
                written[ours] += (row,)
    return written


def _row(name: Name, theirs: str, spec: ParamSpec, config: LlamaConfig) -> Row:
    axis = 0 if name.part is None else spec.axes.index("vocab")
    start = config.vocab_size if name.part == "vision" else 0
    stop = config.vocab_size if name.part == "text" else spec.shape[axis]
    shape = (*spec.shape[:axis], stop - start, *spec.shape[axis + 1 :])
    return Row(
        theirs, name.layout, shape[:: -1 if name.layout.transposed else 1], axis, start, stop
    )


def inward(parts: Sequence[Row], read: Callable[[str], np.ndarray], head_dim: int) -> np.ndarray:
    """Our tensor from its rows.

    Args:
        read: a tensor of theirs by its name.
    """
    arrays = [row.layout.inward(read(row.theirs), head_dim) for row in parts]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=parts[0].axis)


def outward(
    parts: Sequence[Row], array: np.ndarray, head_dim: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Their names and tensors from ours."""
    for row in parts:
        cut = (slice(None),) * row.axis + (slice(row.start, row.stop),)
        yield row.theirs, row.layout.outward(array[cut], head_dim)
