"""Accumulate blocks of attention on a CPU by a kernel in C (cpu.c).

XLA passes each block of scores through memory three times; the kernel keeps them in a core's
cache. `blockwise.accumulate_in_xla` defines what it computes.
"""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp

from lwm.attention.blocks import Keys, Queries, Sums
from lwm.attention.kernels.compile import CompilerError, compile_c_function
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
    floats = all(x.dtype == jnp.float32 for x in (queries.data, keys.key, keys.value))
    return jax.default_backend() == "cpu" and floats and registered()


def accumulate_in_c(sums: Sums, queries: Queries, keys: Keys, *, causal: bool) -> Sums:
    """Add to each query block the key blocks that it needs; all arrays have a batch axis."""
    sides = [x.astype(jnp.int32) for x in jax.tree.leaves((queries.side, keys.side))]
    carried = (sums.maximum, sums.total, sums.values)
    call = jax.ffi.ffi_call(
        _TARGET,
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in carried],
        input_output_aliases={i: i for i in range(3)},
        vmap_method="sequential",
    )
    maximum, total, values = call(
        *carried, queries.data, *sides[:2], keys.key.swapaxes(-1, -2), keys.value, *sides[2:],
        causal=causal,
    )  # fmt: skip
    return Sums(maximum=maximum, total=total, values=values)
