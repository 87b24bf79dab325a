"""Measure ratios on a noisy machine (CPU time, A B A B within one run, medians) and the peak memory of a process."""

from __future__ import annotations

import ctypes
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path


def cpu_ms(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return (time.process_time() - start) * 1e3


def interleaved(*works: Callable[[], object], rounds: int) -> list[list[float]]:
    """Return the CPU milliseconds of each function in each round, [rounds, works], after a warm-up round."""
    for work in works:
        work()
    return [[cpu_ms(work) for work in works] for _ in range(rounds)]


def ratio(rows: list[list[float]], over: int, under: int) -> float:
    return statistics.median(row[over] / row[under] for row in rows)


def medians(rows: list[list[float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def extra_mib(work: Callable[[], object]) -> float:
    """Return the MiB that the work adds to this process's peak (Linux). Run it on something small first."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _status("VmRSS")
    work()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, f"no {field} in /proc/self/status"
    return int(found[1])
