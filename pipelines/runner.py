"""Run a recipe: reuse what is published and whole, run the rest as Ray tasks chained by their ObjectRefs.

The manifests are the truth: a stage is done if its fingerprint is published and its files match. When nothing is left
to do no Ray is started. One run of a recipe at a time: a lease, kept by a heartbeat counter (infra/artifact.py).
MLflow only watches: stages write events to local files, and a process of its own uploads them (infra/mirror.py).

    run(load("quickstart"), display=Display())
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import getpass
import os
import platform
import queue
import signal
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from longreach.infra import relay
from longreach.infra.artifact import AlreadyPublished, Artifact, CorruptArtifact, Store
from longreach.infra.environment import git_commit, versions
from longreach.infra.files import flatten
from longreach.infra.lease import Lease, LeaseHeld
from longreach.infra.mirror import start_mirror, stop_mirror
from longreach.infra.polling import polling
from longreach.infra.registry import check_login, sqlite_path, tracking_uri
from longreach.infra.resources import Resources
from longreach.infra.share import Share, node_scratch
from longreach.infra.tracking import Spool, read_events
from longreach.pipelines.display import Display
from longreach.pipelines.foresee import foresee
from longreach.pipelines.graph import build, report_on
from longreach.pipelines.kind import StageRun, stop_file
from longreach.pipelines.reader import Loaded
from longreach.pipelines.stage import Stage, differences

__all__ = ["LeaseHeld", "PlanRow", "RunOutcome", "plan", "run"]

State = Literal["done", "stale", "run"]


TRACKING = "MLFLOW_TRACKING_URI"
WHY = 3
"""Changes that a plan spells out for one stage."""


@dataclass(frozen=True)
class PlanRow:
    """What a run would do with a stage."""

    stage: str
    """Its label."""
    state: State
    """done: published and whole; stale: published with other choices or damaged; run: never run."""
    why: str
    """What makes it run, or empty."""
    fingerprint: str
    seconds_last: float | None
    """How long its newest artifact took."""
    foreseen: str = ""
    """What it should cost, for stages that train."""


@dataclass
class RunOutcome:
    """What a run did."""

    report_path: Path | None = None
    ran: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Label -> why, also for stages that could not run because one before them failed."""
    seconds: float = 0.0
    refusals: list[str] = field(default_factory=list)
    """Why the gate refused the challenger; empty if it did not."""
    gate: dict[str, Any] = field(default_factory=dict)
    """What the gate decided: passed, name, version..."""
    headline: str = ""
    """The report's."""
    unsent_points: int = 0
    """Metrics that MLflow does not have yet; `longreach sync` sends them."""


@dataclass(frozen=True)
class Task:
    """What travels to the worker that runs a stage."""

    stage: Stage
    resources: Resources
    root: str
    scratch: str
    spool_folder: str
    run: str
    """The stage's own MLflow run; its attempts are children of it."""
    experiment: str
    command: str
    """What the user said."""
    version: str
    """longreach's, which every node has to have."""


def open_store(loaded: Loaded) -> Store:
    """The recipe's store, if it can be read; a relative local root is this folder's."""
    recipe = loaded.recipe.store
    root = recipe.root if "://" in recipe.root else str(Path(recipe.root).absolute())
    return Store(root, Path(recipe.workdir).absolute() / "scratch").checked()


@contextmanager
def use_tracking(loaded: Loaded) -> Iterator[str]:
    """The recipe's MLflow, else the environment's, else the embedded one: inside, it is everybody's in this process."""
    uri, before = tracking_uri(loaded.recipe.tracking.uri, loaded.recipe.store.workdir), os.environ.get(TRACKING)
    os.environ[TRACKING] = uri
    try:
        yield uri
    finally:
        os.environ.pop(TRACKING)
        if before is not None:
            os.environ[TRACKING] = before


