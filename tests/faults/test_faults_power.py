"""A power cut at every moment of a publication and of a checkpoint: what was finished is there, whole."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from power_cut import PowerCuts

from longreach.infra.artifact import Store
from longreach.infra.files import sync_tree
from longreach.training.checkpoint import Checkpoints, newest_valid


def test_a_power_cut_at_any_moment_of_publication_leaves_the_artifact_or_the_checkpoint(tmp_path: Path):
    (tmp_path / "root").mkdir()
    store = Store(str(tmp_path / "root"))
    checkpointed, seen = [], set()

    def check(disk: Path) -> None:
        artifact = Store(str(disk)).find("finetune", "f1")
        checkpoints = list(disk.rglob("state.pt"))
        if artifact:
            assert Store(str(disk)).problems(artifact) == []
        elif checkpointed:
            assert [path.read_text() for path in checkpoints] == ["as it was synced"]
        seen.add(bool(artifact))

    with PowerCuts(tmp_path / "root", tmp_path / "disk", check) as cuts:
        attempt = store.new_attempt("finetune", "f1")
        (attempt.work / "state.pt").write_text("as it was synced")
        sync_tree(attempt.work)
        checkpointed.append(True)
        (attempt.out / "weights").mkdir()
        (attempt.out / "weights/model.safetensors").write_text("hours of training")
        (attempt.out / "summary.json").write_text("{}")
        store.publish(attempt, {"summary": {}})
    assert seen == {True, False}
    assert cuts.moments > 30
    assert not list((tmp_path / "root").rglob("state.pt")), "what the artifact replaces is gone in the end"


class ToyEngine:
    """Stands in for DeepSpeed's: it writes one file and syncs nothing."""

    def save_checkpoint(self, folder: str, *, tag: str, **_: object) -> None:
        path = Path(folder, tag, "mp_rank_00_model_states.pt")
        path.parent.mkdir()
        path.write_text(f"state of {tag}")

    device = torch.device("cpu")

    def zero_optimization_stage(self) -> int:
        return 2

    def bfloat16_enabled(self) -> bool:
        return False


@pytest.fixture
def alone(tmp_path: Path):
    if dist.is_initialized():  # a test before this one trained in this process, alone too
        yield
        return
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_power_cut_at_any_moment_of_a_checkpoint_leaves_the_newest_finished_one(tmp_path: Path, alone):
    work = tmp_path / "work"
    work.mkdir()
    finished = [0]

    def check(disk: Path) -> None:
        path, _ = newest_valid([disk / "checkpoints"], identity="run")
        step = json.loads((path / "checkpoint.json").read_text())["step"] if path else 0
        assert step >= finished[0], f"step {finished[0]} was saved, {step} is there"

    with PowerCuts(work, tmp_path / "disk", check):
        checkpoints = Checkpoints(work / "checkpoints", identity="run")
        for step in (1, 2, 3):
            checkpoints.save(ToyEngine(), step, keep_last=1)
            finished[0] = step
    assert [path.name for path in (work / "checkpoints").glob("step-*")] == ["step-00000003"]
