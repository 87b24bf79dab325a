"""Simulate a power cut at every moment: rebuild a folder as a disk would hold it without unsynced changes.

The calls that change names (and fsync) are intercepted in this process. Before and after each call, the folder is
rebuilt as a disk might hold it then. File systems may write names early or late, so three disks are simulated:

    late        only what was synced is on the disk
    early       every name is on the disk at once, content only once synced, as on ext4
    removing    removed names are gone at once; new names appear once their folder is synced

    with PowerCuts(root, tmp_path / "disk", check): publish()       # check(folder) raises if something was lost
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

DISKS = ("late", "early", "removing")
WATCHED = ("fsync", "replace", "rename", "link", "unlink", "remove", "rmdir", "mkdir")


class PowerCuts:
    """Rebuilds `root` at every moment, for each of `DISKS`, and calls `check` with the rebuilt folder."""

    def __init__(self, root: Path, disk: Path, check: Callable[[Path], None]) -> None:
        self.root, self.disk, self.check = root, disk, check
        self.moments = 0
        self.content: dict[int, bytes] = {}
        """Inode of a file -> its synced content."""
        self.names: dict[int, dict[str, int]] = {}
        """Inode of a folder -> its synced names with their inodes."""
        self.held: list[int] = []  # open handles, so that no inode number is reused

    def __enter__(self) -> "PowerCuts":
        for folder, _, files in os.walk(self.root):  # what existed before is on the disk
            for path in (Path(folder), *(Path(folder, name) for name in files)):
                self._synced(path)
        self.real = {name: getattr(os, name) for name in WATCHED}
        for name in WATCHED:
            setattr(os, name, self._watched(name))
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        for handle in self.held:
            os.close(handle)

    def _restore(self) -> None:
        for name, function in self.real.items():
            setattr(os, name, function)

    def _watched(self, name: str) -> Callable:
        def call(*args, **kwargs):
            self._cut()
            result = self.real[name](*args, **kwargs)
            if name == "fsync":
                path = Path(os.readlink(f"/proc/self/fd/{args[0]}"))
                if path.is_relative_to(self.root):
                    self._synced(path)
            self._cut()
            return result

        return call

    def _synced(self, path: Path) -> None:
        self.held.append(os.open(path, os.O_RDONLY))
        if path.is_dir():
            self.names[path.stat().st_ino] = _listing(path)
        else:
            self.content[path.stat().st_ino] = path.read_bytes()

    def _cut(self) -> None:
        self._restore()  # calls made here do not count
        for disk in DISKS:
            shutil.rmtree(self.disk, ignore_errors=True)
            now = {path.stat().st_ino: path for path in (self.root, *self.root.rglob("*"))}
            self._rebuild(self.root.stat().st_ino, self.disk, disk, now)
            try:
                self.check(self.disk)
            except Exception as error:
                raise AssertionError(f"a power cut at moment {self.moments}, names {disk}: {error}") from error
        self.moments += 1
        for name in WATCHED:
            setattr(os, name, self._watched(name))

    def _rebuild(self, inode: int, target: Path, disk: str, now: dict[int, Path]) -> None:
        current = _listing(now[inode]) if inode in now else {}
        synced = self.names.get(inode, {})
        names = {"late": synced, "early": current, "removing": dict(synced.items() & current.items())}[disk]
        target.mkdir()
        for name, child in names.items():
            is_folder = now[child].is_dir() if child in now else child in self.names
            if is_folder:
                self._rebuild(child, target / name, disk, now)
            else:
                (target / name).write_bytes(self.content.get(child, b""))


def _listing(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.iterdir()}
