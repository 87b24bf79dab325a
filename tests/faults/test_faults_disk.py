"""A disk that is full and a folder that may not be written to: nothing that was good is lost, and the error says where.

The full disk is a tmpfs of a few MB, mounted by the test: root only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_training_loop import at_step
from toy_models import job, train

from longreach.infra.artifact import Store
from longreach.infra.launch import FINAL_ERRORS
from longreach.infra.lease import Lease
from longreach.training.checkpoint import problem

NOBODY = 65534
RECORD = {"summary": {}, "inputs": {}, "recipe": {}}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root (CAP_SYS_ADMIN)")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all the room there is."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert shutil.disk_usage(disk).free == 0
    return ballast


def published(store: Store, fingerprint: str) -> None:
    attempt = store.new_attempt("pack", fingerprint)
    (attempt.out / "rows").write_bytes(bytes(100_000))
    store.publish(attempt, RECORD)


def test_a_full_disk_leaves_what_was_published_and_nothing_half_written(small_disk: Path):
    store = Store(str(small_disk / "root"))
    published(store, "good")
    attempt = store.new_attempt("pack", "late")
    (attempt.out / "rows").write_bytes(bytes(100_000))
    ballast = fill(small_disk)
    with pytest.raises(OSError, match="No space left on device"):
        store.publish(attempt, RECORD)
    assert store.find("pack", "late") is None
    assert store.problems(store.fetch("pack", "good")) == []
    ballast.unlink()
    store.publish(attempt, RECORD)
    assert store.problems(store.fetch("pack", "late")) == []


def test_a_full_disks_error_names_the_file_that_did_not_fit(small_disk: Path):
    store = Store(str(small_disk / "root"))
    attempt = store.new_attempt("pack", "late")
    (attempt.out / "rows").write_bytes(bytes(100_000))
    fill(small_disk)
    with pytest.raises(OSError, match=f"No space left on device.*{small_disk}/root/pack/late"):
        store.publish(attempt, RECORD)


def test_a_disk_that_fills_while_training_keeps_the_last_good_checkpoint(tmp_path: Path, small_disk: Path, monkeypatch):
    todo = job(tmp_path, work=str(small_disk / "work"), resources={"checkpoint_every_steps": 2})
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: fill(small_disk))
        with pytest.raises((OSError, RuntimeError, *FINAL_ERRORS.values())):
            train(todo)
    checkpoints = Path(todo["work"]) / "checkpoints"
    assert [p.name for p in checkpoints.glob("step-*")] == ["step-00000002"]
    (small_disk / "ballast").unlink()
    summary = train(todo)
    assert summary.resumed_from_step == 2
    assert summary.notes == ()
    assert problem(checkpoints / "step-00000004", identity="other") == "it belongs to another recipe"


def test_a_disk_that_fills_while_training_is_called_full_by_name(tmp_path: Path, small_disk: Path, monkeypatch):
    todo = job(tmp_path, work=str(small_disk / "work"), resources={"checkpoint_every_steps": 2})
    at_step(monkeypatch, 3, lambda: fill(small_disk))
    with pytest.raises(tuple(FINAL_ERRORS.values()), match=f"{small_disk}.*[Nn]o space left"):
        train(todo)


# ---- not ours to write


@contextlib.contextmanager
def somebody_else() -> Iterator[None]:
    """This process without root's right to write everywhere."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def locked(tmp_path: Path) -> Path:
    """A folder that everybody may read and nobody may write, reachable by everybody."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o555)
    root = tmp_path / "root"
    root.mkdir()
    root.chmod(0o555)
    return root


def test_a_root_that_may_not_be_written_is_named_and_what_is_there_can_be_read(locked: Path):
    store = Store(str(locked))
    locked.chmod(0o755)
    published(store, "good")
    locked.chmod(0o555)
    with somebody_else():
        with pytest.raises(PermissionError, match=str(locked)):
            store.new_attempt("evaluate", "f")
        with pytest.raises(PermissionError, match=str(locked)):
            Lease(store, "tiny", "nobody").acquire(wait=False)
        assert store.problems(store.fetch("pack", "good")) == []
