"""The runner on a real Ray cluster, with stages that cost nothing."""

import errno
import io
import os
import signal
import threading
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from toy_stages import ToyRecipe, calls, toy, toy_report

from longreach.infra.lease import LeaseHeld
from longreach.infra.tracking import read_events
from longreach.pipelines import plan, run, signals
from longreach.pipelines.display import Display
from longreach.pipelines.reader import load
from longreach.pipelines.stage import Stage
from longreach.pipelines.stages import STAGES
from longreach.pipelines.worker import Done


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch):
    """a ─ b ─ report, and c--1 on its own; the recipe is named like a stage. `change(b=...)` changes recipes."""
    log = tmp_path / "log"
    log.mkdir()
    recipes = {name: {"text": name, "log": str(log)} for name in ("a", "b", "c", "report")}
    monkeypatch.setitem(STAGES, "toy", toy)
    monkeypatch.setitem(STAGES, "report", toy_report)

    def build(recipe, **options) -> list[Stage]:
        made = {name: ToyRecipe(**choices) for name, choices in recipes.items()}
        a = Stage("toy", "a", made["a"])
        b = Stage("toy", "b", made["b"], {"text": a})
        c = Stage("toy", "c--1", made["c"])
        return [a, b, c, Stage("report", "report", made["report"], {"b": b, "c": c})]

    for module in (plan, run):
        monkeypatch.setattr(module, "build", build)
    workdir = tmp_path / "work"
    places = [f"store.root={tmp_path}/root", f"store.workdir={workdir}", "tracking.enabled=false"]
    loaded = load("quickstart", ["name=report", *places])

    class Pipeline:
        def __init__(self):
            self.loaded, self.log, self.root, self.workdir = loaded, log, tmp_path / "root", workdir

        def change(self, **choices):
            for name, values in choices.items():
                recipes[name].update(values)

        def run(self, **options):
            self.shown = io.StringIO()
            with Display(console=Console(file=self.shown)) as display:
                return run.run(loaded, display=display, **options)

        def calls(self) -> dict[str, int]:
            return {name: calls(log, name) for name in recipes}

        def states(self) -> dict[str, str]:
            return {row.stage: row.state for row in plan.plan(loaded)}

    return Pipeline()


def test_a_run_publishes_every_stage_and_a_second_run_does_nothing(cluster, pipeline, monkeypatch):
    monkeypatch.setattr(run, "check_tracking", lambda uri: pytest.fail("tracking is off and nothing needs MLflow"))
    outcome = pipeline.run()
    assert outcome.failed == {}
    assert sorted(outcome.ran) == ["a", "b", "c--1", "report"]
    report = plan.open_store(pipeline.loaded).fetch("report", outcome_fingerprint(pipeline, "report"))
    assert (report.path / "text").read_text() == "abcreport"
    monkeypatch.setattr(run, "_run_missing", lambda *a: pytest.fail("there was nothing to run"))
    again = pipeline.run()
    assert (again.ran, sorted(again.reused)) == ([], ["a", "b", "c--1", "report"])
    assert set(pipeline.calls().values()) == {1}


def outcome_fingerprint(pipeline, label: str) -> str:
    return next(row.fingerprint for row in plan.plan(pipeline.loaded) if row.stage == label)


def test_a_changed_choice_runs_its_stage_and_those_after_it_and_plan_says_so(cluster, pipeline):
    pipeline.run()
    pipeline.change(b={"text": "B"})
    rows = {row.stage: row for row in plan.plan(pipeline.loaded)}
    assert {label: row.state for label, row in rows.items()} == {
        "a": "done",
        "b": "stale",
        "c--1": "done",
        "report": "stale",
    }
    assert rows["b"].why == "recipe.text: b -> B"
    assert rows["report"].why == "its input b changes"
    assert sorted(pipeline.run().ran) == ["b", "report"]
    assert pipeline.calls() == {"a": 1, "b": 2, "c": 1, "report": 2}


def test_a_flipped_byte_is_noticed_before_use_and_only_that_stage_runs_again(cluster, pipeline, capsys):
    pipeline.run()
    store = plan.open_store(pipeline.loaded)
    damaged = store.fetch("toy", outcome_fingerprint(pipeline, "a")).path / "text"
    damaged.write_text("A")
    outcome = pipeline.run()
    assert (outcome.ran, outcome.failed) == (["a"], {})
    assert "its content changed since it was published" in capsys.readouterr().err
    assert store.fetch("toy", outcome_fingerprint(pipeline, "a"))


