"""The memory allocator of Ray's workers: jemalloc, which Ray's packages for Linux contain.

A training step allocates and frees the same large tensors again and again. The C library's allocator
returns tensors above 32 MiB to the system each time, and fragments its heap with smaller ones. jemalloc,
told to keep what is freed, takes less memory for the same step, and mostly less time (RESULTS.md).
Without the library, or if the user chose an allocator or its options, workers use what they would
use anyway.

    environment()    # for the process that all workers are forks of (infra/forkserver.py), or for ranks
    give_back()      # at the end of a stage, whatever the allocator is
"""

from __future__ import annotations

import ctypes
import os
import re
from importlib.util import find_spec
from pathlib import Path

KEEP_FREED = "oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:-1"
"""jemalloc's options: freed memory, of large allocations too, is kept for the next ones."""
C_LIBRARYS = re.compile(r"MALLOC_(ARENA_\w+|\w+_)|GLIBC_TUNABLES")
"""Names of the environment variables that set options of glibc's allocator."""
PAGE_BYTES = 4096  # of a memory page, as the library was built for; some ARM machines have larger ones
ALL_ARENAS = 4096  # jemalloc's number for all of its arenas (MALLCTL_ARENAS_ALL)


def environment() -> dict[str, str]:
    """Return the variables that make a new process use jemalloc; empty if it is not there, or if the
    user preloads a library or sets options of the C library's allocator."""
    if os.environ.get("LD_PRELOAD") or any(map(C_LIBRARYS.fullmatch, os.environ)):
        return {}
    ray = find_spec("ray")
    library = Path(ray.origin).parent / "core/libjemalloc.so" if ray and ray.origin else None
    if library is None or not library.exists() or os.sysconf("SC_PAGESIZE") != PAGE_BYTES:
        return {}
    if re.search(r"[ :]", str(library)):  # they separate the libraries in LD_PRELOAD
        return {}
    return {"LD_PRELOAD": str(library), "MALLOC_CONF": os.environ.get("MALLOC_CONF", KEEP_FREED)}


def give_back() -> None:
    """Return the memory that this process has freed to the system, since an idle worker keeps it."""
    program = ctypes.CDLL(None)
    if hasattr(program, "mallctl"):
        program.mallctl(f"arena.{ALL_ARENAS}.purge".encode(), None, None, None, 0)
    elif hasattr(program, "malloc_trim"):  # glibc
        program.malloc_trim(0)
