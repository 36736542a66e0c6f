"""Load weights onto devices: one tensor at a time, from the file to the devices that need it."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lwm.checkpoints.checkpoint import Checkpoint
from lwm.checkpoints.names import named_specs
from lwm.core.hardware import traits
from lwm.core.memory import require_memory
from lwm.core.mesh import FSDP, TENSOR
from lwm.core.params import cast
from lwm.core.progress import progress
from lwm.core.sharding import DECODE, TRAINING, named_sharding
from lwm.models.llama import FUSED, FusedLayer, Layer, Llama, llama_params
from lwm.models.quantized import QuantizedTensor, concatenate, lay_out


def load_weights(checkpoint: Checkpoint, *, dtype: str, mesh: Mesh | None) -> Llama:
    """Load the weights for inference: unrolled layers, in their shards.

    Kernels are fused unless the mesh shards them by the tensor axis, and stay quantized where the
    file is and the device multiplies them faster. The host's memory peaks at one tensor, or one
    fused group, above what its devices keep.
    """
    shards = 1 if mesh is None else mesh.shape[TENSOR] * mesh.shape[FSDP]
    keep_quantized = mesh is None and dtype == "float32" and traits().quantized_kernels
    require_memory(
        checkpoint.weight_bytes(dtype, keep_quantized=keep_quantized) // shards,
        mesh,
        what=f"{checkpoint.source} in {dtype}",
        remedy="use --dtype bfloat16, or spread it over more devices with --mesh",
    )
    specs = named_specs(checkpoint.config)
    fused = mesh is None or mesh.shape[TENSOR] == 1
    quantized = checkpoint.quantized_names() if keep_quantized else {}
    read_quantized = checkpoint.quantized_reader() if quantized else None
    read_dense = checkpoint.reader()

    def read(name: str) -> np.ndarray | QuantizedTensor:
        if read_quantized is not None and name in quantized:
            return read_quantized(name)
        # With order K, a kernel that is stored as (out, in) is not copied to transpose it twice.
        return np.asarray(read_dense(name), dtype=cast(dtype), order="K" if fused else "C")

    kind = FusedLayer if fused else Layer
    parts_of = {
        field: FUSED.get(field, (field,)) if fused else (field,)
        for field in kind.__dataclass_fields__
        if field != "biases"
    }
    with progress(f"loading {checkpoint.source}", len(specs)) as advance:

        def load(*names: str) -> Any:
            arrays, axes = [read(name) for name in names], specs[names[0]].axes
            advance(len(names))
            if (fused and names[0].startswith("layers.")) or isinstance(
                arrays[0], QuantizedTensor
            ):
                return _put(_transpose(arrays), axes[::-1], mesh)
            return _put(arrays[0], axes, mesh)

        def load_layer(i: int) -> Any:
            arrays = {
                field: load(*(f"layers.{i}.{part}" for part in parts))
                for field, parts in parts_of.items()
            }
            biases = {
                field: load(*(f"layers.{i}.biases.{part}" for part in parts))
                for field, parts in parts_of.items()
                if parts[0] in checkpoint.config.biases
            }
            return kind(**arrays, biases=biases)

        return Llama(
            embedding=load("embedding"),
            layers=tuple(load_layer(i) for i in range(checkpoint.config.num_layers)),
            norm=load("norm"),
            head=load("head") if "head" in specs else None,
        )


def _transpose(arrays: list[Any]) -> Any:
    # One kernel, or the parts of a fused kernel: (in, out) -> (out, in).
    if isinstance(arrays[0], QuantizedTensor):
        return lay_out(arrays[0] if len(arrays) == 1 else concatenate(arrays))
    if len(arrays) == 1:
        return np.ascontiguousarray(arrays[0].T)
    return np.concatenate([array.T for array in arrays])


def _put(array: Any, axes: tuple[str, ...], mesh: Mesh | None) -> Any:
    if mesh is None:
        placed = jax.device_put(array, jax.devices()[0])
    else:
        sharding = named_sharding(mesh, axes, DECODE)
        placed = jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
    # Otherwise copies of arrays that are read faster than transferred would accumulate.
    return jax.block_until_ready(placed)


def load_stacked(checkpoint: Checkpoint, *, mesh: Mesh) -> Llama:
    """Load the weights for training: float32, stacked layers, in their shards. The host's memory
    peaks at one stacked tensor above what its devices keep."""
    read = checkpoint.reader()
    specs: Llama = llama_params(checkpoint.config, stacked=True)
    leaves, tree = jax.tree_util.tree_flatten_with_path(specs)
    placed = []
    with progress(f"loading {checkpoint.source}", len(leaves)) as advance:
        for path, spec in leaves:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            field = name.removeprefix("layers.")
            layers = range(checkpoint.config.num_layers)
            names = [name] if field == name else [f"layers.{i}.{field}" for i in layers]
            arrays = [np.asarray(read(part), np.float32) for part in names]

            def shard(index: Any, arrays: list[np.ndarray] = arrays) -> np.ndarray:
                if len(index) == arrays[0].ndim:  # not stacked
                    return arrays[0][index]
                return np.stack([array[index[1:]] for array in arrays[index[0]]])

            sharding = named_sharding(mesh, spec.axes, TRAINING)
            array = jax.make_array_from_callback(spec.shape, sharding, shard)
            placed.append(jax.block_until_ready(array))  # for the reason in `_put`
            advance()
    return jax.tree.unflatten(tree, placed)