def plan(loaded: Loaded) -> list[PlanRow]:
    """What `run` would do. Files are checked for presence and size; reading their content is `run`'s first act."""
    store = open_store(loaded)
    with use_tracking(loaded):
        stages = build(loaded.recipe)
    costs = foresee(store, stages, loaded.recipe.resources)
    newest = functools.cache(functools.partial(_newest, store))
    rows = (_examine(store, stage, newest, hashes=False)[0] for stage in stages)
    return [replace(row, foreseen=costs.get(row.stage, "")) for row in rows]


def _newest(store: Store, name: str) -> dict[str, dict[str, Any]]:
    """The newest manifest of each label among a stage's."""
    found: dict[str, dict[str, Any]] = {}
    for manifest in store.manifests(name):
        if (label := manifest["label"]) not in found or manifest["published_at"] > found[label]["published_at"]:
            found[label] = manifest
    return found


def _examine(
    store: Store, stage: Stage, newest: Callable[[str], dict[str, dict[str, Any]]], *, hashes: bool
) -> tuple[PlanRow, Artifact | None]:
    """A stage's row, and its artifact if it is done. `newest` says what a stage of this name made last, by label."""

    def row(state: State, why: str, seconds: float | None) -> PlanRow:
        return PlanRow(stage.label, state, why, stage.fingerprint, seconds)

    try:
        if artifact := store.find(stage.name, stage.fingerprint):
            seconds = artifact.manifest["seconds"]
            if problems := store.problems(artifact, hashes=hashes):
                return row("stale", "damaged: " + "; ".join(problems), seconds), None
            return row("done", "", seconds), artifact
    except CorruptArtifact as error:
        return row("stale", str(error), None), None
    if (last := newest(stage.name).get(stage.label)) is None:
        return row("run", "never run", None), None
    changes = [_readable(stage, line) for line in differences(last["identity"], stage.identity)]
    more = f"; and {len(changes) - WHY} more changes" if len(changes) > WHY + 1 else ""
    return row("stale", "; ".join(changes[: WHY if more else None]) + more, last["seconds"]), None


def _readable(stage: Stage, change: str) -> str:
    """`inputs.corpus: 12ab -> 34cd` says less than which stage it is."""
    name = change.split(":")[0].removeprefix("inputs.")
    return f"its input {stage.inputs[name].label} changes" if name in stage.inputs else change


def run(
    loaded: Loaded,
    *,
    display: Display,
    force: tuple[str, ...] = (),
    wait: bool = False,
    address: str | None = None,
) -> RunOutcome:
    """Bring every stage of a recipe to be published.

    Args:
        force: stage names or labels that run again even if they are done.
        wait: wait for another run of this recipe instead of raising LeaseHeld.
        address: a Ray cluster; without it one is started here for the time of the run.

    Raises:
        LeaseHeld: another run of this recipe is alive.
        ValueError: bad choices or input, found before Ray starts.
    """
    with use_tracking(loaded) as uri:
        return _run(loaded, uri, display=display, force=force, wait=wait, address=address)


