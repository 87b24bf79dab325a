"""Explore all interleavings of a few processes that run the real code of infra/lease.py.

A step is one call of the store. A process is a function whose only input is the store's answers. So it can be put
back to any point: it is called again with the answers so far, and an exception stops it at the next call. No state
(the files and the answers of each process) is visited twice, which makes exploring all orders affordable.

Two things that the store cannot know are assumed, as the lease assumes them: while a waiter sleeps for a beat, every
live holder raises its counter, and no live process pauses between creating a lease and holding it.
"""

import contextlib
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

Files = dict[str, bytes]


class Pause(BaseException):
    """Raised to stop a process before its next call, once it has taken its step."""


class FakeStore:
    """A store in memory that replays the answers in `history`, then executes one call, then raises Pause."""

    local, base = True, "mem"

    def __init__(self, files: Files, history: tuple) -> None:
        self.files, self.history, self.index = files, list(history), 0
        self.stepped = False
        self.fs = self

    def step(self, name: str, perform: Callable[[], Any] = lambda: None) -> Any:
        if self.index == len(self.history):
            if self.stepped:
                raise Pause
            self.stepped = True
            try:
                answer: Any = perform()
            except OSError as error:
                answer = error.__class__
            self.history.append((name, answer))
        recorded, answer = self.history[self.index]
        assert recorded == name, "a process must make the same calls again"
        self.index += 1
        if isinstance(answer, type) and issubclass(answer, OSError):
            raise answer
        return answer

    def create(self, path: str, body: bytes) -> None:
        def perform() -> None:
            if path in self.files:
                raise FileExistsError
            self.files[path] = body

        self.step(f"create {path}", perform)

    def names(self, folder: str, ending: str = "") -> list[str]:
        def perform() -> tuple[str, ...]:
            paths = fnmatch.filter(self.files, f"{folder}/*{ending}")
            return tuple(sorted(path.rpartition("/")[2] for path in paths))

        return list(self.step(f"list {folder} {ending}", perform))

    def exists(self, path: str) -> bool:
        return self.step(f"exists {path}", lambda: path in self.files)

    def cat_file(self, path: str) -> bytes:
        def perform() -> bytes:
            if path not in self.files:
                raise FileNotFoundError
            return self.files[path]

        return self.step(f"read {path}", perform)

    def pipe_file(self, path: str, body: bytes) -> None:
        self.step(f"write {path}", lambda: self.files.__setitem__(path, body))

    def rm(self, path: str) -> None:
        def perform() -> None:
            if path not in self.files:
                raise FileNotFoundError
            del self.files[path]

        self.step(f"remove {path}", perform)

    def invalidate_cache(self) -> None:
        pass


@dataclass
class Explorer:
    """Visits every reachable state of `processes` and calls `check` with the numbers of those that hold the lease."""

    processes: list[Callable[[FakeStore], None]]
    check: Callable[[list[int]], None]
    crashes: int = 0  # number of processes that may die, at any moment
    sleeps: int = 2  # how often one process may sleep
    states: int = 0
    ends: set[tuple[int, ...]] = field(default_factory=set)
    """For each final state, the processes that ran to their end."""

    def explore(self, files: Files) -> None:
        """Visit every state that some order of steps leads to."""
        start = self._start(files)
        seen, todo = {start}, [start]
        while todo:
            state = todo.pop()
            for following in self._following(state):
                if following not in seen:
                    seen.add(following)
                    todo.append(following)
        self.states = len(seen)

    def wander(self, files: Files, random: Random) -> None:
        """Follow one order of steps, chosen by `random`, to its end."""
        state = self._start(files)
        while following := self._following(state):
            steps = [one for one in following if one[2] == state[2]]
            state = random.choice(following if random.random() < 0.1 or not steps else steps)  # otherwise all die early

    def _start(self, files: Files) -> tuple:
        return tuple(sorted(files.items())), ((),) * len(self.processes), frozenset()

    def _following(self, state: tuple) -> list[tuple]:
        files, histories, dead = state
        following = []
        for number in range(len(self.processes)):
            if number in dead:
                continue
            stepped = self._advance(dict(files), histories, number, dead)
            if stepped:
                following.append((*stepped, dead))
                if len(dead) < self.crashes:
                    following.append((files, histories, dead | {number}))
        if not following:
            done = [n for n, history in enumerate(histories) if history and history[-1][0] == "end"]
            self.ends.add(tuple(done))
        return following

    def _advance(self, files: Files, histories: tuple, number: int, dead: frozenset) -> tuple | None:
        store = FakeStore(files, histories[number])
        with contextlib.suppress(Pause):
            self.processes[number](store)
        if not store.stepped:
            return None  # the process has ended
        if store.history[-1][0] == "sleep" and not self._may_sleep(files, store.history, histories, number, dead):
            return None
        now = (*histories[:number], tuple(store.history), *histories[number + 1 :])
        self.check([n for n, history in enumerate(now) if n not in dead and _is_inside(history)])
        return tuple(sorted(files.items())), now

    def _may_sleep(self, files: Files, own: list, histories: tuple, number: int, dead: frozenset) -> bool:
        """Advance the other processes' counters by one beat. Return False if one of them is about to hold a lease, or
        if this process has used up its sleeps."""
        if [name for name, _ in own].count("sleep") > self.sleeps:
            return False
        for other, history in enumerate(histories):
            generation = _created(history)
            if other == number or other in dead or not generation or _names(history)[-1] == "end":
                continue
            if "enter" not in _names(history):
                return False
            beat = generation.replace(".json", ".beat")
            files[beat] = str(int(files.get(beat, b"0")) + 1).encode()
        return True


def _names(history: tuple) -> list[str]:
    return [name for name, _ in history]


def _created(history: tuple) -> str:
    """Return the lease that a process created last, or "" if it has removed it again."""
    lease = ""
    for name, answer in history:
        if name.startswith("create ") and answer is None:
            lease = name.removeprefix("create ")
        elif name == f"remove {lease}":
            lease = ""
    return lease


def _is_inside(history: tuple) -> bool:
    names = _names(history)
    return names.count("enter") > names.count("leave")
