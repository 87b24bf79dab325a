"""`longreach gc`: what is kept, what goes, and that nothing is taken from who is at work."""

import functools
import os
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from longreach.infra.artifact import MANIFEST, Store
from longreach.infra.lease import Lease, LeaseHeld
from longreach.pipelines import gc
from longreach.pipelines.cli import app
from longreach.pipelines.gc import Keep

OLD_DAYS = 30.0


@pytest.fixture(params=["disk", "memory"])
def store(request, tmp_path: Path) -> Store:
    if request.param == "disk":
        return Store(str(tmp_path / "root"))
    return Store(f"memory://gc-{tmp_path.name}", tmp_path / "scratch")


def publish(
    store: Store, stage: str, fingerprint: str, made_from: tuple[tuple[str, str], ...] = (), *, days=OLD_DAYS, **recipe
):
    """Publish a stage of a fingerprint as of so many days ago; return its key."""
    attempt = store.new_attempt(stage, fingerprint)
    (attempt.out / "file").write_bytes(b"x" * 1_000)
    inputs = {source: {"stage": kind, "fingerprint": source} for kind, source in made_from}
    when = (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="microseconds")
    record = {
        "label": f"{stage}[{fingerprint}]",
        "inputs": inputs,
        "identity": {"recipe": recipe},
        "published_at": when,
    }
    store.publish(attempt, record)
    return stage, fingerprint


def names(candidates: list[gc.Candidate]) -> set[str]:
    return {candidate.fingerprint for candidate in candidates}


def test_the_newest_reports_of_each_recipe_are_kept_with_all_they_show(store: Store):
    base = publish(store, "convert", "base")
    for recipe in ("weekly", "other"):
        for week in (3, 2, 1):
            model = publish(store, "merge", f"{recipe}-model-{week}", (base,))
            publish(store, "release", f"{recipe}-release-{week}", (model,))
            publish(store, "report", f"{recipe}-report-{week}", (model,), name=recipe, days=OLD_DAYS + week)
    gone = names(gc.find(store, Keep(days=7, reports=2)))
    assert gone == {f"{recipe}-{kind}-3" for recipe in ("weekly", "other") for kind in ("model", "release", "report")}
    assert "base" in names(gc.find(store, Keep(days=7, reports=0)))


def test_reports_of_failed_runs_do_not_push_a_complete_one_out(store: Store):
    publish(store, "report", "complete", days=100, name="weekly")
    for n in range(3):
        publish(store, "report", f"failed-{n}", days=90 - n, name="weekly", failed={"pack": f"reason {n}"})
    assert names(gc.find(store, Keep(days=7, reports=2))) == {"failed-0"}


def test_what_is_young_or_named_is_kept_with_what_it_was_made_from(store: Store):
    base = publish(store, "convert", "base")
    publish(store, "merge", "young", (publish(store, "finetune", "trained", (base,)),), days=1)
    publish(store, "merge", "named", (publish(store, "finetune", "also-trained", (base,)),))
    publish(store, "merge", "unwanted", (base,))
    assert names(gc.find(store, Keep(days=7, reports=0, fingerprints={"named"}))) == {"unwanted"}
    everything_else = {"young", "trained", "named", "also-trained", "unwanted"}
    assert names(gc.find(store, Keep(days=0, reports=0, fingerprints={"base"}))) == everything_else


def test_attempts_that_nobody_finished_go_once_they_are_old(store: Store):
    attempt = store.new_attempt("finetune", "half-done")
    (attempt.work / "checkpoint").write_bytes(b"x" * 5_000)
    assert gc.find(store, Keep(days=1, reports=0)) == []
    for path in (attempt.work / "checkpoint", attempt.work, attempt.out, attempt.folder):
        os.utime(path, (0, 0))
    (candidate,) = gc.find(store, Keep(days=1, reports=0))
    assert (candidate.published, candidate.bytes) == (False, 5_000)
    assert gc.find(store, Keep(days=1, reports=0, fingerprints={"half-done"})) == []
    assert gc.remove(store, candidate)
    assert not attempt.folder.exists()


def test_checkpoints_that_another_machine_left_in_an_object_store_go_too(tmp_path: Path):
    store = Store(f"memory://gc-{tmp_path.name}", tmp_path / "scratch")
    attempts = f"{store.base}/finetune/half-done/attempts"
    store.fs.pipe_file(f"{attempts}/0001-aaaaaaaa/work/checkpoints/step-1/weights", b"x" * 5_000)
    publish(store, "finetune", "done", days=1)
    assert gc.find(store, Keep(days=1, reports=0, fingerprints={"done"})) == []
    (candidate,) = gc.find(store, Keep(days=0, reports=0, fingerprints={"done"}))
    assert (candidate.fingerprint, candidate.published, candidate.bytes) == ("half-done", False, 5_000)
    assert gc.remove(store, candidate)
    assert store.names(attempts) == []
    assert store.fetch("finetune", "done").attempt


def test_what_a_killed_publisher_left_of_an_artifact_goes_and_the_artifact_stays(store: Store):
    loser = store.new_attempt("finetune", "kept")
    publish(store, "finetune", "kept")
    artifact = store.fetch("finetune", "kept")
    (loser.work / "step-1").mkdir(parents=True)
    (loser.work / "step-1/weights").write_bytes(b"x" * 3_000)
    checkpoint = f"{store.base}/finetune/kept/attempts/{artifact.attempt}/work/step-2"
    store.fs.makedirs(checkpoint)
    store.fs.pipe_file(f"{checkpoint}/weights", b"x" * 2_000)
    keep = Keep(days=7, reports=0, fingerprints={"kept"})
    (candidate,) = gc.find(store, keep)
    assert (candidate.fingerprint, candidate.bytes, candidate.leftovers) == ("kept", 5_000, True)
    assert gc.remove(store, candidate)
    assert gc.find(store, keep) == []
    assert not loser.folder.exists()
    assert store.fetch("finetune", "kept").attempt == artifact.attempt