def _run(
    loaded: Loaded, uri: str, *, display: Display, force: tuple[str, ...], wait: bool, address: str | None
) -> RunOutcome:
    started = time.monotonic()
    if address and sqlite_path(uri) and (loaded.recipe.promote or loaded.recipe.base.source.startswith("models:/")):
        raise ValueError(
            f"on the cluster at {address} every node would have a registry of its own in {uri}: set tracking.uri to an "
            f"MLflow server that all of them reach"
        )
    if (loaded.recipe.tracking.enabled or loaded.recipe.promote) and (away := check_login(uri)):
        display.note(f"MLflow: {away}; metrics are kept here and sent when it does, or later by longreach sync")
    store, stages = open_store(loaded), build(loaded.recipe)
    _check_forced(force, stages)
    outcome = RunOutcome()
    found = _survey(store, stages, {}, repair=False)
    if not force and len(found) == len(stages):
        display.note("nothing new: every stage is published, with these choices and from these documents")
    if force or len(found) < len(stages):
        with _lease(store, loaded.recipe.name, wait, display) as lease, _terminable() as stopping:
            for stage in stages:
                if {stage.name, stage.label} & set(force) and store.find(stage.name, stage.fingerprint):
                    store.withdraw(stage.name, stage.fingerprint)
                    found.pop(stage.label, None)
            found = _survey(store, stages, found, repair=True)
            _run_missing(_Run(loaded, store, stages, found, display, lease, address), outcome, stopping)
    touched = {*outcome.ran, *outcome.failed}
    outcome.reused = [stage.label for stage in stages if stage.label not in touched]
    if report := found.get("report"):
        report = report if store.local else store.fetch("report", report.fingerprint)
        outcome.report_path, outcome.headline = report.path / "report.html", report.summary.get("headline", "")
    if gate := found.get("promote"):
        outcome.gate, outcome.refusals = gate.summary, gate.summary["refusals"]
        if gate.summary["passed"] and "promote" not in outcome.ran:
            display.note(
                f"version {gate.summary['version']} of {gate.summary['name']} passed the gate in an earlier run and is "
                f"not champion: it was rolled back, or the registry is another one; --force promote asks again"
            )
    outcome.seconds = time.monotonic() - started
    return outcome


def _check_forced(force: tuple[str, ...], stages: list[Stage]) -> None:
    names = {stage.name for stage in stages} | {stage.label for stage in stages}
    if unknown := sorted(set(force) - names):
        raise ValueError(f"--force {', '.join(unknown)}: no such stage; there are {', '.join(sorted(names))}")


def _survey(store: Store, stages: list[Stage], known: dict[str, Artifact], *, repair: bool) -> dict[str, Artifact]:
    """Artifacts of the stages that are done; damaged ones are put aside if `repair`. On a local root every byte is
    read; of a remote one, whose files would all have to come here, names and sizes: workers verify what they use."""
    found = dict(known)
    for stage in stages:
        if stage.label in found:
            continue
        row, artifact = _examine(store, stage, lambda name: {}, hashes=store.local)
        if artifact:
            found[stage.label] = artifact
        elif repair and store.fs.exists(f"{store.base}/{stage.name}/{stage.fingerprint}/artifact.json"):
            aside = store.quarantine(stage.name, stage.fingerprint)
            print(f"{stage.label}: {row.why}: it is put aside as {aside}", file=sys.stderr)
    return found


@contextmanager
def _lease(store: Store, name: str, wait: bool, display: Display) -> Iterator[Lease]:
    lease = Lease(store, name, f"{getpass.getuser()}@{platform.node()}, process {os.getpid()}")
    if other := lease.current_holder():
        display.note(f"{name} is being run by {other}, or was when it died: looking for a sign of life")
    lease.acquire(wait=wait)
    try:
        yield lease
    finally:
        lease.release()


@dataclass
class _Stopping:
    """SIGTERM or Ctrl-C: the run's training writes its checkpoints, for which there is so much time."""

    file: Path | None = None
    """Tells training to stop; None while there is nothing to be stopped."""
    signum: int = 0
    until_s: float | None = None

    def listen(self) -> None:
        """From now on the signals come here; Ctrl-C only if it was not ignored, as in the background of a script."""
        for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.asked)

    def asked(self, signum: int, frame: object) -> None:
        self.signum = signum
        if self.file is None or self.until_s is not None:  # nothing to wait for, or told twice
            self.end()
        self.file.touch()
        self.until_s = time.monotonic() + GRACE_S

    def end(self) -> NoReturn:
        raise KeyboardInterrupt if self.signum == signal.SIGINT else SystemExit(128 + self.signum)


SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_S = 25.0
"""Kubernetes kills 30 seconds after it asked."""


