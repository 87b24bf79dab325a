"""Checkpoints of nodes without a shared disk: the upload runs beside training, and no error of it is lost."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import s3fs
import torch
import torch.distributed as dist
from ranks import run_spawned
from test_faults_power import ToyEngine

from longreach.infra.errors import Stopped, Superseded
from longreach.infra.share import WORKDIR, Share
from longreach.training import loop
from longreach.training.checkpoint import Checkpoints
from longreach.training.loop import Progress, Training


class RanksEngine(ToyEngine):
    """Writes one file per rank, as DeepSpeed does."""

    def save_checkpoint(self, folder: str, *, tag: str, **_: object) -> None:
        path = Path(folder, tag, f"rank{dist.get_rank()}_optim_states.pt")
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"state of {tag}")


@dataclass(frozen=True)
class SlowShare(Share):
    """Uploads the second node's files only when the file `go` exists; its text is the error, if any."""

    go: Path = Path()

    def push(self, folder: Path, *, last: str = "") -> None:
        while dist.get_rank() == 1 and not self.go.exists():
            time.sleep(0.01)
        if dist.get_rank() == 1 and (error := self.go.read_text()):
            raise OSError(error)
        super().push(folder, last=last)


def node(job: dict[str, Any]) -> tuple[Checkpoints, SlowShare]:
    """Return the checkpoints of this rank, whose node has a disk of its own."""
    os.environ |= job["access"] | {WORKDIR: f"{job['folder']}/node{dist.get_rank()}"}
    share = SlowShare(job["root"], "/driver", "finetune", "f", "0001-a", go=Path(job["folder"], "go"))
    place = share.store.attempts_folder("finetune", "f") / "0001-a/work/checkpoints"
    return Checkpoints(place, identity="run", share=share), share


def sealed(share: Share) -> list[str]:
    return [name for name, _ in share.sealed("work/checkpoints", "checkpoint.json")]


def save_twice(job: dict[str, Any]) -> list[Any]:
    checkpoints, share = node(job)
    checkpoints.save(RanksEngine(), 1, keep_last=1)
    trained = torch.ones(1)
    dist.all_reduce(trained)  # of a training step
    seen = [sealed(share), trained.item()]
    dist.barrier()
    share.go.touch()
    checkpoints.save(RanksEngine(), 2, keep_last=1)
    checkpoints.finish_upload()
    dist.barrier()
    path, _ = checkpoints.newest()
    stored = share.store.fs.ls(f"{share.root}/{share.folder}/work/checkpoints/step-00000002", refresh=True)
    files = sorted(Path(name).name for name in stored)
    return [*seen, sealed(share), path and path.name, files]


def on_two_nodes(function: str, root: str, folder: Path) -> list[Any]:
    access = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    job = {"folder": str(folder), "root": f"{root}/{folder.name}", "access": access}
    return run_spawned(f"test_faults_upload:{function}", job, world=2, folder=folder / "ranks")


def test_training_goes_on_while_a_checkpoint_is_uploaded_and_it_counts_once_all_nodes_have_done_so(s3_root, tmp_path):
    of_each_rank = [f"random-{rank:06d}.pt" for rank in (0, 1)] + [f"rank{rank}_optim_states.pt" for rank in (0, 1)]
    files = ["checkpoint.json", *of_each_rank]
    expected = [[], 2.0, ["step-00000002"], "step-00000002", files]
    assert on_two_nodes("save_twice", s3_root, tmp_path) == [expected, expected]


def save_while_the_store_is_away(job: dict[str, Any]) -> list[Any]:
    checkpoints, share = node(job)
    outcomes: list[Any] = []
    for step, answer in enumerate(["", "no connection", ""], start=1):
        if dist.get_rank() == 1:
            draft = share.go.with_suffix(".draft")
            draft.write_text(answer)
            draft.rename(share.go)
        checkpoints.save(RanksEngine(), step, keep_last=1)
        outcomes.append([checkpoints.finish_upload(), sealed(share)])
        dist.barrier()
    checkpoints.abandon_upload()
    checkpoints.save(RanksEngine(), 4, keep_last=1)
    return [*outcomes, [checkpoints.finish_upload(), sealed(share)]]


