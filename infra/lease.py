"""Leases: at most one live run per name, on any store, without comparing clocks.

lease = Lease(Store(".longreach"), "weekly", "ann@host, process 7").acquire(wait=False); ...;
lease.release()
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import platform
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from longreach.infra.artifact import Store
from longreach.infra.files import canonical, on_own_disk


def holder_name() -> str:
    """Return a name for this process that other people understand: user, machine and process id."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in containers the user id is often missing from the user database
        user = f"user {os.getuid()}"
    return f"{user}@{platform.node()}, process {os.getpid()}"


class LeaseHeld(Exception):
    """Another live run holds the lease; `holder` names it."""

    def __init__(self, name: str, holder: str) -> None:
        super().__init__(f"{name!r} is being run by {holder}")
        self.holder = holder


def process_mark(pid: int) -> list[str] | None:
    """Return an identity that no other process will ever have: the machine's boot id, the PID
    namespace, the PID in it, and the start time in kernel ticks ("ended" for a zombie). None if /proc
    does not show the process, or does not exist (only Linux has it)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        state, *_, ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:20]
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
    return [boot, namespace, str(pid), "ended" if state == "Z" else ticks]


def is_gone(mark: list[str] | None) -> bool:
    """Return whether a process is known to have ended. For a process on another machine or in
    another container that cannot be known, so the answer is False. Nor may /proc show another user's
    process (mounted with hidepid), so the kernel is asked whether there is one."""
    ours = process_mark(os.getpid())
    if mark is None or ours is None or mark[:2] != ours[:2]:
        return False
    now = process_mark(int(mark[2]))
    if now is not None:
        return now != mark
    try:
        os.kill(int(mark[2]), 0)
    except OSError as error:  # PermissionError: another user's process, which lives
        return isinstance(error, ProcessLookupError)
    return False


@dataclass
class Lease:
    """A lease that lets at most one run of a name be live. The holder's heartbeat raises a counter
    every `beat_s`; no two machines' clocks are compared.

    Each lease is a numbered generation whose file is created exclusively. A waiter creates the next
    generation once the holder has released its own, or once the counter has not changed for
    `patience_beats` beats by the waiter's own clock. If both run on one machine and the holder's
    process is gone, it waits less: not at all if the store is on a disk of that machine, else
    `clone_beats`, since a clone of a virtual machine has the same process marks but other
    processes. A holder that was only slow sees the higher number and sets `lost`.

    Numbers never go down. A waiter may be paused between listing the folder and creating generation
    n, while another process creates, releases and sweeps n. So it lists the folder once more
    afterwards: whoever swept n had created a higher number before, and that number, or one that is
    higher still, is listed.
    """

    store: Store
    name: str
    holder: str
    beat_s: float = 2.0
    patience_beats: int = 4
    clone_beats: int = 2
    place: str = ""  # the lease's folder below the store's root; leases/NAME if empty
    lost: threading.Event = field(default_factory=threading.Event)
    _generation: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    @cached_property
    def _folder(self) -> str:
        return f"{self.store.base}/{self.place or 'leases/' + self.name}"

    def acquire(self, *, wait: bool) -> Lease:
        """Return self once the lease is held. Raises LeaseHeld if a live run holds it and `wait` is
        False."""
        while True:
            newest = self._newest()
            if newest == 0 or self._exists(newest, "released") or not self._alive(newest, wait):
                try:
                    about = {"holder": self.holder, "process": process_mark(os.getpid())}
                    self.store.create(self._path(newest + 1, "json"), canonical(about).encode())
                except FileExistsError:
                    continue  # another run was faster: start over
                self._generation = newest + 1
                try:
                    if self._newest() > self._generation:  # meanwhile another process created, released and swept it
                        self._remove(self._path(self._generation, "json"))
                        continue
                    self._beat(0)
                    self._sweep()
                except BaseException:
                    self.release()
                    raise
                threading.Thread(target=self._heartbeat, daemon=True, name=f"lease {self.name}").start()
                return self

    def release(self) -> None:
        """Release the lease, so that the next run need not wait. An unreachable store is reported on
        stderr and is no error: the work is done, and the next run takes the lease over once the
        counter has stood still."""
        self._stop.set()
        if not self.lost.is_set():
            try:
                self.store.fs.pipe_file(self._path(self._generation, "released"), b"")
            except Exception as error:  # noqa: BLE001 (each store raises its own types)
                print(
                    f"lease {self.name}: not released ({error}); the next run has to wait for it to expire",
                    file=sys.stderr,
                    flush=True,
                )

    def current_holder(self) -> str | None:
        """Return the holder's name, or None if the lease is released. A holder that died on another
        machine is still reported."""
        newest = self._newest()
        if newest == 0 or self._exists(newest, "released"):
            return None
        about = self._about(newest)
        return None if is_gone(about.get("process")) else about["holder"]

    def _alive(self, generation: int, wait: bool) -> bool:
        """Watch the holder's counter. Return False once the lease may be taken over, True if a newer
        generation has replaced it. Raises LeaseHeld if the counter changed and `wait` is False."""
        try:
            about = self._about(generation)
        except FileNotFoundError:  # swept away by the next holder
            return True
        patience_beats = self.patience_beats
        if is_gone(about.get("process")):
            if self.store.local and on_own_disk(Path(self.store.base)):
                return False
            patience_beats = min(self.clone_beats, patience_beats)
        counter, beats_without_change = self._counter(generation), 0
        while beats_without_change < patience_beats:
            time.sleep(self.beat_s)
            if self._exists(generation, "released"):
                return False
            newer_counter = self._counter(generation)
            if newer_counter == counter:
                beats_without_change += 1
            elif not wait:
                raise LeaseHeld(self.name, about["holder"])
            else:
                counter, beats_without_change = newer_counter, 0
        return False

    def _path(self, generation: int, suffix: str) -> str:
        return f"{self._folder}/{generation:08d}.{suffix}"

    def _exists(self, generation: int, suffix: str) -> bool:
        self.store.fs.invalidate_cache()
        return self.store.fs.exists(self._path(generation, suffix))

    def _newest(self) -> int:
        return max((generation for generation, _ in self._files(ending=".json")), default=0)

    def _files(self, ending: str = "") -> list[tuple[int, str]]:
        """Return (generation, name) of the lease's files. Others, such as NFS's .nfs0001, are ignored."""
        names = self.store.names(self._folder, ending)
        return [(int(name[:8]), name) for name in names if re.match(r"[0-9]{8}\.", name)]

    def _counter(self, generation: int) -> bytes:
        try:
            return self.store.fs.cat_file(self._path(generation, "beat"))
        except FileNotFoundError:
            return b""

    def _about(self, generation: int) -> dict[str, Any]:
        return json.loads(self.store.fs.cat_file(self._path(generation, "json")))

    def _beat(self, counter: int) -> None:
        self.store.fs.pipe_file(self._path(self._generation, "beat"), str(counter).encode())

    def _heartbeat(self) -> None:
        counter = 0
        while not self._stop.wait(self.beat_s):
            counter += 1
            try:
                if self._newest() > self._generation:
                    self.lost.set()
                    return
                self._beat(counter)
            # Covers whatever the store raises while it is unreachable. If that lasts, another run
            # takes the lease over.
            except Exception as error:  # noqa: BLE001
                print(f"lease {self.name}: heartbeat failed ({error}), retrying", file=sys.stderr, flush=True)

    def _sweep(self) -> None:
        """Delete the files of all older generations but the previous one: a process that lists the
        folder now must see at least one of the last two."""
        for generation, name in self._files():
            if generation < self._generation - 1:
                self._remove(f"{self._folder}/{name}")

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # a later holder may have deleted it
            self.store.fs.rm(path)