def test_a_failed_stage_is_named_and_those_that_do_not_need_it_still_run(cluster, pipeline):
    pipeline.change(b={"fail": "group_tokens 7 is odd: use 6 or 8"})
    outcome = pipeline.run()
    assert outcome.failed == {"b": "group_tokens 7 is odd: use 6 or 8"}
    assert sorted(outcome.ran) == ["a", "c--1", "report"]
    assert outcome.reused == []
    assert "group_tokens 7 is odd" in outcome.report_path.read_text(), "there is a report, and it says what failed"
    pipeline.change(b={"fail": ""})
    assert sorted(pipeline.run().ran) == ["b", "report"]


def test_a_stage_task_killed_with_sigkill_is_retried_and_sees_its_earlier_checkpoint(cluster, pipeline):
    pipeline.change(b={"kill_self_once": True})
    outcome = pipeline.run()
    assert not outcome.failed
    manifest = next(m for m in plan.open_store(pipeline.loaded).manifests("toy") if m["label"] == "b")
    assert manifest["summary"]["resumed"] == ["half done"]
    assert manifest["attempt"].startswith("0002-")
    assert pipeline.calls()["b"] == 2


def test_force_runs_a_stage_and_all_that_is_made_from_it_again_under_the_same_fingerprints(cluster, pipeline):
    pipeline.run()
    before = {row.stage: row.fingerprint for row in plan.plan(pipeline.loaded)}
    outcome = pipeline.run(force=("a",))
    assert sorted(outcome.ran) == ["a", "b", "report"], "by their fingerprints b and the report would be done"
    assert outcome.reused == ["c--1"]
    said = "--force a: rerunning 3 of 4 stages, including those that depend on forced ones: toy 2, report 1"
    assert said in pipeline.shown.getvalue(), "it says so first, since there may be trainings among them"
    assert {row.stage: row.fingerprint for row in plan.plan(pipeline.loaded)} == before
    assert pipeline.run(force=("report",)).ran == ["report"]
    with pytest.raises(ValueError, match="no such stage"):
        pipeline.run(force=("pakc",))


def test_force_takes_nothing_up_that_the_old_code_left(cluster, pipeline):
    """What a forced stage and one made from it had half done is no start, and a damaged manifest is no obstacle."""
    pipeline.run()
    store = plan.open_store(pipeline.loaded)
    for name in ("a", "b"):
        left = store.new_attempt("toy", outcome_fingerprint(pipeline, name))
        (left.work / "checkpoint").write_text("of the old code")
    manifest = Path(store.base, "toy", outcome_fingerprint(pipeline, "a"), "artifact.json")
    manifest.write_text(manifest.read_text()[:100])
    assert sorted(pipeline.run(force=("a",)).ran) == ["a", "b", "report"]
    made = {manifest["label"]: manifest["summary"] for manifest in store.manifests("toy")}
    assert made["a"]["resumed"] == made["b"]["resumed"] == []


def test_force_makes_the_report_on_what_was_done_anew_where_the_same_fails_again(cluster, pipeline):
    pipeline.change(b={"fail": "group_tokens 7 is odd: use 6 or 8"})
    first, second = pipeline.run(), pipeline.run(force=("c--1",))
    assert second.ran == ["c--1", "report"]
    assert pipeline.run().reused == ["a", "c--1", "report"]
    assert first.report_path != second.report_path, "the first one is on the old c--1"


def test_force_leaves_a_stage_alone_that_another_run_makes(cluster, pipeline):
    pipeline.run()
    store, fingerprint = plan.open_store(pipeline.loaded), outcome_fingerprint(pipeline, "b")
    with run._lease(store, "b", False, Display(quiet=True), place=f"toy/{fingerprint}/lease"):
        with pytest.raises(LeaseHeld, match="'b' is being run by"):
            pipeline.run(force=("b",))
        assert store.find("toy", fingerprint)


def test_a_second_run_of_a_recipe_is_refused_while_one_lives(cluster, pipeline):
    store = plan.open_store(pipeline.loaded)
    with run._lease(store, "report", False, Display(quiet=True)), pytest.raises(LeaseHeld, match="process"):
        pipeline.run()
    assert not any(pipeline.calls().values())


def test_what_went_while_a_run_waited_for_its_lease_is_made_again(pipeline, monkeypatch):
    store, fingerprint = plan.open_store(pipeline.loaded), outcome_fingerprint(pipeline, "a")
    attempt = store.new_attempt("toy", fingerprint)
    (attempt.out / "text").write_text("a")
    store.publish(attempt, {"label": "a", "seconds": 1.0})
    known, lease = [], run._lease
    monkeypatch.setattr(run, "_run_missing", lambda this: known.append([*this.artifacts]))
    pipeline.run()

    @contextmanager
    def slow_lease(*args, **options):
        with lease(*args, **options) as held:
            store.withdraw("toy", fingerprint)
            yield held

    monkeypatch.setattr(run, "_lease", slow_lease)
    pipeline.run()
    assert known == [["a"], []]


