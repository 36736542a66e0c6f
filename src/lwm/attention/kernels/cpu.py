"""Blockwise attention's forward step as a kernel of our own for CPUs, in C (blockwise_cpu.c).

XLA passes each block of scores through memory for maximum, exponential and sum; the kernel keeps
them in a core's own cache. It is for float32, the type that a CPU is fast at, and needs a C
compiler on the machine. What it computes stands in `blockwise`.
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
    """Whether XLA knows the kernel, which is compiled at the first question; where it cannot be,
    a remark says so."""
    try:
        handler = compile_c_function(Path(__file__).with_suffix(".c"), _TARGET)
    except CompilerError as error:
        say(f"Attention on this CPU is left to XLA, which is slower: {error}.")
        return False
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(handler), platform="cpu")
    return True


def serves(queries: Queries, keys: Keys) -> bool:
    """Whether the kernel is here and takes these arrays."""
    arrays = (queries.data, keys.key, keys.value)
    return (
        jax.default_backend() == "cpu"
        and all(x.dtype == jnp.float32 for x in arrays)
        and registered()
    )


def forward(sums: Sums, queries: Queries, keys: Keys, *, causal: bool) -> Sums:
    """Lets every query block meet every key block it needs; all have a batch axis in front."""
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
