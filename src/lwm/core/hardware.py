"""What a device can do at best, to say how much of it a run uses.

Sources: the makers' data sheets (dense products, bfloat16); a CPU is measured.
"""

import time

import jax
import jax.numpy as jnp

_PEAK = {
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
    """Floating-point operations a second of so many devices of this run's kind; 0 if unknown.

    Devices simulated on a CPU share it, so their number does not count.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measured() * jax.process_count()
    names = [name for name in _PEAK if device.device_kind.startswith(name)]
    return _PEAK[max(names, key=len)] * devices if names else 0.0


def _measured(size: int = 1024, rounds: int = 5) -> float:
    """The best of a few square float32 products."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.dot)
    product(x, x).block_until_ready()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
