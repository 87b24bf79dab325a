"""Leases: on a local folder and on an S3 server (moto), one live run of a name."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from longreach.infra.artifact import Store
from longreach.infra.lease import Lease, LeaseHeld, holder_name, is_gone, process_mark


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path / "root"), tmp_path / "scratch")
    return Store(f"{request.getfixturevalue('s3_root')}/{tmp_path.name}", tmp_path / "scratch")


def test_a_second_run_is_refused_while_the_first_lives_and_let_in_after_release(store: Store):
    first = Lease(store, "quickstart", "alice:1", beat_s=0.1).acquire(wait=False)
    with pytest.raises(LeaseHeld, match="alice:1"):
        Lease(store, "quickstart", "bob:2", beat_s=0.1, patience_beats=600).acquire(wait=False)
    first.release()
    second = Lease(store, "quickstart", "bob:2", beat_s=0.1).acquire(wait=False)
    assert second.current_holder() == "bob:2"
    second.release()
    assert second.current_holder() is None


@pytest.mark.parametrize("folder", ["notes [2024]", "what?", "*"])
def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(tmp_path: Path, folder: str):
    """The second run would never see the first one's lease, and try for ever to make it."""
    (tmp_path / "notes 2").mkdir()
    store = Store(str(tmp_path / folder))
    for _ in range(4):
        lease = Lease(store, "weekly", "alice:1", beat_s=60).acquire(wait=False)
        assert lease.current_holder() == "alice:1"
        lease.release()
    names = {name.split(".")[0] for name in store.names(f"{store.base}/leases/weekly")}
    assert names == {"00000003", "00000004"}


def test_a_store_that_is_away_at_the_release_changes_no_outcome_and_the_next_run_takes_over(
    store: Store, monkeypatch, capsys
):
    def away(path: str, body: bytes) -> None:
        raise ConnectionError("the store is away")

    lease = Lease(store, "quickstart", "alice:1", beat_s=0.1).acquire(wait=False)
    with monkeypatch.context() as patch:
        patch.setattr(store.fs, "pipe_file", away)
        lease.release()
    assert "lease quickstart: not released (the store is away)" in capsys.readouterr().err
    Lease(store, "quickstart", "bob:2", beat_s=0.1).acquire(wait=False).release()


def test_a_dead_holder_is_replaced_and_a_merely_slow_one_learns_that_it_lost(store: Store):
    slow = Lease(store, "quickstart", "slow:1", beat_s=0.1)
    slow.acquire(wait=False)
    slow._stop.set()  # its heartbeat stands still, as after kill -9 or a long pause
    taker = Lease(store, "quickstart", "taker:2", beat_s=0.1).acquire(wait=False)
    slow._stop.clear()
    slow._heartbeat()
    assert slow.lost.is_set()
    assert taker.current_holder() == "taker:2"
    taker.release()


