"""Errors of a rank that end its run at once, because another try would meet them again.

Training and checkpoints raise them; the launcher (infra/launch.py, FINAL_ERRORS) carries them to
the stage that waits for the ranks. What the store and the lease raise stands beside them, in
infra/artifact.py and infra/lease.py.
"""


class Superseded(Exception):
    """A newer attempt took over this one's work."""


class Stopped(Exception):
    """Training wrote a checkpoint and stopped, because it was asked to."""


class OutOfMemory(Exception):
    """A rank needed more memory than the machine has; the message says what would fit."""


class DiskFull(Exception):
    """There is no room for a checkpoint; the message names the disk and what is free."""