@contextmanager
def _terminable() -> Iterator[_Stopping]:
    """SIGTERM and Ctrl-C end the run after its checkpoints: leases are released and Ray's processes ended. Exit status
    143 or 130; a second one does not wait."""
    stopping, before = _Stopping(), {number: signal.getsignal(number) for number in SIGNALS}
    stopping.listen()
    try:
        yield stopping
    except SystemExit as ended:
        if ended.code == signal.SIGTERM:  # Ray's own handler, while it starts
            raise SystemExit(128 + signal.SIGTERM) from None
        raise
    finally:
        for number, handler in before.items() if threading.current_thread() is threading.main_thread() else ():
            signal.signal(number, handler or signal.SIG_DFL)


@dataclass
class _Run:
    """One run's state in the driver."""

    loaded: Loaded
    store: Store
    stages: list[Stage]
    found: dict[str, Artifact]
    display: Display
    lease: Lease
    address: str | None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @functools.cached_property
    def labels(self) -> frozenset[str]:
        """Of the stages."""
        return frozenset(stage.label for stage in self.stages)

    @property
    def spool_folder(self) -> Path:
        return Path(self.loaded.recipe.store.workdir).absolute() / "spool" / self.id

    def spool(self, label: str, run: str, parent: str | None, kind: str, tags: dict[str, str]) -> Spool:
        """The event file of the pipeline or of a stage."""
        recipe = self.loaded.recipe
        return Spool.open(
            self.spool_folder / ("=pipeline.jsonl" if kind == "pipeline" else f"{safe(label)}.jsonl"),
            run=run,
            parent=parent,
            experiment=recipe.experiment,
            name=label,
            kind=kind,
            tags={"recipe": recipe.name, **tags},
        )


def safe(label: str) -> str:
    """A label as a file name: `finetune[lora]` -> `finetune-lora`."""
    return label.replace("[", "-").replace(",", "-").rstrip("]")


def _run_missing(run: _Run, outcome: RunOutcome, stopping: _Stopping) -> None:
    recipe = run.loaded.recipe
    pipeline = run.spool(recipe.name, run.id, None, "pipeline", {"commit": git_commit()})
    mirror = None
    if recipe.tracking.enabled:
        mirror = start_mirror(run.spool_folder, os.environ[TRACKING])
    status = "KILLED"
    try:
        with _tail(run):
            _run_on_ray(run, outcome, stopping)
        if report := run.found.get("report"):
            pipeline.metrics(report.summary.get("metrics", {}))
            pipeline.tag("mlflow.note.content", _description(run, outcome, report.summary))
            for path in sorted(run.store.fetch("report", report.fingerprint).path.iterdir()):
                pipeline.artifact(path, "report")
        status = "FAILED" if outcome.failed else "FINISHED"
    finally:
        pipeline.end(status)
        if mirror:
            outcome.unsent_points = stop_mirror(mirror, timeout_s=5 if status == "KILLED" else 30)


def _description(run: _Run, outcome: RunOutcome, summary: dict[str, Any]) -> str:
    """What MLflow shows on the pipeline's page, in Markdown."""
    parts = [summary.get("headline", ""), summary.get("table", "")]
    if (gate := run.found.get("promote")) and "promote" in outcome.ran:
        refusals, name = "; ".join(gate.summary["refusals"]), gate.summary["name"]
        new = f"version {gate.summary.get('version')} is champion of {name}"
        parts.append(f"**Gate:** {f'refused for {name}: {refusals}' if refusals else new}.")
    parts += [f"**Failed:** {label}: {why}" for label, why in outcome.failed.items()]
    parts.append(f"Report: `report/report.html` under Artifacts. Made by `{run.loaded.command}`.")
    return "\n\n".join(part for part in parts if part)


