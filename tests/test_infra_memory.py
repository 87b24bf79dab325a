"""Freed memory goes back to the system at the end of a stage."""

import subprocess
import sys

FREE = """
import numpy, psutil
from longreach.infra.memory import give_back_memory
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
