"""Errors of a rank that end its run without a restart, since a restart would only repeat them, and
ClusterNotStarted, which ends a run before any rank starts.

Training and checkpoints raise them; the launcher (infra/launch.py, FINAL_ERRORS) passes them on to
the stage that waits for the ranks. The errors of the store and the lease are defined in
infra/artifact.py and infra/lease.py.
"""


class Superseded(Exception):
    """A newer attempt has taken over this one's work."""


class Stopped(Exception):
    """Training wrote a checkpoint and stopped on request."""


class OutOfMemory(Exception):
    """A rank needed more memory than the machine has; the message says what would fit."""


class ClusterNotStarted(RuntimeError):
    """Ray did not start on this machine, however often it was tried."""


class DiskFull(Exception):
    """There is no space for a checkpoint; the message names the disk and its free space."""