def _run_on_ray(run: _Run, outcome: RunOutcome, stopping: _Stopping) -> None:
    """Connect, and follow what is missing to the end."""
    from longreach.infra.cluster import connected

    with connected(run.address) as ray:
        stopping.listen()  # Ray has set a handler of its own
        # Ray Train's helpers look for the cluster by themselves, and find two where another one runs on this machine.
        environment = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        collector: Any = None  # held here, it lives as long as the run
        if run.address:  # its other nodes do not see this disk
            collector, environment[relay.DRIVER] = relay.start_collector(ray, run.spool_folder)
        here = {"env_vars": environment | {TRACKING: os.environ[TRACKING]}}
        # max_retries: how often it is run again if its worker dies
        execute = ray.remote(max_retries=2, runtime_env=here)(_execute)
        stopping.file = stop_file(run.spool_folder)
        try:
            _follow(ray, run, outcome, execute, stopping)
        finally:
            stopping.file = None
        del collector
        if "report" in outcome.failed and len(outcome.failed) > 1:
            _report_on_the_rest(run, outcome)


IN_FLIGHT = 1000
"""Stages that Ray knows of at once: each takes 30 KiB of this process until it has ended."""


class _Order:
    """Stages of which Ray may be told: it knows their inputs, and those that they come `after` have ended, so that no
    worker sits and waits. What a stage costs the driver does not grow with their number."""

    def __init__(self, stages: list[Stage]) -> None:
        self.ready: deque[Stage] = deque()
        self._open: dict[str, int] = {}
        self._on_told: dict[str, list[Stage]] = {stage.label: [] for stage in stages}
        self._on_ended: dict[str, list[Stage]] = {stage.label: [] for stage in stages}
        for stage in stages:
            waits = [self._on_told[label] for label in {s.label for s in stage.inputs.values()} & self._on_told.keys()]
            waits += [self._on_ended[label] for label in {s.label for s in stage.after} & self._on_ended.keys()]
            for one in waits:
                one.append(stage)
            self._open[stage.label] = len(waits)
            if not waits:
                self.ready.append(stage)

    def told(self, stage: Stage) -> None:
        self._release(self._on_told[stage.label])

    def ended(self, stage: Stage) -> None:
        self._release(self._on_ended[stage.label])

    def _release(self, stages: list[Stage]) -> None:
        for stage in stages:
            self._open[stage.label] -= 1
            if not self._open[stage.label]:
                self.ready.append(stage)


def _follow(ray: Any, run: _Run, outcome: RunOutcome, execute: Any, stopping: _Stopping) -> None:
    """Tell Ray of each stage as soon as its order allows, and take in what comes back."""
    resources, order = run.loaded.recipe.resources, _Order(run.stages)
    refs: dict[str, Any] = {}
    spools: dict[str, Path] = {}  # paths: thousands of open files would be too many
    running: dict[str, Stage] = {}
    results: queue.SimpleQueue[tuple[Stage, Any]] = queue.SimpleQueue()
    said = False

    def tell(stage: Stage) -> None:
        stage_run = uuid.uuid4().hex
        tags = {"fingerprint": stage.fingerprint, "stage": stage.name, "cache_hit": str(stage.label in run.found)}
        about = stage.label.partition("[")[2].rstrip("]").split(",")
        tags |= {key: value for key, value in zip(("arm", "eval"), about, strict=False) if value}
        spool = run.spool(stage.label, stage_run, run.id, "stage", tags)
        if stage.label in run.found:
            run.display.stage(stage.label, "reused", "")
            spool.end("FINISHED")
            order.ended(stage)
        else:
            run.display.stage(stage.label, "waiting")
            inputs = [refs[s.label] for s in stage.inputs.values() if s.label in refs]
            cpus, gpus = stage.kind.cpus(resources), stage.kind.gpus(resources)
            placed = execute.options(num_cpus=cpus, num_gpus=gpus, name=stage.label)
            ref = placed.remote(_task(run, stage, stage_run), *inputs)
            ref.future().add_done_callback(lambda future: results.put((stage, future)))
            refs[stage.label], spools[stage.label], running[stage.label] = ref, spool.path, stage
        order.told(stage)

    while True:
        while order.ready and len(running) < IN_FLIGHT and stopping.until_s is None:
            tell(order.ready.popleft())
        if not running and stopping.until_s is None:
            return
        with contextlib.suppress(queue.Empty):
            stage, future = results.get(timeout=1.0)
            del running[stage.label]
            order.ended(stage)
            _take(ray, run, outcome, stage, future, spools.pop(stage.label))
            if stage.label not in outcome.failed:  # those that need a failed one fail by its ref
                del refs[stage.label]
        if run.lease.lost.is_set():
            raise RuntimeError(f"the lease of {run.loaded.recipe.name!r} was taken over: this run was silent too long")
        if stopping.until_s is not None:
            training = [stage.label for stage in running.values() if _trains(run, stage)]
            if not training or time.monotonic() > stopping.until_s:
                stopping.end()
            if not said:
                run.display.note(f"stopping: {', '.join(training)} may save within {GRACE_S:.0f} s; once more: at once")
                said = True


