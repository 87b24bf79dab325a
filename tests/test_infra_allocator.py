"""Which allocator processes get, and that freed memory goes back at the end of a stage."""

import os
import subprocess
import sys

import pytest

from longreach.infra import allocator

FREE = """
import numpy, psutil
from longreach.infra.allocator import give_back
resident_mb = lambda: psutil.Process().memory_info().rss / 1e6
before = resident_mb()
blocks = [numpy.ones(12_500) for _ in range(1000)]  # 100 kB each, so glibc does not map them one by one
del blocks[:-1]  # the last one keeps glibc from trimming its heap
freed = resident_mb() - before
give_back()
print(freed, resident_mb() - before)
"""


@pytest.mark.parametrize("jemalloc", [False, True])
def test_freed_memory_is_kept_until_it_is_given_back(jemalloc):
    chosen = allocator.environment() if jemalloc else {}
    assert bool(chosen) == jemalloc, "Ray's packages for Linux contain the library"
    done = subprocess.run(
        [sys.executable, "-c", FREE], env=os.environ | chosen, capture_output=True, text=True, timeout=60, check=True
    )
    freed, given_back = map(float, done.stdout.split())
    assert freed > 80
    assert given_back < 20


def test_a_users_own_library_and_options_win(monkeypatch):
    monkeypatch.setenv("MALLOC_CONF", "stats_print:true")
    assert allocator.environment()["MALLOC_CONF"] == "stats_print:true"
    for name in ("LD_PRELOAD", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"):
        with monkeypatch.context() as context:
            context.setenv(name, "4194304")
            assert allocator.environment() == {}
