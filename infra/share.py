"""One attempt on several nodes without a shared disk: what they have to see of each other goes through the store.

Ranks find their inputs in their own node's cache (fetched and verified by hash), write checkpoints on their own disk,
and every node uploads its part; the manifest comes last, so a checkpoint in the store is whole or is none. After a node
is lost, others pull the newest one. All paths are those of the node that runs the stage; `here` translates them to a
node whose own folder (LONGREACH_WORKDIR) is another one. Only a remote root has shares: a local one is a shared disk.

    share = Share("s3://bucket/x", "/work/scratch", "finetune", fingerprint, attempt.id)
"""

from __future__ import annotations

import fcntl
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longreach.infra.artifact import Store

WORKDIR = "LONGREACH_WORKDIR"


def node_scratch(scratch: str | Path) -> Path:
    """This node's folder for attempts and fetched artifacts: below LONGREACH_WORKDIR, else where the driver has it."""
    own = os.environ.get(WORKDIR)
    return Path(own).absolute() / "scratch" if own else Path(scratch).absolute()


@dataclass(frozen=True)
class Share:
    """Names one attempt for every node that works on it."""

    root: str
    scratch: str
    """Of the node that runs the stage."""
    stage: str
    fingerprint: str
    attempt: str
    inputs: tuple[tuple[str, str], ...] = field(default=())
    """(stage, fingerprint) of the artifacts that are read."""

    @property
    def folder(self) -> str:
        """The attempt's, in the store."""
        return f"{self.stage}/{self.fingerprint}/attempts/{self.attempt}"

    @property
    def store(self) -> Store:
        """The artifacts, in this node's cache."""
        from longreach.infra.artifact import Store

        return Store(self.root, node_scratch(self.scratch))

    def here(self, value: Any) -> Any:
        """A job (nested plain data) with the paths of this node."""
        own = str(node_scratch(self.scratch))
        if isinstance(value, dict):
            return {key: self.here(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.here(item) for item in value]
        inside = isinstance(value, str) and (value == self.scratch or value.startswith(self.scratch + os.sep))
        return own + value[len(self.scratch) :] if inside else value

    def bring(self) -> None:
        """Fetch the inputs into this node's cache: the first process of a node brings them, the others find them."""
        store = self.store
        store.scratch.mkdir(parents=True, exist_ok=True)
        with (store.scratch / ".bring").open("w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            for stage, fingerprint in self.inputs:
                store.fetch(stage, fingerprint)

    def push(self, folder: Path, *, last: str = "") -> None:
        """Upload a folder of this attempt; `last` names a file that is left out."""
        fs, place = self._place(folder)
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != last):
            fs.put_file(str(path), f"{place}/{path.relative_to(folder).as_posix()}")

    def seal(self, file: Path) -> None:
        """Upload the file that makes a pushed folder whole."""
        fs, place = self._place(file)
        fs.put_file(str(file), place)

    def remove(self, folder: Path) -> None:
        """A folder that was pushed."""
        fs, place = self._place(folder)
        if fs.exists(place):
            fs.rm(place, recursive=True)

    def sealed(self, below: str, seal: str) -> list[tuple[str, str]]:
        """(name, place in the store) of pushed folders of all attempts that hold the file `seal`: names descend."""
        fs, base = self.store.fs, self.store.base
        fs.invalidate_cache()  # other nodes write there
        found = fs.glob(f"{base}/{self.stage}/{self.fingerprint}/attempts/*/{below}/*/{seal}")
        folders = [path.rsplit("/", 1)[0] for path in found]
        return sorted(((place.rsplit("/", 1)[1], place) for place in folders), reverse=True)

    def pull(self, folder: Path, place: str = "") -> None:
        """Download what was pushed of a folder of this attempt; `place`: a sealed folder, of whichever attempt."""
        from longreach.infra.artifact import CorruptArtifact

        fs, own = self._place(folder)
        place = place or own
        fs.invalidate_cache()
        names = fs.find(place)
        shutil.rmtree(folder, ignore_errors=True)
        for name in names:
            target = folder / name[len(place) + 1 :]
            if not target.resolve().is_relative_to(folder.resolve()):
                raise CorruptArtifact(f"{name}: leads out of the folder that it is fetched into")
            target.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(name, str(target))

    def _place(self, path: Path) -> tuple[Any, str]:
        """Where a path of this attempt is in the store."""
        return self.store.fs, f"{self.store.base}/{path.relative_to(node_scratch(self.scratch)).as_posix()}"