READ_HERE = ("report", "promote")
"""Stages whose artifacts the driver reads; the others' are read and verified by the workers that need them."""


def _take(ray: Any, run: _Run, outcome: RunOutcome, stage: Stage, future: Any, spool: Path) -> None:
    """What became of a stage."""
    label = stage.label
    try:
        done: Done = future.result()
    except ray.exceptions.RayError as error:
        origin = getattr(error, "function_name", label)  # Ray hands the error of the first that failed to all behind it
        blamed = [s.label for s in stage.inputs.values() if s.label in outcome.failed or s.label == origin]
        if blamed or (origin != label and origin in run.labels):
            outcome.failed[label] = f"not run, since {blamed[0] if blamed else origin} failed"
        else:
            outcome.failed[label] = _reason(error)
        run.display.stage(label, "failed", outcome.failed[label])
        Spool(spool).end("FAILED")
        return
    if done.held or label in READ_HERE:
        run.found[label] = run.store.fetch(stage.name, stage.fingerprint)
    if done.held:
        relay.release(done.held, Spool(run.spool_folder / done.spool), done.out, run.found[label].path)
    outcome.ran.append(label)
    run.display.stage(label, "done", f"{done.seconds:.0f} s")
    Spool(spool).end("FINISHED")


def _task(run: _Run, stage: Stage, stage_run: str) -> Task:
    recipe, store = run.loaded.recipe, run.store
    return Task(
        stage, recipe.resources, store.root, str(store.scratch), str(run.spool_folder), stage_run, recipe.experiment,
        run.loaded.command, str(_versions()["longreach"]),
    )  # fmt: skip


def _report_on_the_rest(run: _Run, outcome: RunOutcome) -> None:
    """A report of what was done, in which what failed is named: an arm that ran out of memory is a result too."""
    (whole,) = (stage for stage in run.stages if stage.name == "report")
    done = [stage for stage in whole.inputs.values() if stage.label not in outcome.failed]
    failed = {label: why for label, why in outcome.failed.items() if label != "report"}
    stage = report_on(run.loaded.recipe, done, failed)
    try:
        _execute(_task(run, stage, run.id))
    except (ValueError, OSError, CorruptArtifact) as error:
        outcome.failed["report"] = f"of what was done: {error}"
        return
    run.found[stage.label] = run.store.fetch(stage.name, stage.fingerprint)
    run.display.note(f"the report is on what was done; {len(failed)} stages failed and are named in it")
    del outcome.failed["report"]


def _trains(run: _Run, stage: Stage) -> bool:
    """Whether the stage is training that has begun."""
    return stage.name in ("finetune", "pretrain") and any(run.spool_folder.glob(f"{safe(stage.label)}@*.jsonl"))