def test_a_holder_whose_process_is_gone_is_replaced_at_once(tmp_path: Path):
    code = (
        "import os, sys; from longreach.infra.artifact import Store; from longreach.infra.lease import Lease;"
        "Lease(Store(sys.argv[1]), 'w', 'dead:1').acquire(wait=False); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[1], check=False)
    taker = Lease(Store(str(tmp_path)), "w", "taker:2", beat_s=60)
    assert [p.suffix for p in (tmp_path / "leases/w").glob("*1.*")] != [".released"]
    assert taker.current_holder() is None
    started = time.monotonic()
    taker.acquire(wait=False).release()
    assert time.monotonic() - started < 30


def test_a_generation_that_the_next_holder_swept_away_is_looked_at_again(tmp_path: Path, monkeypatch):
    store = Store(str(tmp_path))
    first = Lease(store, "w", "first:1", beat_s=0.1).acquire(wait=False)
    late, seen = Lease(store, "w", "late:3", beat_s=0.1, patience_beats=20), [first._generation]
    first.release()
    second = Lease(store, "w", "second:2", beat_s=0.1).acquire(wait=False)
    real = late._newest
    monkeypatch.setattr(late, "_newest", lambda: seen.pop() if seen else real())
    with pytest.raises(LeaseHeld, match="second:2"):
        late.acquire(wait=False)
    second.release()


def test_a_holder_on_a_clone_of_this_machine_is_not_taken_for_dead(tmp_path: Path, monkeypatch):
    """Its marks are ours, its process is none of ours, and its counter moves."""
    gone = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mark = process_mark(gone.pid)
    gone.communicate(b"\n")
    with monkeypatch.context() as patch:
        patch.setattr("longreach.infra.lease.process_mark", lambda pid: mark)
        clone = Lease(Store(str(tmp_path)), "w", "clone:1", beat_s=0.1).acquire(wait=False)
    monkeypatch.setattr("longreach.infra.lease.on_own_disk", lambda path: False)  # clones share a network's disk
    with pytest.raises(LeaseHeld, match="clone:1"):
        Lease(Store(str(tmp_path)), "w", "taker:2", beat_s=0.5).acquire(wait=False)
    clone._stop.set()
    for thread in threading.enumerate():
        if thread.name == "lease w":
            thread.join(1.0)  # a beat on its way would count as alive
    Lease(Store(str(tmp_path)), "w", "taker:2", beat_s=0.5).acquire(wait=False).release()


def test_a_user_that_no_list_knows_can_hold_a_lease(monkeypatch):
    def unknown() -> str:
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr("getpass.getuser", unknown)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    assert holder_name().startswith("user 54321@")


def test_two_holders_that_sweep_at_once_do_not_stop_each_other(tmp_path: Path, monkeypatch):
    store = Store(str(tmp_path))
    for _ in range(3):
        Lease(store, "w", "first:1", beat_s=0.1).acquire(wait=False).release()
    late = Lease(store, "w", "late:2", beat_s=0.1, _generation=9)
    files = store.names(late._folder)
    monkeypatch.setattr(store, "names", lambda folder, ending: [*files, *files])
    late._sweep()
    assert list((tmp_path / "leases/w").iterdir()) == []


@pytest.mark.parametrize("name", [".nfs0000000000000001", "notes.json", "2.json"])
def test_a_file_that_is_no_leases_is_left_alone(tmp_path: Path, name: str):
    store, foreign = Store(str(tmp_path)), tmp_path / "leases/weekly" / name
    foreign.parent.mkdir(parents=True)
    foreign.touch()
    for _ in range(4):
        lease = Lease(store, "weekly", "alice:1", beat_s=60).acquire(wait=False)
        assert lease.current_holder() == "alice:1"
        lease.release()
    assert foreign.exists()


def test_a_lease_whose_acquisition_fails_is_released(tmp_path: Path, monkeypatch):
    def refused(self: Lease, path: str) -> None:
        raise PermissionError(path)

    store = Store(str(tmp_path))
    for _ in range(2):
        Lease(store, "weekly", "alice:1", beat_s=60).acquire(wait=False).release()
    with monkeypatch.context() as patch:
        patch.setattr(Lease, "_remove", refused)
        with pytest.raises(PermissionError):
            Lease(store, "weekly", "alice:1", beat_s=60).acquire(wait=False)
    assert Lease(store, "weekly", "", beat_s=60).current_holder() is None


def test_only_a_process_of_this_machine_is_known_to_be_gone():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mark = process_mark(child.pid)
    assert mark is not None
    assert not is_gone(mark)
    child.communicate(b"\n")
    assert is_gone(mark)
    assert not is_gone(["another boot", *mark[1:]])
    assert not is_gone([mark[0], "pid:[1]", *mark[2:]])
    assert not is_gone(None)
    own = process_mark(os.getpid())
    assert is_gone([*own[:3], "1"]), "its number went to another process"


def test_after_its_release_a_lease_writes_nothing_and_one_that_was_lost_releases_nothing(tmp_path: Path):
    store = Store(str(tmp_path))
    lease = Lease(store, "ended", "alice:1", beat_s=0.01).acquire(wait=False)
    lease.release()
    (heartbeat,) = [thread for thread in threading.enumerate() if thread.name == "lease ended"] or [None]
    if heartbeat:
        heartbeat.join(30)
        assert not heartbeat.is_alive()
    lost = Lease(store, "taken", "alice:1", beat_s=60).acquire(wait=False)
    lost.lost.set()
    lost.release()
    assert not list((tmp_path / "leases/taken").glob("*.released"))


def test_a_counter_that_moves_now_and_then_is_a_sign_of_life_each_time(tmp_path: Path, monkeypatch):
    store = Store(str(tmp_path))
    holder = Lease(store, "slow", "alice:1", beat_s=60).acquire(wait=False)
    counters, seen = iter(b"aabbccddeeff"), []

    def every_second_beat(self: Lease, generation: int) -> bytes:
        seen.append(next(counters))
        if len(seen) == 10:
            holder.release()
        return bytes(seen[-1:])

    monkeypatch.setattr(Lease, "_counter", every_second_beat)
    Lease(store, "slow", "bob:2", beat_s=0.001, patience_beats=4).acquire(wait=True).release()
    assert len(seen) >= 10, "taken over while the counter still moved"


def test_a_process_that_has_ended_is_gone_though_its_parent_has_not_looked_yet():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mark = process_mark(child.pid)
    assert child.stdin
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays, as a zombie
    assert is_gone(mark)
    child.wait()


@pytest.mark.parametrize("may_signal", [True, False])
def test_a_process_that_proc_hides_is_gone_only_once_the_kernel_has_none(monkeypatch, may_signal: bool):
    """With hidepid, /proc does not show another user's processes, and signals to them are refused."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mark, real, kill = process_mark(child.pid), process_mark, os.kill

    def refused(pid: int, signal: int) -> None:
        kill(pid, signal)
        raise PermissionError

    monkeypatch.setattr("longreach.infra.lease.process_mark", lambda pid: real(pid) if pid == os.getpid() else None)
    if not may_signal:
        monkeypatch.setattr(os, "kill", refused)
    assert not is_gone(mark)
    child.communicate(b"\n")
    assert is_gone(mark)


def test_the_generation_before_stays_and_older_ones_go(store: Store):
    """Who lists the folder while one takes over from the other must not miss both; and folders do not grow."""
    for _ in range(4):
        Lease(store, "nightly", "alice:1", beat_s=60).acquire(wait=False).release()
    store.fs.invalidate_cache()
    names = {Path(path).name.split(".")[0] for path in store.fs.glob(f"{store.base}/leases/nightly/*")}
    assert names == {"00000003", "00000004"}


def test_of_two_runs_started_together_one_waits_for_the_other(tmp_path: Path):
    store, inside, overlaps = Store(str(tmp_path)), [], []

    def run(name: str) -> None:
        lease = Lease(store, "weekly", name, beat_s=0.05, patience_beats=40).acquire(wait=True)
        overlaps.append(len(inside))
        inside.append(name)
        threading.Event().wait(0.2)
        inside.remove(name)
        lease.release()

    threads = [threading.Thread(target=run, args=(n,)) for n in ("a", "b", "c")]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert overlaps == [0, 0, 0]
