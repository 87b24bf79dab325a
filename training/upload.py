"""Upload checkpoints while training goes on, for nodes that share no disk.

An upload is complete once every node has uploaded its ranks' files and rank 0 the manifest, without
which a checkpoint does not count. All ranks learn the same outcome. An upload that failed is no
reason to stop: the files are still on the nodes' disks, and the next checkpoint replaces this one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from longreach.infra.share import Share

UPLOAD_TIMEOUT = timedelta(hours=6)
"""Longest time for which a node waits until the other nodes have uploaded their parts."""


class Uploads:
    """Uploads one checkpoint at a time. Every rank calls every method."""

    def __init__(self, share: Share, manifest: str, *, is_disk_leader: bool) -> None:
        """
        Args:
            manifest: name of the file in each checkpoint that is uploaded last.
            is_disk_leader: whether this rank uploads the files of its disk.
        """
        self.share = share
        self.manifest = manifest
        self.is_disk_leader = is_disk_leader
        self.group = dist.new_group(backend="gloo")  # its collectives run at the same time as those of training steps
        self.thread = ThreadPoolExecutor(1, "upload")
        self.newest: Future[str] | None = None
        self.outdated: set[Path] = set()  # local paths of checkpoints to remove from the store after the next upload
        self.abandoned = threading.Event()

    def start(self, checkpoint: Path, *, outdated: Iterable[Path]) -> None:
        """Begin to upload a checkpoint, which must stay on the disk until `finish`. Once it is complete,
        the `outdated` ones are removed from the store. Call `finish` before the next `start`."""
        self.outdated |= set(outdated)
        self.newest = self.thread.submit(self._upload, checkpoint)

    def finish(self) -> str:
        """Wait until the newest upload has ended; return why it failed, or ""."""
        return self.newest.result() if self.newest else ""

    def abandon(self) -> None:
        """Complete no further upload, because a newer attempt took over."""
        self.abandoned.set()

    def _upload(self, checkpoint: Path) -> str:
        def push() -> None:
            if self.is_disk_leader:
                self.share.push(checkpoint, last=self.manifest)

        def complete() -> None:
            if dist.get_rank() == 0 and not self.abandoned.is_set():
                self.share.seal(checkpoint / self.manifest)
                for path in self.outdated:
                    if not path.exists():  # else it was trained again or downloaded since an earlier upload failed
                        self.share.remove(path)
                self.outdated.clear()

        return self._together(push) or self._together(complete)

    def _together(self, action: Callable[[], None]) -> str:
        """Call `action` on every rank; return the first rank's reason why it failed, or ""."""
        reason = ""
        try:
            action()
        except Exception as error:  # noqa: BLE001 (each store raises its own types)
            reason = f"{type(error).__name__}: {error}"
        dist.monitored_barrier(self.group, timeout=UPLOAD_TIMEOUT)
        reasons = [""] * dist.get_world_size()
        dist.all_gather_object(reasons, reason, group=self.group)
        return next(filter(None, reasons), "")
