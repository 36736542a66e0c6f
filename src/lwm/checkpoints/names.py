"""Describe how a format names and lays out each tensor, in one table that drives both directions.

A row of a table pairs our name (the path in the `Llama` tree, such as `layers.3.query`) with the
name and the layout that the tensor has in the file. Reading converts it to our layout, (in, out)
with interleaved rotary pairs; writing converts it back. Where a format stores the text and the
vision part of a table as two tensors, each has a row, and ours is their concatenation.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np

from lwm.core.params import ParamSpec
from lwm.models.llama import KERNELS, Kernel, LlamaConfig, llama_params


@dataclass(frozen=True)
class TensorLayout:
    """Describe how a file lays out a kernel (out, in), or a bias (out).

    Args:
        transposed: whether ours is the transpose.
        halves: whether rotary pair i of a head is in rows i and i + d/2; ours is in 2i and 2i + 1.
    """

    transposed: bool = False
    halves: bool = False

    def from_file(self, x: np.ndarray, head_dim: int) -> np.ndarray:
        """Return a file's array in our layout."""
        x = self.rows_from_file(x, head_dim)
        return x.T if self.transposed else x

    def rows_from_file(self, x: np.ndarray, head_dim: int) -> np.ndarray:
        """Return an array (out, ...) with its rows in our order."""
        if not self.halves:
            return x
        heads = x.reshape(len(x) // head_dim, 2, head_dim // 2, *x.shape[1:])
        return heads.swapaxes(1, 2).reshape(x.shape)

    def to_file(self, x: np.ndarray, head_dim: int) -> np.ndarray:
        """Return an array of ours in the file's layout."""
        x = x.T if self.transposed else x
        if not self.halves:
            return x
        heads = x.reshape(len(x) // head_dim, head_dim // 2, 2, *x.shape[1:])
        return heads.swapaxes(1, 2).reshape(x.shape)


AS_IS = TensorLayout()
TRANSPOSED = TensorLayout(transposed=True)
HALF_SPLIT = TensorLayout(transposed=True, halves=True)


@dataclass(frozen=True)
class NameRow:
    """Pair our name of a tensor with a file's; `{layer}` is the layer's number in both."""

    name: str
    stored_name: str
    layout: TensorLayout
    ids: Literal["text", "vision"] | None = None  # the part of our table, if not the whole


NameTable = tuple[NameRow, ...]


def kernel_rows(modules: Mapping[Kernel, tuple[str, TensorLayout]], prefix: str) -> NameTable:
    """Return the rows of the kernels of a layer and of their biases.

    Args:
        modules: a file's name of each kernel, without `.weight`, and the layout.
        prefix: of these names, with `{layer}`.
    """
    return tuple(
        NameRow(f"layers.{{layer}}.{within}{kernel}", f"{prefix}.{module}.{kind}", layout)
        for kernel, (module, layout) in modules.items()
        for within, kind in (("", "weight"), ("biases.", "bias"))
    )


_PARTS = ("attention_norm", "mlp_norm", *KERNELS, *(f"biases.{kernel}" for kernel in KERNELS))
_LAYER = [f"layers.{{layer}}.{part}" for part in _PARTS]
LWM_NAMES = tuple(NameRow(name, name, AS_IS) for name in ("embedding", *_LAYER, "norm", "head"))


def named_specs(config: LlamaConfig) -> dict[str, ParamSpec]:
    """Return the spec of every parameter by our name, one entry per layer."""
    leaves = jax.tree_util.tree_leaves_with_path(llama_params(config, stacked=False))
    return {jax.tree_util.keystr(path, simple=True, separator="."): spec for path, spec in leaves}


@dataclass(frozen=True)
class StoredTensor:
    """Describe one tensor of a file, which contains our tensor from `start` to `stop`."""

    name: str
    layout: TensorLayout
    shape: tuple[int, ...]  # in the file's layout
    axis: int
    start: int
    stop: int


def stored_tensors(table: NameTable, config: LlamaConfig) -> dict[str, tuple[StoredTensor, ...]]:
    """Map each name of ours to the stored tensors that form it, in order."""
    specs = named_specs(config)
    stored: dict[str, tuple[StoredTensor, ...]] = dict.fromkeys(specs, ())
    for row in table:
        if row.ids == "vision" and config.vision is None:
            continue
        for layer in range(config.num_layers) if "{layer}" in row.name else (0,):
            name, stored_name = (x.format(layer=layer) for x in (row.name, row.stored_name))
            if name in specs:  # a tied head has no tensor, and few kernels have a bias
                shape = list(specs[name].shape)
                axis = 0 if row.ids is None else specs[name].axes.index("vocab")
                start = config.vocab_size if row.ids == "vision" else 0
                stop = config.vocab_size if row.ids == "text" else shape[axis]
                shape[axis] = stop - start
                shape = tuple(reversed(shape) if row.layout.transposed else shape)
                stored[name] += (StoredTensor(stored_name, row.layout, shape, axis, start, stop),)
    return stored


def from_stored(
    parts: Sequence[StoredTensor], read: Callable[[str], np.ndarray], head_dim: int
) -> np.ndarray:
    """Assemble our tensor from its parts; `read` reads a tensor of the file by its name."""
    arrays = [part.layout.from_file(read(part.name), head_dim) for part in parts]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=parts[0].axis)


def to_stored(
    parts: Sequence[StoredTensor], array: np.ndarray, head_dim: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the names and arrays that a file stores for one of our tensors."""
    for part in parts:
        index = (slice(None),) * part.axis + (slice(part.start, part.stop),)
        yield part.name, part.layout.to_file(array[index], head_dim)
