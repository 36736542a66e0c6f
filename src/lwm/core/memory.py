"""How much memory a device has left, as far as it tells."""

from pathlib import Path
from typing import Any

import psutil


def available_bytes(device: Any) -> int | None:
    """Bytes that can still be allocated on a device; None where the device does not say.

    A CPU device answers for the host: the least of free memory and what the control group leaves.
    """
    if device.platform == "cpu":
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
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