def test_a_stage_that_no_node_can_take_is_refused_before_the_first_one_begins(cluster, pipeline, monkeypatch):
    """Ray itself would wait for ever. What --force names is still there then, and MLflow says why."""
    pipeline.run()
    before = set((pipeline.workdir / "spool").iterdir())
    monkeypatch.setattr(run._Driver, "follow", lambda driver: pytest.fail("it has begun"))
    monkeypatch.setitem(STAGES, "report", replace(toy_report, cpus=lambda resources: 3))
    with pytest.raises(ValueError, match="report needs 3 CPUs on one node; the largest node has 2 CPUs"):
        pipeline.run(force=("a",))
    assert {*pipeline.states().values()} == {"done"}
    (spool,) = set((pipeline.workdir / "spool").iterdir()) - before
    *_, note, end = read_events(spool / "=pipeline.jsonl", 0)[0]
    assert "Failed:** report needs 3 CPUs on one node" in str(note)
    assert end["status"] == "FAILED", "nobody killed it"


def test_nodes_that_join_somebodys_cluster_are_waited_for_a_while(monkeypatch):
    monkeypatch.setitem(STAGES, "toy", toy)
    monkeypatch.setattr(run.time, "sleep", lambda seconds: None)
    head, worker = ({"Alive": True, "Resources": resources} for resources in ({}, {"CPU": 1.0}))
    looks, notes = iter([[head], [head], [head, worker]]), []
    this = SimpleNamespace(
        stages=[Stage("toy", "a", ToyRecipe())],
        artifacts={},
        address="10.0.0.5:6379",
        loaded=load("quickstart"),
        display=SimpleNamespace(note=notes.append),
    )
    run._check_room(SimpleNamespace(nodes=lambda: next(looks)), this)
    assert [note.partition(":")[0] for note in notes] == ["a needs 0.5 CPUs on one node; the largest node has 0 CPUs"]
    assert next(looks, None) is None
    monkeypatch.setattr(run, "JOIN_S", 0.0)
    with pytest.raises(ValueError, match=r"a needs 0\.5 CPUs"):
        run._check_room(SimpleNamespace(nodes=lambda: [head, worker | {"Alive": False}]), this)


def test_manifests_record_what_made_them(cluster, pipeline):
    pipeline.run()
    manifest = next(m for m in plan.open_store(pipeline.loaded).manifests("report"))
    assert set(manifest["inputs"]) == {"b", "c"}
    assert manifest["resources"]["workers"] == 2
    assert manifest["versions"]["python"]
    assert manifest["identity"]["recipe"]["text"] == "report"


def test_every_stage_and_attempt_leaves_its_events(cluster, pipeline):
    pipeline.run()
    [folder] = (pipeline.workdir / "spool").iterdir()
    starts = {}
    for path in folder.glob("*.jsonl"):
        events, _ = read_events(path, 0)
        assert events[-1] == events[-1] | {"event": "end", "status": "FINISHED"}
        starts[events[0]["name"].split(" ")[0], events[0]["kind"]] = events[0]
    assert {kind for _, kind in starts} == {"pipeline", "stage", "attempt"}
    assert starts["b", "attempt"]["parent"] == starts["b", "stage"]["run"]
    assert starts["b", "stage"]["parent"] == starts["report", "pipeline"]["run"]


