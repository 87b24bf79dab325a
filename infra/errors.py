"""Errors that end a run or a command.

Training and checkpoints raise Superseded, Stopped, OutOfMemory and DiskFull. A restart would only
repeat these, so the launcher (infra/launch.py, FINAL_ERRORS) passes them on to the stage that waits
for the ranks. The command line prints ClusterNotStarted, CorruptArtifact and LeaseLost without a
traceback. More errors of the store and the lease are in infra/artifact.py and infra/lease.py.
"""

import errno

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of an OSError on a disk without space, or at the end of a user's quota."""


class Superseded(Exception):
    """A newer attempt has taken over this one's work."""


class Stopped(Exception):
    """Training wrote a checkpoint and stopped on request."""


class OutOfMemory(Exception):
    """A rank needed more memory than the machine has; the message says what would fit."""


class ClusterNotStarted(RuntimeError):
    """Ray did not start on this machine, however often it was tried."""


class CorruptArtifact(Exception):
    """A published artifact does not match its manifest."""


class LeaseLost(RuntimeError):
    """Another run has taken over this run's lease."""


class DiskFull(Exception):
    """There is no space for a checkpoint; the message names the disk and its free space."""
