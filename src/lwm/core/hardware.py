"""Describe what each platform does well.

Other modules ask `traits` instead of comparing platform names, so a new kind of device is
described here and nowhere else. `docs/log.md` has the measurements for the CPU.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Traits:
    """Describe what one platform does well.

    Args:
        dtype: the fastest floating-point type for inference.
        draft_tokens: how many tokens, over all slots, a decode step may take for about the price
            of one token per slot, because it waits for the weights.
        quantized_kernels: whether products read quantized kernels faster than float32 ones.
        transposed_rows: up to how many rows a product is faster with the kernel on the left.
        separate_heads: up to how many query heads per key-value head decode attention is faster
            as one matrix-vector product each.
        codec_pixels: pixels in one batch that a VQGAN encodes or decodes.
        codec_batches: whether several such batches run side by side, one per core.
        bounded_launches: whether a program launched on several devices must finish before many
            more are launched (see `mesh.pace`).
        host_memory: whether all devices share the memory of the host.
    """

    dtype: Literal["float32", "bfloat16"]
    draft_tokens: int
    quantized_kernels: bool
    transposed_rows: int
    separate_heads: int
    codec_pixels: int
    codec_batches: bool
    bounded_launches: bool
    host_memory: bool


_CPU = Traits(
    dtype="float32",
    draft_tokens=16,
    quantized_kernels=True,
    transposed_rows=16,
    separate_heads=8,
    codec_pixels=1 << 15,
    codec_batches=True,
    bounded_launches=True,
    host_memory=True,
)
_ACCELERATOR = Traits(
    dtype="bfloat16",
    draft_tokens=128,
    quantized_kernels=False,
    transposed_rows=0,
    separate_heads=0,
    codec_pixels=1 << 20,
    codec_batches=False,
    bounded_launches=False,
    host_memory=False,
)


def traits(mesh: Mesh | None = None) -> Traits:
    """Return the facts about the platform of a mesh, or about JAX's default one."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return traits_of(platform)


def traits_of(platform: str) -> Traits:
    """Return the facts about a platform, by JAX's name for it."""
    return _CPU if platform == "cpu" else _ACCELERATOR


def precise(function: Callable[..., Result], dtype: Any) -> Callable[..., Result]:
    """Wrap a function to be traced so that its products have the precision of their type.

    Accelerators multiply float32 in TF32 or bfloat16 unless asked for more.

    Args:
        dtype: the type that the function computes in; only float32 changes anything.
    """

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Result:
        precision = "highest" if jnp.dtype(dtype) == jnp.float32 else "default"
        with jax.default_matmul_precision(precision):
            return function(*args, **kwargs)

    return wrapped


_PEAK_FLOPS: Mapping[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(devices: int) -> float:
    """Return the peak throughput of some of this run's devices, or 0 if it is not known.

    Figures of accelerators come from the vendors' data sheets (dense bfloat16 products). A CPU is
    measured, and counts once however many devices are simulated on it.

    Returns:
        Floating-point operations per second.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measure_peak_flops() * jax.process_count()
    names = [name for name in _PEAK_FLOPS if device.device_kind.startswith(name)]
    return _PEAK_FLOPS[max(names, key=len)] * devices if names else 0.0


def _measure_peak_flops(size: int = 1024, rounds: int = 5) -> float:
    """Time a few square float32 products and return the best throughput."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.dot)
    product(x, x).block_until_ready()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
