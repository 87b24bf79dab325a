"""The machine's cores, load and memory, as this process may use them."""

import gc
import subprocess
import sys

import numpy as np
import pytest

from longreach.infra import machine

FREE = """
import numpy, psutil
from longreach.infra.machine import give_back_memory
resident_mb = lambda: psutil.Process().memory_info().rss / 1e6
before = resident_mb()
blocks = [numpy.ones(12_500) for _ in range(1000)]  # 100 kB each, so glibc does not map them one by one
del blocks[:-1]  # the last one keeps glibc from trimming its heap
freed = resident_mb() - before
give_back_memory()
print(freed, resident_mb() - before)
"""


def test_freed_memory_is_kept_until_it_is_given_back():
    done = subprocess.run([sys.executable, "-c", FREE], capture_output=True, text=True, timeout=60, check=True)
    freed, given_back = map(float, done.stdout.split())
    assert freed > 80
    assert given_back < 20


def test_system_metrics_describe_this_process():
    gc.collect()
    before = machine.system_metrics()["system/rss_gib"]
    ballast = np.ones(2**29, dtype=np.uint8)  # 1/2 GiB, touched; threads of other tests may free some meanwhile
    after = machine.system_metrics()
    assert after["system/rss_gib"] - before > 0.7 * ballast.nbytes / 2**30
    assert 0 < after["system/memory_percent"] <= 100
    assert all(name.startswith("system/") for name in after)


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", None), ("250000 100000", 2), ("50000 100000", 0)])
def test_a_containers_limit_counts_as_cores(monkeypatch, tmp_path, quota, cores):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(8)))
    assert machine.usable_cores() == 8
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert machine.container_cores() == cores
    assert machine.usable_cores() == (8 if cores is None else max(1, cores))
