"""Run one attempt on several nodes without a shared disk: the nodes exchange files through the store.

Ranks read their inputs from their own node's cache and write checkpoints to their own disk, and every
node uploads its part. The checkpoint's manifest is uploaded last; without it, a checkpoint in the
store does not count. After a node is lost, others pull the newest checkpoint. All paths are those of
the node that runs the stage; `here` translates them for a node with another LONGREACH_WORKDIR. A
local root needs none of this, since it is a shared disk.

    share = Share("s3://bucket/x", "/work/scratch", "finetune", fingerprint, attempt.id)
"""

import fcntl
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longreach.infra.artifact import Store
from longreach.infra.errors import CorruptArtifact

WORKDIR = "LONGREACH_WORKDIR"


def node_scratch(scratch: str | Path) -> Path:
    """Return this node's folder for attempts and fetched artifacts: below LONGREACH_WORKDIR if that
    is set, else the driver's path."""
    if workdir := os.environ.get(WORKDIR):
        return Path(workdir).absolute() / "scratch"
    return Path(scratch).absolute()


@dataclass(frozen=True)
class Share:
    """One attempt, as known to every node that works on it. The nodes share its files through the
    store."""

    root: str
    scratch: str
    """The store's scratch folder on the node that runs the stage."""
    stage: str
    fingerprint: str
    attempt: str
    inputs: tuple[tuple[str, str], ...] = field(default=())
    """(stage, fingerprint) of the artifacts that the stage reads."""

    @property
    def folder(self) -> str:
        """The attempt's folder below the store's root."""
        return f"{self.stage}/{self.fingerprint}/attempts/{self.attempt}"

    @property
    def store(self) -> Store:
        """The store, with this node's cache."""
        return Store(self.root, node_scratch(self.scratch))

    def here(self, value: Any) -> Any:
        """Return a job (nested plain data) in which every path below the stage's scratch folder is
        replaced by this node's."""
        if isinstance(value, dict):
            return {key: self.here(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.here(item) for item in value]
        if isinstance(value, str) and (value == self.scratch or value.startswith(self.scratch + os.sep)):
            return str(node_scratch(self.scratch)) + value[len(self.scratch) :]
        return value

    def bring(self) -> None:
        """Fetch the inputs into this node's cache. The node's processes take turns: the first one
        downloads, the others verify."""
        store = self.store
        store.scratch.mkdir(parents=True, exist_ok=True)
        with (store.scratch / ".bring").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for stage, fingerprint in self.inputs:
                store.fetch(stage, fingerprint)

    def push(self, folder: Path, *, last: str = "") -> None:
        """Upload a folder of this attempt, except the file named `last`, which `seal` uploads
        afterwards."""
        fs, place = self._place(folder)
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != last):
            fs.put_file(str(path), f"{place}/{path.relative_to(folder).as_posix()}")

    def seal(self, file: Path) -> None:
        """Upload the file without which a pushed folder does not count."""
        fs, place = self._place(file)
        fs.put_file(str(file), place)

    def remove(self, folder: Path) -> None:
        """Delete a pushed folder from the store."""
        fs, place = self._place(folder)
        if fs.exists(place):
            fs.rm(place, recursive=True)

    def sealed(self, below: str, seal: str) -> list[tuple[str, str]]:
        """Return (name, path in the store) of the folders, in all attempts, that hold the file `seal`,
        in descending order of names."""
        store = self.store
        attempts = f"{store.base}/{self.stage}/{self.fingerprint}/attempts"
        folders = []
        for attempt in store.names(attempts):
            for name in store.names(f"{attempts}/{attempt}/{below}"):
                place = f"{attempts}/{attempt}/{below}/{name}"
                if seal in store.names(place):
                    folders.append((name, place))
        return sorted(folders, reverse=True)

    def pull(self, folder: Path, place: str = "") -> None:
        """Download a pushed folder of this attempt, or the sealed folder `place` of any attempt, into
        `folder`."""
        fs, own = self._place(folder)
        place = place or own
        fs.invalidate_cache()
        names = fs.find(place)
        shutil.rmtree(folder, ignore_errors=True)
        for name in names:
            target = folder / name[len(place) + 1 :]
            if not target.resolve().is_relative_to(folder.resolve()):
                raise CorruptArtifact(f"{name}: its path leads out of the folder that it is downloaded to")
            target.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(name, str(target))

    def _place(self, path: Path) -> tuple[Any, str]:
        """Return the store's file system, and the path there of a local path of this attempt."""
        store = self.store
        own = store.attempts_folder(self.stage, self.fingerprint) / self.attempt
        return store.fs, f"{store.base}/{self.folder}/{path.relative_to(own).as_posix()}"