@pytest.mark.parametrize(("signum", "ends"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_before_the_first_stage_is_no_success(cluster, pipeline, monkeypatch, signum, ends):
    follow = run._Driver.follow

    def signalled(driver):
        os.kill(os.getpid(), signum)
        follow(driver)

    monkeypatch.setattr(run._Driver, "follow", signalled)
    before = signal.getsignal(signum)
    own = signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL
    signal.signal(signum, own)  # tests in the background of a script ignore Ctrl-C
    try:
        with pytest.raises(ends):
            pipeline.run()
        assert signal.getsignal(signum) is own
    finally:
        signal.signal(signum, before)
    assert not any(pipeline.calls().values())


def test_a_second_signal_does_not_wait_and_one_of_ray_itself_is_143(tmp_path):
    stopping = signals.Stopping(tmp_path / "stop")
    stopping.ask(signal.SIGINT, None)
    assert stopping.file.exists(), "training is told"
    with pytest.raises(KeyboardInterrupt):
        stopping.ask(signal.SIGINT, None)
    with pytest.raises(SystemExit) as ended, signals.terminable():
        raise SystemExit(signal.SIGTERM)
    assert ended.value.code == 143


def test_after_its_terminal_closed_a_run_can_still_print_and_ends_as_129():
    ours, its = os.openpty()
    stopping = signals.Stopping(terminal=[its])
    os.close(ours)
    with pytest.raises(OSError, match="Input/output error"):
        os.write(its, b"a message to a closed terminal")
    with pytest.raises(SystemExit) as ended:
        stopping.ask(signal.SIGHUP, None)
    assert ended.value.code == 129
    os.write(its, b"to nobody")
    os.close(its)


def test_a_report_on_what_was_done_that_fails_too_leaves_the_first_reason_to_be_said(cluster, pipeline):
    pipeline.change(b={"fail": "unspeakable"})
    outcome = pipeline.run()
    assert outcome.failed == {"b": "unspeakable", "report": "on the finished stages: the report cannot say that"}


def test_a_disk_that_is_full_for_the_report_too_leaves_the_stages_reason_to_be_said(cluster, pipeline, monkeypatch):
    def withdraw(store, stages, *others):
        if stages:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run, "_withdraw", withdraw)
    pipeline.change(b={"fail": "no space for b"})
    failed = pipeline.run().failed
    assert failed["b"] == "no space for b"
    assert failed["report"].startswith("on the finished stages: [Errno 28] No space left on device: free space on the")


class Recorded:
    """Stands in for Ray and the display: every stage ends as soon as it is submitted; what happens is written down."""

    exceptions = SimpleNamespace(RayError=RuntimeError)

    def __init__(self, fails: str):
        self.events: list[tuple[str, str]] = []
        self.details: list[str] = []
        self.fails = fails

    def stage(self, label: str, state: str, detail: str = "") -> None:
        self.events.append((label, state))
        self.details.append(detail)

    def options(self, *, name: str, **placement) -> SimpleNamespace:
        future: Future = Future()
        if name == self.fails:
            future.set_exception(RuntimeError("it fails"))
        else:
            future.set_result(Done(1.0, waited_s=75.0 if name == "waits" else 0.0))
        return SimpleNamespace(remote=lambda task: SimpleNamespace(future=lambda: future))


def follow(tmp_path: Path, stages: list[Stage], fails: str = "") -> tuple[Recorded, run.RunOutcome]:
    loaded = load("quickstart", [f"store.root={tmp_path}/root", f"store.workdir={tmp_path}/work"])
    recorded, lease, stopping = Recorded(fails), SimpleNamespace(lost=threading.Event()), signals.Stopping()
    state = run._Run(loaded, plan.open_store(loaded), stages, {}, recorded, lease, stopping, run.RunOutcome(), None)
    with pytest.MonkeyPatch.context() as patch:  # no Ray here that could be asked
        patch.setattr("longreach.infra.cluster.reservable_bytes", lambda gib, at_once=1: 0)
        run._Driver(recorded, state, recorded).follow()
    return recorded, state.outcome


def test_a_stage_is_submitted_once_its_inputs_are_published_and_those_it_comes_after_have_ended(monkeypatch, tmp_path):
    monkeypatch.setitem(STAGES, "toy", toy)
    a, b = Stage("toy", "a", ToyRecipe(text="a")), Stage("toy", "b", ToyRecipe(text="b"))
    first = Stage("toy", "first", ToyRecipe(), {"x": a, "y": a})
    second = Stage("toy", "second", ToyRecipe(), {"x": a, "z": b}, after=(first,))
    for fails in ("", "first"):
        recorded, outcome = follow(tmp_path / f"fails-{fails}", [a, b, first, second], fails)
        at = {event: n for n, event in enumerate(recorded.events)}
        assert [label for label, _ in recorded.events[:2]] == ["a", "b"]
        assert at["a", "done"] < at["first", "waiting"]
        assert at["first", "failed" if fails else "done"] < at["second", "waiting"], "they never run at the same time"
        assert "second" in outcome.ran, "one that only comes before it may fail"


def test_what_a_stage_waited_for_others_is_shown_apart_from_its_own_time(monkeypatch, tmp_path):
    monkeypatch.setitem(STAGES, "toy", toy)
    recorded, _ = follow(tmp_path, [Stage("toy", "a", ToyRecipe()), Stage("toy", "waits", ToyRecipe(text="b"))])
    shown = dict(zip(recorded.events, recorded.details, strict=True))
    assert shown["a", "done"] == "1 s"
    assert shown["waits", "done"] == "1 s, after waiting 75 s for other stages"


def test_stages_behind_a_failed_one_are_not_run_and_name_it(monkeypatch, tmp_path):
    monkeypatch.setitem(STAGES, "toy", toy)
    chain = [Stage("toy", "0", ToyRecipe())]
    for n in range(1, 5):
        chain.append(Stage("toy", str(n), ToyRecipe(text=str(n)), {"before": chain[-1]}))
    _, outcome = follow(tmp_path, chain, fails="1")
    assert outcome.ran == ["0"]
    assert outcome.failed["1"] == "RuntimeError: it fails"
    assert {outcome.failed[str(n)] for n in (2, 3, 4)} == {"not run, since 1 failed"}
