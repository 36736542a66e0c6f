"""Measure the free memory of a device, and refuse allocations that would not fit."""

from pathlib import Path
from typing import Any

import jax
import psutil
from jax.sharding import Mesh

from lwm.core.errors import CapacityError
from lwm.core.hardware import traits_of


def available_bytes(device: Any) -> int | None:
    """Return how many bytes can still be allocated on a device; None if it is unknown.

    For a CPU device this is the host's free memory, or what its control group leaves if less.
    """
    if traits_of(device.platform).host_memory:
        free = psutil.virtual_memory().available
        limit = _control_group_limit()
        return free if limit is None else min(free, limit - psutil.Process().memory_info().rss)
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def _control_group_limit() -> int | None:
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # there is no control group, or its limit is "max"
        return None


def require_memory(needed: int, mesh: Mesh | None, *, what: str, remedy: str) -> None:
    """Raise CapacityError if an allocation exceeds the free memory.

    Args:
        needed: bytes on each device; devices simulated on a CPU share the host's memory.
        what: names the allocation in the error message.
    """
    device = jax.devices()[0] if mesh is None else mesh.local_devices[0]
    shared = traits_of(device.platform).host_memory
    sharing = len(mesh.local_devices) if mesh is not None and shared else 1
    available = available_bytes(device)
    if available is not None and needed * sharing > available:
        raise CapacityError(
            f"{what} needs {gigabytes(needed * sharing)} of memory and {gigabytes(available)} are "
            f"free; {remedy}"
        )


def gigabytes(count: int) -> str:
    """Format a number of bytes."""
    return f"{count / 1e9:.2f} GB"
