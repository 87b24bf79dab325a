"""Promotions and rollbacks of one model at the same time, in every order of their requests: one of them moves it."""

from collections import namedtuple
from random import Random

import pytest
from interleavings import Explorer, FakeStore

from longreach.infra import registry
from longreach.infra.registry import CHAMPION, CLAIM, PREVIOUS, AliasMoved

FILES = {"versions/1": b"", "versions/2": b"", "versions/3": b"", "versions/4": b"", CHAMPION: b"1", PREVIOUS: b"4"}
Version = namedtuple("Version", "version tags")

running: list[FakeStore] = [FakeStore({}, ())]
"""The registry as the process sees it that takes a step now."""


class Client:
    """As much of MlflowClient as aliases need; each call is a step."""

    tracking_uri = "http://mlflow"

    def __init__(self, store):
        self.store = store

    def get_model_version_by_alias(self, name, alias):
        return Version(self.store.step(f"who is {alias}", lambda: self.store.files[alias]).decode(), {})

    def set_registered_model_alias(self, name, alias, version):
        self.store.step(f"{alias} is {version}", lambda: self.store.files.update({alias: version.encode()}))

    def set_model_version_tag(self, name, version, key, value):
        self.store.step(f"tag {version}", lambda: self.store.files.update({f"{key}/{version}": value.encode()}))

    def delete_model_version_tag(self, name, version, key):
        self.store.step(f"untag {version}", lambda: self.store.files.pop(f"{key}/{version}", None) and None)

    def search_model_versions(self, query):
        def claims():
            return tuple(
                (n, self.store.files.get(f"{CLAIM}/{n}")) for n in "1234" if f"versions/{n}" in self.store.files
            )

        return [Version(n, {CLAIM: tag.decode()} if tag else {}) for n, tag in self.store.step("search", claims)]


@pytest.fixture(autouse=True)
def steps(monkeypatch):
    monkeypatch.setattr(registry.time, "sleep", lambda seconds: running[0].step("sleep"))
    monkeypatch.setattr(registry, "connect", lambda: Client(running[0]))


def promoter(version, expected="1"):
    def promotes(store):
        running[0] = store
        try:
            registry.move(Client(store), "books", version, expected)
            store.step("enter")  # counted as one that says "moved"
        except AliasMoved:
            pass
        store.step("end")

    return promotes


def who_rolls_back(store):
    running[0] = store
    try:
        if registry.rollback("books")[0] == "1":  # and not the promoted one, a moment later
            store.step("enter")
    except ValueError:
        pass
    store.step("end")


def one_at_most(moved):
    assert len(moved) <= 1, f"processes {moved} both say that they moved it"


@pytest.mark.parametrize("processes", [[promoter("2"), promoter("3")], [promoter("2"), who_rolls_back]])
def test_of_two_that_move_one_model_at_once_one_is_refused_in_every_order(processes):
    explorer = Explorer(processes, one_at_most)
    explorer.explore(FILES)
    assert (0, 1) in explorer.ends
    assert explorer.states > 500


@pytest.mark.parametrize("seed", range(50))
def test_of_three_one_moves_it(seed):
    processes = [promoter("2"), promoter("3"), promoter("4")]
    Explorer(processes, one_at_most, sleeps=20).wander(FILES, Random(seed))


def test_the_claim_of_a_promoter_that_was_killed_is_respected_for_a_while_and_then_removed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(registry.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(registry.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + 10))

    class Free(FakeStore):
        def step(self, name, perform=lambda: None):
            return perform()

    store = Free({**FILES, f"{CLAIM}/2": b"of one that was killed"}, ())
    registry.move(Client(store), "books", "3", "1")
    assert store.files == {**FILES, CHAMPION: b"3", PREVIOUS: b"1"}
    assert registry.CLAIM_S < clock[0] < 2 * registry.CLAIM_S
