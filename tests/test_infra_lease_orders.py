"""Leases in every order of steps of two processes, and in many of three: never two holders."""

from random import Random

import pytest
from interleavings import Explorer, FakeStore

from longreach.infra import lease
from longreach.infra.lease import Lease

RELEASED = {"mem/leases/w/00000001.json": b'{"holder":"before"}', "mem/leases/w/00000001.released": b""}

SEEDS = 100  # orders


@pytest.fixture(autouse=True)
def stopped_time(monkeypatch):
    """Sleeping is a step of the process, and counters are raised by the explorer instead of by threads."""
    monkeypatch.setattr(lease, "process_mark", lambda pid: None)
    monkeypatch.setattr(Lease, "_heartbeat", lambda self: None)
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: running[0].step("sleep"))
    monkeypatch.setattr(lease.threading.Thread, "start", lambda self: None)


running: list[FakeStore] = [FakeStore({}, ())]
"""The store of the process that takes a step now."""


def holds(store: FakeStore, times: int) -> None:
    running[0] = store
    for _ in range(times):
        held = Lease(store, "w", "holder", patience_beats=1).acquire(wait=True)
        store.step("enter")
        store.step("leave")
        held.release()
    store.step("end")


def once(store: FakeStore) -> None:
    holds(store, 1)


def thrice(store: FakeStore) -> None:
    holds(store, 3)


def one_at_most(inside: list[int]) -> None:
    assert len(inside) <= 1, f"processes {inside} hold the lease at once"


def test_a_number_that_came_and_went_while_a_waiter_looked_away_is_not_given_twice():
    """Every order of a process that holds three times and one that holds once."""
    explorer = Explorer([once, thrice], one_at_most, sleeps=0)
    explorer.explore(RELEASED)
    assert explorer.states > 1000
    assert (0, 1) in explorer.ends


def test_when_one_of_two_processes_dies_at_any_moment_there_is_one_holder_and_the_other_comes_to_its_end():
    explorer = Explorer([once, once], one_at_most, crashes=1)
    explorer.explore({})
    assert {(0, 1), (0,), (1,)} <= explorer.ends


def test_three_processes_one_of_which_may_die_never_hold_a_lease_together():
    explorer = Explorer([thrice, once, once], one_at_most, crashes=1)
    for seed in range(SEEDS):
        explorer.wander(RELEASED, Random(seed))
    assert len(explorer.ends) > 1, explorer.ends