def test_all_ranks_learn_of_a_failed_upload_and_the_next_one_removes_what_it_left(s3_root, tmp_path):
    """The checkpoint that one node could not upload does not count, and the one before it stays. Nor does one count
    that was saved by an attempt which a newer one has replaced."""
    expected = [
        ["", ["step-00000001"]],
        ["OSError: no connection", ["step-00000001"]],
        ["", ["step-00000003"]],
        ["", ["step-00000003"]],
    ]
    assert on_two_nodes("save_while_the_store_is_away", s3_root, tmp_path) == [expected, expected]
    fs = s3fs.S3FileSystem()
    stored = fs.ls(f"{s3_root}/{tmp_path.name}/finetune/f/attempts/0001-a/work/checkpoints", refresh=True)
    assert [Path(name).name for name in stored] == ["step-00000003", "step-00000004"]


def save_again_after_going_back(job: dict[str, Any]) -> list[Any]:
    checkpoints, share = node(job)
    outcomes: list[Any] = []
    for step, answer in ((3, ""), (2, "no connection"), (3, "")):
        if dist.get_rank() == 1:
            draft = share.go.with_suffix(".draft")
            draft.write_text(answer)
            draft.rename(share.go)
        dist.barrier()
        checkpoints.save(RanksEngine(), step, keep_last=1)
        outcomes.append([checkpoints.finish_upload(), sealed(share)])
        dist.barrier()
    return outcomes


def test_a_checkpoint_that_was_outdated_before_a_failed_upload_stays_once_it_is_saved_again(s3_root, tmp_path):
    expected = [["", ["step-00000003"]], ["OSError: no connection", ["step-00000003"]], ["", ["step-00000003"]]]
    assert on_two_nodes("save_again_after_going_back", s3_root, tmp_path) == [expected, expected]


@pytest.mark.parametrize("again", ["", "still none"])
def test_training_goes_on_after_a_failed_upload_but_not_after_two_in_a_row(tmp_path, again):
    outcomes, notes = ["", "no connection", again], []
    training = Training.__new__(Training)
    training.checkpoints = SimpleNamespace(
        finish_upload=lambda: outcomes.pop(0), save=lambda *_, **__: tmp_path, identity="run"
    )
    training.log = SimpleNamespace(note=notes.append, checkpoint=lambda *_: None)
    training.job = SimpleNamespace(resources=SimpleNamespace(keep_last=1))
    training.optim, training.out, training.engine = SimpleNamespace(result="last"), tmp_path, None
    training.progress = Progress(5, 0, {}, [], [])
    training.save()
    training.progress.step = 10
    if again:
        with pytest.raises(RuntimeError, match="two checkpoints in a row were not uploaded: still none"):
            training.save()
        return
    training.save()
    assert notes == ["the checkpoint after step 5 was not uploaded: no connection"]
    assert training.progress.saved == 10


@pytest.mark.parametrize(
    ("failed", "resume"),
    [
        ("", "run the same command to resume from there"),
        (
            "no connection",
            "its checkpoint was not uploaded (no connection), so the same command resumes from an earlier",
        ),
    ],
)
def test_a_stop_waits_for_the_upload_and_says_if_it_failed(tmp_path, monkeypatch, failed, resume):
    monkeypatch.setattr(loop, "all_sum", lambda engine, values: values)
    training = Training.__new__(Training)
    training.job, training.log, training.engine = SimpleNamespace(stop_file=str(tmp_path)), None, None
    training.progress, training.optim = Progress(5, 5, {}, [], []), SimpleNamespace(steps=9)
    training.checkpoints = SimpleNamespace(finish_upload=lambda: failed)
    with pytest.raises(Stopped, match=re.escape(f"stopped after step 5 of 9: {resume}")):
        training._agree([])


def test_a_superseded_attempt_completes_no_upload(tmp_path):
    training, abandoned = Training.__new__(Training), []
    training.job = SimpleNamespace(superseded_file=str(tmp_path))
    training.progress = Progress(5, 5, {}, [], [])
    training.checkpoints = SimpleNamespace(abandon_upload=lambda: abandoned.append(True))
    with pytest.raises(Superseded, match="step 6"):
        training.run_step()
    assert abandoned
