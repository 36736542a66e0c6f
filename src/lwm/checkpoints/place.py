"""Weights onto devices: one tensor at a time, straight from the file to where it will live."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lwm.checkpoints.checkpoint import Checkpoint
from lwm.checkpoints.names import named_specs
from lwm.core.params import cast
from lwm.core.progress import progress
from lwm.core.sharding import DECODE, named_sharding
from lwm.models.llama import Llama, llama_params


def load_weights(checkpoint: Checkpoint, *, dtype: str, mesh: Mesh | None) -> Llama:
    """The model's weights with layers unrolled, sharded as inference wants them.

    Memory on the host peaks at one tensor above what the host's own devices keep.
    """
    specs = named_specs(checkpoint.config)
    placed = {}
    with progress(f"loading {checkpoint.source}", len(specs)) as advance:
        for name, array in checkpoint.read():
            spec = specs[name]
            array = np.asarray(array, dtype=cast(dtype), order="C")
            if mesh is None:
                placed[name] = jax.device_put(array, jax.devices()[0])
            else:
                sharding = named_sharding(mesh, spec.axes, DECODE)
                placed[name] = jax.make_array_from_callback(
                    spec.shape, sharding, lambda index, array=array: array[index]
                )
            # Otherwise transfers would pile up copies of what was read faster than it was placed.
            placed[name].block_until_ready()
            advance()
    return _tree(checkpoint, placed)


def _tree(checkpoint: Checkpoint, placed: dict[str, Any]) -> Llama:
    template = llama_params(checkpoint.config, stacked=False)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: placed[jax.tree_util.keystr(path, simple=True, separator=".")], template
    )
