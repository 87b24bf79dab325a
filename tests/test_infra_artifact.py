"""Artifacts and leases: on a local folder and on an S3 server (moto), the same promises."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import s3fs

from longreach.infra.artifact import (
    AlreadyPublished,
    CorruptArtifact,
    Lease,
    LeaseHeld,
    Store,
    digest_of,
    file_digest,
    is_gone,
    process_mark,
)

RECORD = {"summary": {"rows": 3}, "inputs": {}, "recipe": {}}


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path / "root"), tmp_path / "scratch")
    return Store(f"{request.getfixturevalue('s3_root')}/{tmp_path.name}", tmp_path / "scratch")


def write(attempt, text: str = "tokens") -> None:
    (attempt.out / "rows").mkdir()
    (attempt.out / "rows" / "data.arrow").write_text(text)


def test_a_published_artifact_is_found_again_whole(store: Store):
    attempt = store.new_attempt("pack", "f1")
    write(attempt)
    (attempt.work / "checkpoint").write_text("private")
    published = store.publish(attempt, RECORD)
    fetched = store.fetch("pack", "f1")
    assert fetched.manifest == published.manifest
    assert fetched.summary == {"rows": 3}
    assert (fetched.path / "rows/data.arrow").read_text() == "tokens"
    assert not attempt.work.exists()
    assert [m["fingerprint"] for m in store.manifests("pack")] == ["f1"]


def test_nothing_is_published_before_publication(store: Store):
    write(store.new_attempt("pack", "f2"))
    assert store.find("pack", "f2") is None
    with pytest.raises(CorruptArtifact, match="not published"):
        store.fetch("pack", "f2")


def test_the_first_publisher_wins_and_the_orphan_is_refused_and_removed(store: Store):
    orphan, retry = store.new_attempt("train", "f3"), store.new_attempt("train", "f3")
    assert orphan.id != retry.id
    assert orphan.superseded_file.exists()
    assert not retry.superseded_file.exists()
    write(orphan, "by the orphan")
    write(retry, "by the retry")
    store.publish(retry, RECORD)
    orphan.out.mkdir(parents=True, exist_ok=True)  # it writes on after its folder was removed
    (orphan.out / "late").write_text("late")
    with pytest.raises(AlreadyPublished) as refused:
        store.publish(orphan, RECORD)
    assert refused.value.artifact.attempt == retry.id
    assert not orphan.folder.exists()
    assert (store.fetch("train", "f3").path / "rows/data.arrow").read_text() == "by the retry"


def test_of_many_publishers_at_once_exactly_one_wins(store: Store):
    attempts = [store.new_attempt("race", "f4") for _ in range(6)]
    for n, attempt in enumerate(attempts):
        write(attempt, str(n))
    outcomes: list[str] = []
    refused: list[str] = []

    def publish(attempt):
        try:
            store.publish(attempt, RECORD)
            outcomes.append(attempt.id)
        except AlreadyPublished:
            refused.append(attempt.id)

    threads = [threading.Thread(target=publish, args=(a,)) for a in attempts]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert outcomes == [store.fetch("race", "f4").attempt]
    assert len(refused) == 5


def test_a_new_attempt_sees_the_checkpoints_of_earlier_ones_newest_first(store: Store):
    first, second = store.new_attempt("train", "f5"), store.new_attempt("train", "f5")
    third = store.new_attempt("train", "f5")
    folders = store.earlier_attempts("train", "f5")
    assert [p.name for p in folders] == [third.id, second.id, first.id]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_files_are_noticed_and_named(tmp_path: Path, damage: str):
    store = Store(str(tmp_path))
    attempt = store.new_attempt("pack", "f6")
    write(attempt)
    path = store.publish(attempt, RECORD).path / "rows/data.arrow"
    if damage == "delete":
        path.unlink()
    else:
        path.write_text("tokenZ" if damage == "flip" else "tok")
    with pytest.raises(CorruptArtifact, match=r"rows/data\.arrow"):
        store.fetch("pack", "f6")


def test_a_remote_root_without_its_keys_or_bucket_is_one_clear_error(s3_root: str, tmp_path: Path, monkeypatch):
    assert Store(f"{s3_root}/nothing-there-yet", tmp_path).checked().fs, "nobody has published yet"
    with pytest.raises(ValueError, match=r"store 's3://missing/runs': there is no missing: correct store.root"):
        Store("s3://missing/runs", tmp_path).checked()
    assert Store("memory://nothing/yet", tmp_path).checked(), "a file system without buckets"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ValueError, match=r"Unable to locate credentials.*AWS_ACCESS_KEY_ID.*submit --no-plan"):
        Store(s3_root, tmp_path).checked()
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_remote_download_that_was_damaged_is_brought_again(s3_root: str, tmp_path: Path, monkeypatch):
    store = Store(f"{s3_root}/{tmp_path.name}", tmp_path / "scratch")
    attempt = store.new_attempt("pack", "f6")
    write(attempt)
    store.publish(attempt, RECORD)
    cached = store.fetch("pack", "f6").path / "rows/data.arrow"
    cached.write_text("tokenZ")
    assert (store.fetch("pack", "f6").path / "rows/data.arrow").read_text() == "tokens"
    with monkeypatch.context() as patch:
        read: list[Path] = []
        patch.setattr("longreach.infra.artifact.file_digest", lambda path: read.append(path) or file_digest(path))
        store.fetch("pack", "f6")
        assert read == [cached], "what is in the cache is read once"
    store.fs.pipe_file(f"{store.base}/pack/f6/attempts/{attempt.id}/out/rows/data.arrow", b"tokenZ")
    cached.unlink()
    with pytest.raises(CorruptArtifact, match=r"rows/data\.arrow"):
        store.fetch("pack", "f6")


def test_a_published_file_is_as_open_as_its_folder(tmp_path: Path):
    store = Store(str(tmp_path / "root"))
    attempt = store.new_attempt("merge", "f8")
    write(attempt)
    (attempt.out / "rows/data.arrow").chmod(0o600)
    attempt.out.chmod(0o750)
    assert (store.publish(attempt, RECORD).path / "rows/data.arrow").stat().st_mode & 0o777 == 0o640


def test_a_flipped_bit_in_the_manifest_is_noticed(store: Store):
    attempt = store.new_attempt("pack", "f7")
    write(attempt)
    store.publish(attempt, RECORD)
    path = f"{store.base}/pack/f7/artifact.json"
    store.fs.pipe_file(path, store.fs.cat_file(path).replace(b'"rows": 3', b'"rows": 2'))
    with pytest.raises(CorruptArtifact, match="damaged"):
        store.find("pack", "f7")
    store.quarantine("pack", "f7")
    assert store.find("pack", "f7") is None


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path: Path):
    store = Store(str(tmp_path))
    attempt = store.new_attempt("pack", "f8")
    write(attempt)
    manifest = store.publish(attempt, RECORD).manifest
    manifest["files"][0]["path"] = "../../../../secret"
    (tmp_path / "pack/f8/artifact.json").write_text(json.dumps({**manifest, "digest": digest_of(manifest)}))
    with pytest.raises(CorruptArtifact, match="leaves its folder"):
        store.find("pack", "f8")


def test_a_second_run_is_refused_while_the_first_lives_and_let_in_after_release(store: Store):
    first = Lease(store, "quickstart", "alice:1", beat_s=0.1).acquire(wait=False)
    with pytest.raises(LeaseHeld, match="alice:1"):
        Lease(store, "quickstart", "bob:2", beat_s=0.1, patience_beats=8).acquire(wait=False)
    first.release()
    second = Lease(store, "quickstart", "bob:2", beat_s=0.1).acquire(wait=False)
    assert second.current_holder() == "bob:2"
    second.release()
    assert second.current_holder() is None


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
        "import os, sys; from longreach.infra.artifact import Lease, Store;"
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


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object()])
def test_values_without_one_serialisation_are_refused_as_identity(value):
    with pytest.raises(ValueError, match="deterministically"):
        digest_of({"a": value})