def _reason(error: Exception) -> str:
    """The stage's own exception in a line, without Ray's frames."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {cause}" if not isinstance(cause, ValueError) else str(cause)


@contextmanager
def _tail(run: _Run) -> Iterator[None]:
    """Show the events that stages write, until the run ends."""
    offsets: dict[str, int] = {}
    labels = {safe(stage.label): stage.label for stage in run.stages}
    ended: set[str] = set()  # attempts that have nothing more to say: of thousands, a few are alive

    def look() -> None:
        for name in os.listdir(run.spool_folder):
            if "@" not in name or not name.endswith(".jsonl") or name in ended:
                continue
            events, offsets[name] = read_events(run.spool_folder / name, offsets.get(name, 0))
            for event in events:
                run.display.event(labels[name.partition("@")[0]], event)
                if event["event"] == "end":
                    ended.add(name)

    try:
        with polling(look, every_s=0.5, name="tail"):
            yield
    finally:
        look()


@dataclass(frozen=True)
class Done:
    """What the driver is told of a stage that is published."""

    seconds: float
    spool: str = ""
    """The attempt's event file."""
    out: str = ""
    """Where its files were written."""
    held: list[dict[str, Any]] = field(default_factory=list)
    """Events that name such files, from another node than the driver's."""


def _execute(task: Task, *inputs: Done) -> Done:
    """A stage on a Ray worker: read verified inputs, write into an attempt of its own, publish.

    Ray calls it again after the worker died: the new attempt may start from the old one's checkpoints.
    """
    if (here := str(_versions()["longreach"])) != task.version:
        raise ValueError(f"this node has longreach {here}, the driver {task.version}: install the same on all nodes")
    stage, store = task.stage, Store(task.root, node_scratch(task.scratch))
    if done := store.find(stage.name, stage.fingerprint):  # published by another run in the meantime, or before a retry
        return Done(done.manifest["seconds"])
    artifacts = {name: store.fetch(source.name, source.fingerprint) for name, source in stage.inputs.items()}
    attempt = store.new_attempt(stage.name, stage.fingerprint)
    earlier = [f for f in store.earlier_attempts(stage.name, stage.fingerprint) if f.name != attempt.id]
    own_run = uuid.uuid4().hex
    spool = relay.spool(
        Path(task.spool_folder) / f"{safe(stage.label)}@{attempt.id}.jsonl",
        run=own_run,
        parent=task.run,
        experiment=task.experiment,
        name=f"{stage.label} attempt {int(attempt.id.split('-')[0])}",
        kind="attempt",
        tags={"fingerprint": stage.fingerprint, "attempt": attempt.id},
        params={name: str(value) for name, value in flatten(stage.identity["recipe"]).items()},
    )
    started, status = time.monotonic(), "FAILED"
    try:
        read = tuple((artifact.stage, artifact.fingerprint) for artifact in artifacts.values())
        share = Share(store.root, str(store.scratch), stage.name, stage.fingerprint, attempt.id, read)
        work = StageRun(
            stage.label, spool, attempt, earlier, task.command, task.experiment, own_run, None if store.local else share
        )
        arguments = stage.kind.arguments(artifacts)
        summary = stage.kind(**arguments, recipe=stage.recipe, resources=task.resources, out=attempt.out, run=work)
        if (seen := summary.get("source_digest")) and seen != stage.digests.get("documents", seen):
            raise ValueError(
                "the corpus' documents changed while the run went on: run again, to take them as they are now"
            )
        seconds = round(time.monotonic() - started, 3)
        record = {
            "schema": 1,
            "label": stage.label,
            "identity": stage.identity,
            "inputs": {name: {"stage": a.stage, "fingerprint": a.fingerprint} for name, a in artifacts.items()},
            "summary": summary,
            "seconds": seconds,
            "resources": task.resources.model_dump(mode="json"),
            "versions": _versions(),
            "commit": git_commit(),
            "command": task.command,
            "host": platform.node(),
            "published_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
        }
        try:
            store.publish(attempt, record)
        except AlreadyPublished as refused:  # the other attempt's result stands, and serves as well
            spool.tag("publication", f"refused: attempt {refused.artifact.attempt} was first")
        spool.metrics({"cost/stage_s": seconds})
        status = "FINISHED"
        return Done(seconds, spool.path.name, str(attempt.out), getattr(spool, "held", []))
    finally:
        spool.end(status)
        spool.flush()


_versions = functools.cache(versions)
