"""Weights onto devices: one tensor at a time, straight from the file to where it will live."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from lwm.checkpoints.checkpoint import Checkpoint
from lwm.checkpoints.names import named_specs
from lwm.core.memory import require_memory
from lwm.core.mesh import FSDP, TENSOR
from lwm.core.params import cast
from lwm.core.progress import progress
from lwm.core.sharding import DECODE, TRAINING, named_sharding
from lwm.models.llama import FUSED, FusedLayer, Layer, Llama, llama_params
from lwm.models.quantized import QuantizedTensor, concatenate, lay_out

_PART_OF = {part: whole for whole, parts in FUSED.items() for part in parts}


def load_weights(checkpoint: Checkpoint, *, dtype: str, mesh: Mesh | None) -> Llama:
    """The model's weights as inference wants them: layers unrolled, fused where no axis cuts them,
    in their shards. Quantized kernels stay quantized on a CPU without a mesh.

    Memory on the host peaks at one tensor, or one fused group, above what the host's own devices
    keep.

    Raises:
        CapacityError: the weights do not fit into the memory that is free.
    """
    parts = 1 if mesh is None else mesh.shape[TENSOR] * mesh.shape[FSDP]
    keep_quantized = mesh is None and dtype == "float32" and jax.default_backend() == "cpu"
    require_memory(
        checkpoint.weight_bytes(dtype, keep_quantized=keep_quantized) // parts,
        mesh,
        what=f"{checkpoint.source} in {dtype}",
        remedy="use --dtype bfloat16, or spread it over more devices with --mesh",
    )
    specs = named_specs(checkpoint.config)
    fused = mesh is None or mesh.shape[TENSOR] == 1
    placed = {}
    with progress(f"loading {checkpoint.source}", len(specs)) as advance:
        stored = _stored(checkpoint) if keep_quantized else checkpoint.read()
        arrays = _cast(stored, dtype, order="K" if fused else "C")
        for name, axes, array, parts in (
            _fuse(arrays, checkpoint)
            if fused
            else ((name, specs[name].axes, array, 1) for name, array in arrays)
        ):
            if mesh is None:
                placed[name] = jax.device_put(array, jax.devices()[0])
            else:
                placed[name] = jax.make_array_from_callback(
                    array.shape,
                    named_sharding(mesh, axes, DECODE),
                    lambda index, array=array: array[index],
                )
            # Otherwise transfers would pile up copies of what was read faster than it was placed.
            jax.block_until_ready(placed[name])
            advance(parts)
    kind = FusedLayer if fused else Layer
    fields = kind.__dataclass_fields__
    return Llama(
        embedding=placed["embedding"],
        layers=tuple(
            kind(**{field: placed[f"layers.{i}.{field}"] for field in fields})
            for i in range(checkpoint.config.num_layers)
        ),
        norm=placed["norm"],
        head=placed.get("head"),
    )


def load_stacked(checkpoint: Checkpoint, *, mesh: Mesh) -> Llama:
    """The model's weights as training wants them: float32, layers stacked, in their shards.

    Each process reads what its own devices keep; memory on the host peaks at one stacked tensor
    above that.
    """
    read = checkpoint.reader()
    specs: Llama = llama_params(checkpoint.config, stacked=True)
    count = checkpoint.config.num_layers
    leaves, tree = jax.tree_util.tree_flatten_with_path(specs)
    placed = []
    with progress(f"loading {checkpoint.source}", len(leaves)) as advance:
        for path, spec in leaves:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            field = name.removeprefix("layers.")
            one_by_one = [name] if field == name else [f"layers.{i}.{field}" for i in range(count)]
            held = [np.asarray(read(part), np.float32) for part in one_by_one]

            def part(index: Any, held: list[np.ndarray] = held) -> np.ndarray:
                if len(index) == held[0].ndim:
                    return held[0][index]
                return np.stack([array[index[1:]] for array in held[index[0]]])

            sharding = named_sharding(mesh, spec.axes, TRAINING)
            placed.append(jax.make_array_from_callback(spec.shape, sharding, part))
            # Otherwise transfers would pile up copies of what was read faster than it was placed.
            placed[-1].block_until_ready()
            advance()
    return jax.tree.unflatten(tree, placed)


def _stored(checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray | QuantizedTensor]]:
    """Read as `Checkpoint.read` does, but kernels that can stay quantized as such."""
    quantized = checkpoint.quantized_names()
    read = checkpoint.reader()
    read_quantized = checkpoint.quantized_reader() if quantized else read
    for name in named_specs(checkpoint.config):
        yield name, read_quantized(name) if name in quantized else read(name)


def _cast(
    arrays: Iterable[tuple[str, np.ndarray | QuantizedTensor]],
    dtype: str,
    order: Literal["C", "K"],
) -> Iterator[tuple[str, Any]]:
    """With order K, a kernel that a file holds as (out, in) is not copied only to be turned."""
    for name, array in arrays:
        if isinstance(array, QuantizedTensor):
            yield name, array
        else:
            yield name, np.asarray(array, dtype=cast(dtype), order=order)


def _joined(parts: list[Any]) -> Any:
    """A fused kernel, (out, in)."""
    if isinstance(parts[0], QuantizedTensor):
        return lay_out(concatenate(parts))
    return np.concatenate([x.T for x in parts])


def _fuse(
    arrays: Iterable[tuple[str, Any]], checkpoint: Checkpoint
) -> Iterator[tuple[str, tuple[str, ...], Any, int]]:
    """Joins the parts of each fused kernel, which come one after another, and turns the kernels of
    layers to (out, in); passes everything else on."""
    specs = named_specs(checkpoint.config)
    held: list[np.ndarray | QuantizedTensor] = []
    for name, array in arrays:
        prefix, _, field = name.rpartition(".")
        axes, whole = specs[name].axes, _PART_OF.get(field)
        if whole is not None:
            held.append(array)
            if field == FUSED[whole][-1]:
                yield f"{prefix}.{whole}", axes[::-1], _joined(held), len(held)
                held = []
        elif isinstance(array, QuantizedTensor):
            yield name, axes[::-1], lay_out(array), 1
        elif prefix and array.ndim == 2:
            yield name, axes[::-1], np.ascontiguousarray(array.T), 1
        else:
            yield name, axes, array, 1
