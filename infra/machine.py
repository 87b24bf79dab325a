"""The machine that this process runs on: the cores and memory that it may use, its load, and giving
memory back to it.

    python -c "from longreach.infra.machine import usable_cores; print(usable_cores())"
"""

import ctypes
import os
from pathlib import Path

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")
"""Where Linux shows a container's limits (cgroup version 2)."""


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use: those of its affinity, or a
    container's limit, whichever is lower; at least 1."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    limit = container_cores()
    if limit is not None:
        cores = min(cores, limit)
    return max(1, cores)


def container_cores() -> int | None:
    """Return the whole CPU cores that a container is limited to; None without a limit."""
    limit = CGROUP / "cpu.max"
    if limit.exists() and (quota := limit.read_text().split())[0].isdigit():
        return int(quota[0]) // int(quota[1])
    return None


def usable_memory() -> int:
    """Return the bytes of memory that this process may use: the machine's total or a container's
    limit, whichever is lower."""
    import psutil

    total: int = psutil.virtual_memory().total
    limit = CGROUP / "memory.max"
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total


def system_metrics() -> dict[str, float]:
    """Return the load of the machine and of this process, to log with a step's metrics. MLflow shows
    `system/` as a group of its own.

    `system/cpu_percent` (all cores) is the mean since the previous call in this process, or 0.0 at
    the first call.
    """
    import psutil

    return {
        "system/cpu_percent": psutil.cpu_percent(),
        "system/memory_percent": psutil.virtual_memory().percent,
        "system/rss_gib": psutil.Process().memory_info().rss / GIB,
    }


def give_back_memory() -> None:
    """Return the memory that this process has freed to the system.

    glibc keeps much of it for the next allocations, and an idle worker would hold it while others
    need it. With another C library or allocator, nothing happens.
    """
    program = ctypes.CDLL(None)
    if hasattr(program, "malloc_trim"):
        program.malloc_trim(0)