def test_what_is_removed_is_gone_whole_and_can_be_made_anew(store: Store):
    publish(store, "merge", "unwanted")
    aside = store.fs.glob(f"{store.base}/merge/unwanted/{MANIFEST}")[0] + ".damaged-1"
    store.fs.pipe_file(aside, b"{}")
    (candidate,) = gc.find(store, Keep(days=7, reports=0))
    assert gc.remove(store, candidate)
    store.fs.invalidate_cache()
    left = [Path(path).relative_to(Path(store.base)).parts[2] for path in store.fs.find(store.base)]
    assert set(left) == {"lease"}, "its lease's numbers never go back"
    publish(store, "merge", "unwanted")
    assert store.fetch("merge", "unwanted").attempt


def test_what_somebody_makes_is_left_alone(tmp_path: Path):
    store = Store(str(tmp_path))
    publish(store, "merge", "unwanted")
    (candidate,) = gc.find(store, Keep(days=7, reports=0))
    maker = Lease(store, "merge", "ann", beat_s=0.05, place="merge/unwanted/lease").acquire(wait=False)
    try:
        assert not gc.remove(store, candidate)
        assert store.fetch("merge", "unwanted")
    finally:
        maker.release()


def test_nothing_is_removed_while_a_run_is_alive_and_runs_wait_meanwhile(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(gc, "Lease", functools.partial(Lease, beat_s=0.05))  # as often as the runs' here
    store = Store(str(tmp_path))
    run = Lease(store, "weekly", "ann", beat_s=0.05).acquire(wait=False)
    (tmp_path / "leases/.DS_Store").touch()  # is no run
    with pytest.raises(LeaseHeld, match="ann"), gc.no_runs(store):
        pytest.fail("a run is alive")
    run.release()
    taken = threading.Event()

    def another_run() -> None:
        Lease(store, "weekly", "bob", beat_s=0.05).acquire(wait=True).release()
        taken.set()

    with gc.no_runs(store):
        waiting = threading.Thread(target=another_run)
        waiting.start()
        time.sleep(0.5)
        assert not taken.is_set()
    waiting.join()
    assert taken.is_set()


def recipes(folder: Path, *places: str) -> list[str]:
    """Write a recipe for each section `store` and `tracking`; return their paths."""
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("words")
    paths = [folder / f"{n}.yaml" for n in range(len(places))]
    for path, more in zip(paths, places, strict=True):
        path.write_text(f"name: r\ncorpus: {{sources: [{{files: 'texts/*.txt'}}], test: [a]}}\n{more}\n")
    return [str(path) for path in paths]


def test_champions_of_every_recipes_registry_are_kept_whatever_the_order(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://a:5000")
    store = Store(str(tmp_path / ".longreach"))
    champions = {"http://a:5000": {"of-a"}, "http://b:5000": {"of-b"}}
    for fingerprint in ("of-a", "of-b", "unwanted"):
        publish(store, "merge", fingerprint)
    monkeypatch.setattr(
        "longreach.infra.registry.aliased_fingerprints", lambda: champions[os.environ["MLFLOW_TRACKING_URI"]]
    )
    given = recipes(tmp_path, "", "tracking: {uri: 'http://b:5000'}")
    for order in (given, given[::-1]):
        listed = CliRunner().invoke(app, ["gc", *order])
        assert listed.exit_code == 0, listed.output
        assert "merge[unwanted]" in listed.output
        assert "of-" not in listed.output
        os.environ["MLFLOW_TRACKING_URI"] = "http://a:5000"


def test_recipes_share_a_store_whatever_its_spelling_and_a_field_that_differs_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # the command sets it, and this brings it back afterwards
    given = recipes(tmp_path, "", f"store: {{root: {tmp_path}/texts/../.longreach}}", "store: {workdir: elsewhere}")
    listed = CliRunner().invoke(app, ["gc", *given[:2]])
    assert listed.exit_code == 0, listed.output
    with pytest.raises(ValueError, match=r"store\.workdir is \.longreach in .*0\.yaml, but elsewhere in .*2\.yaml"):
        CliRunner().invoke(app, ["gc", given[0], given[2]], catch_exceptions=False)


def test_the_command_lists_first_and_removes_when_told_to(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # the command sets it, and this brings it back afterwards
    store = Store(str(tmp_path / ".longreach"))
    publish(store, "merge", "unwanted")
    publish(store, "merge", "young", days=0)
    listed = CliRunner().invoke(app, ["gc"])
    assert listed.exit_code == 0, listed.output
    assert "merge[unwanted]" in listed.output
    assert "young" not in listed.output
    assert "nothing was deleted; add --delete to delete what is listed" in listed.output
    assert store.find("merge", "unwanted")
    removed = CliRunner().invoke(app, ["gc", "--delete"])
    assert removed.exit_code == 0, removed.output
    assert "1 artifacts and attempts, 0.0 MB" in removed.output
    assert store.find("merge", "unwanted") is None
    assert store.fetch("merge", "young")
