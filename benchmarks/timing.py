"""Ratios on a noisy machine: process CPU time, A B A B within one run, medians of ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def cpu_ms(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return (time.process_time() - start) * 1e3


def interleaved(*works: Callable[[], object], rounds: int) -> list[list[float]]:
    """CPU milliseconds of each work in each round [rounds, works], after one round of warm-up."""
    for work in works:
        work()
    return [[cpu_ms(work) for work in works] for _ in range(rounds)]


def ratio(rows: list[list[float]], over: int, under: int) -> float:
    return statistics.median(row[over] / row[under] for row in rows)


def medians(rows: list[list[float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*rows, strict=True)]
