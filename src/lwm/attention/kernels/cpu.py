"""Accumulate blocks of attention on a CPU by a kernel in C (cpu.c).

XLA passes each block of scores through memory for maximum, exponential and sum; the kernel keeps
them in a core's own cache. It supports float32, the fast type of CPUs, and needs a C compiler on
the machine. `blockwise.accumulate_in_xla` defines what it computes.
"""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp

from lwm.attention.blocks import Keys, Queries
from lwm.attention.kernels.compile import CompilerError, compile_c_function
from lwm.attention.online_softmax import Sums
from lwm.core.progress import say

_TARGET = "lwm_blockwise_forward"


@cache
def registered() -> bool:
    """Compile the kernel and register it with XLA; warn and return False if that fails."""
    try:
        handler = compile_c_function(Path(__file__).with_suffix(".c"), _TARGET)
    except CompilerError as error:
        say(f"Attention on this CPU is computed by XLA, which is slower: {error}.")
        return False
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(handler), platform="cpu")
    return True


def supports(queries: Queries, keys: Keys) -> bool:
    """Return whether the kernel is available and supports these arrays."""
    arrays = (queries.data, keys.key, keys.value)
    return (
        jax.default_backend() == "cpu"
        and all(x.dtype == jnp.float32 for x in arrays)
        and registered()
    )


def accumulate_in_c(sums: Sums, queries: Queries, keys: Keys, *, causal: bool) -> Sums:
    """Add to each query block the key blocks that it needs; all arrays have a batch axis."""
    sides = [
        x.astype(jnp.int32)
        for side in (queries.side, keys.side)
        for x in (side.positions, side.segments)
    ]
    carried = (sums.maximum, sums.total, sums.values)
    call = jax.ffi.ffi_call(
        _TARGET,
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in carried],
        input_output_aliases={i: i for i in range(len(carried))},
        vmap_method="sequential",
    )
    maximum, total, values = call(
        *carried, queries.data, *sides[:2], keys.key.swapaxes(-1, -2), keys.value, *sides[2:],
        causal=causal,
    )  # fmt: skip
    return Sums(maximum=maximum, total=total, values=values)
