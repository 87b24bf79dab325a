"""Clocks that jump: leases compare a counter with itself, never a time with a time."""

from __future__ import annotations

import itertools
import os
import threading
import time
from pathlib import Path

import pytest

from longreach.infra.artifact import Store
from longreach.infra.lease import Lease, LeaseHeld

DAY = 86_400


@pytest.fixture
def jumping(tmp_path: Path, monkeypatch):
    """The wall clock jumps by days at each look, and files bear times of 1970 and 2100."""
    real, jumps = time.time, itertools.cycle((-400 * DAY, 0, 400 * DAY, -DAY, DAY))
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: int(time.time() * 1e9))
    stop, ages = threading.Event(), itertools.cycle((0, 130 * 365 * DAY))

    def age() -> None:
        while not stop.wait(0.02):
            for path in (tmp_path / "leases").rglob("*.*"):
                try:
                    os.utime(path, (moment := next(ages), moment))
                except FileNotFoundError:
                    continue

    thread = threading.Thread(target=age)
    thread.start()
    yield
    stop.set()
    thread.join()


def test_a_clock_that_jumps_neither_takes_a_live_runs_lease_nor_keeps_a_dead_ones(tmp_path: Path, jumping):
    store = Store(str(tmp_path))
    alive = Lease(store, "tiny", "alive", beat_s=0.1).acquire(wait=False)
    for _ in range(3):
        with pytest.raises(LeaseHeld, match="alive"):
            Lease(store, "tiny", "other", beat_s=0.1, patience_beats=600).acquire(wait=False)
    assert not alive.lost.is_set()
    alive._stop.set()  # as after kill -9: its counter stands still
    for thread in threading.enumerate():
        if thread.name == "lease tiny":
            thread.join()  # a beat on its way would count as alive
    taken = Lease(store, "tiny", "other", beat_s=0.1).acquire(wait=False)
    assert taken.current_holder() == "other"
    taken.release()


def test_attempts_are_numbered_whatever_the_clock_says(tmp_path: Path, jumping):
    store = Store(str(tmp_path))
    attempts = [store.new_attempt("pack", "f") for _ in range(5)]
    assert [a.id.split("-")[0] for a in attempts] == ["0001", "0002", "0003", "0004", "0005"]
    assert [p.name for p in store.earlier_attempts("pack", "f")] == [a.id for a in reversed(attempts)]
