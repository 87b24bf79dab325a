"""Memory that a process has freed but still holds."""

import ctypes


def give_back_memory() -> None:
    """Return the memory that this process has freed to the system.

    glibc keeps much of it for the next allocations, and an idle worker would hold it while others
    need it. With another C library or allocator, nothing happens.
    """
    program = ctypes.CDLL(None)
    if hasattr(program, "malloc_trim"):
        program.malloc_trim(0)
