"""Leases: at most one live run of a name, on any store, without comparing clocks.

lease = Lease(Store(".longreach"), "weekly", "ann@host, process 7").acquire(wait=False); ...; lease.release()
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from longreach.infra.artifact import Store
from longreach.infra.files import canonical


class LeaseHeld(Exception):
    """Another live run holds the lease; `holder` names it."""

    def __init__(self, name: str, holder: str) -> None:
        super().__init__(f"{name!r} is being run by {holder}")
        self.holder = holder


def process_mark(pid: int) -> list[str] | None:
    """Names a process for ever: the machine's boot, its namespace, its number there, and when it started, in the
    kernel's own ticks. None if it has ended, or where the kernel does not say (Linux does)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        state, *_, ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:20]
        return None if state == "Z" else [boot, os.readlink("/proc/self/ns/pid"), str(pid), ticks]
    except OSError:
        return None


def is_gone(mark: list[str] | None) -> bool:
    """Whether a process is known to have ended; those of other machines and containers are not known."""
    own = process_mark(os.getpid())
    return mark is not None and own is not None and mark[:2] == own[:2] and process_mark(int(mark[2])) != mark


@dataclass
class Lease:
    """At most one live run of a name. The holder raises a counter every `beat_s`; no clock is ever compared.

    A lease is a numbered generation, created exclusively. A waiter takes the next number once the holder released
    its own, once the counter has stood still for `patience_beats` beats of the waiter's own time, or at once where
    both run on one machine and the holder's process is gone. A holder that was only slow sees the higher number and
    knows that it has lost (`lost` is set).
    """

    store: Store
    name: str
    holder: str
    beat_s: float = 2.0
    patience_beats: int = 4
    lost: threading.Event = field(default_factory=threading.Event)
    _generation: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    @cached_property
    def _folder(self) -> str:
        return f"{self.store.base}/leases/{self.name}"

    def acquire(self, *, wait: bool) -> Lease:
        """Returns self once held.

        Raises:
            LeaseHeld: somebody alive holds it and `wait` is False.
        """
        while True:
            newest = self._newest()
            if newest == 0 or self._exists(newest, "released") or not self._alive(newest, wait):
                try:
                    about = {"holder": self.holder, "process": process_mark(os.getpid())}
                    self.store.create(self._path(newest + 1, "json"), canonical(about).encode())
                except FileExistsError:
                    continue  # somebody was faster: look again
                self._generation = newest + 1
                self._beat(0)
                self._sweep()
                threading.Thread(target=self._heartbeat, daemon=True, name=f"lease {self.name}").start()
                return self

    def release(self) -> None:
        """Let the next one in at once."""
        self._stop.set()
        if not self.lost.is_set():
            self.store.fs.pipe_file(self._path(self._generation, "released"), b"")

    def current_holder(self) -> str | None:
        """Who holds it, as far as is known: who died holding it on another machine still does. None after a release."""
        newest = self._newest()
        if newest == 0 or self._exists(newest, "released"):
            return None
        about = self._about(newest)
        return None if is_gone(about.get("process")) else about["holder"]

    def _alive(self, generation: int, wait: bool) -> bool:
        """Watch the counter: False as soon as it may be taken over; True where a newer one took its place meanwhile.

        Raises:
            LeaseHeld: the counter moved and `wait` is False.
        """
        try:
            about = self._about(generation)
        except FileNotFoundError:  # swept away by the next holder
            return True
        if is_gone(about.get("process")):
            return False
        seen, still = self._counter(generation), 0
        while still < self.patience_beats:
            time.sleep(self.beat_s)
            if self._exists(generation, "released"):
                return False
            if (now := self._counter(generation)) == seen:
                still += 1
                continue
            if not wait:
                raise LeaseHeld(self.name, about["holder"])
            seen, still = now, 0
        return False

    def _path(self, generation: int, suffix: str) -> str:
        return f"{self._folder}/{generation:08d}.{suffix}"

    def _exists(self, generation: int, suffix: str) -> bool:
        self.store.fs.invalidate_cache()
        return self.store.fs.exists(self._path(generation, suffix))

    def _newest(self) -> int:
        self.store.fs.invalidate_cache()
        return max((int(Path(p).name.split(".")[0]) for p in self.store.fs.glob(f"{self._folder}/*.json")), default=0)

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
            except Exception as error:  # noqa: BLE001 (whatever the store raises while it is away: if it lasts, somebody takes over)
                print(f"lease {self.name}: heartbeat failed ({error}), trying again", file=sys.stderr, flush=True)

    def _sweep(self) -> None:
        """Forget the generations before this one."""
        for path in self.store.fs.glob(f"{self._folder}/*"):
            if int(Path(path).name.split(".")[0]) < self._generation:
                self.store.fs.rm(path)
