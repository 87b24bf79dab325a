"""Run a recipe: reuse stages whose artifacts are published and intact, run the others as Ray tasks.

A stage runs as soon as its inputs are published; only while the run's first trainings start,
other stages wait, a minute at most. If every stage is published, Ray is not started.
A lease with a heartbeat counter (infra/lease.py) allows one run of a recipe at a time. MLflow is
not needed for a run: stages write events to local files, and a separate process uploads them
(infra/mirror.py). plan.py finds the finished stages, worker.py runs a stage, signals.py handles
signals, and infra/resources.py has the numbers of retries.

    run(load("quickstart"), display=Display())
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import re
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from longreach.infra import relay
from longreach.infra.artifact import Artifact, Store
from longreach.infra.choices import dotted
from longreach.infra.errors import NO_SPACE, CorruptArtifact, LeaseLost
from longreach.infra.lease import Lease, holder_name
from longreach.infra.mirror import start_mirror, stop_mirror
from longreach.infra.mlflow_store import check_tracking
from longreach.infra.polling import polling
from longreach.infra.registry import MODEL
from longreach.infra.resources import STAGE_RETRIES
from longreach.infra.tracking import Spool, last_step, read_events
from longreach.infra.versions import git_commit
from longreach.pipelines.artifacts import Decision, HeldOutDocuments, Release, Report
from longreach.pipelines.display import Display
from longreach.pipelines.foresee import check_fits, foresee, memory_gib, no_room
from longreach.pipelines.graph import build, report_on
from longreach.pipelines.kind import stop_file
from longreach.pipelines.plan import TRACKING, check_rules, open_store, published, survey, use_tracking
from longreach.pipelines.reader import DEFAULT, Loaded
from longreach.pipelines.recipe import values
from longreach.pipelines.signals import GRACE_S, Stopping, terminable
from longreach.pipelines.stage import Stage
from longreach.pipelines.worker import Done, Task, execute, file_name, known_versions

IN_FLIGHT = 1000
"""Maximum number of stages submitted to Ray at a time; each takes 30 KiB of this process."""
WORKERS_IMPORT = (
    "longreach.pipelines.worker",
    "longreach.training.loop",
    "deepspeed",
    "datasets",
    "altair",
    "ray.train.torch",
)
"""The slowest modules that workers use, imported once for all of them. Each worker imports the
rest itself."""
LOOK_AGAIN_S = 5.0
"""Seconds between two tries of a stage that another run is making."""
JOIN_S = 60.0
"""Seconds to wait for nodes to join an existing cluster before a stage that fits nowhere is
refused."""
NOT_IN_PARAMETERS = re.compile(r"[^\w./ -]")
"""Characters that MLflow does not allow in parameter names, such as the plus in an arm's name."""
TRAINING_STARTS_S = 60.0
"""Seconds for which other stages wait at most while a run's first trainings start, from the
submission of the last of them. Their ranks ask for cores some seconds later. Evaluations submitted
with them would have taken the cores by then, and an error in a training would show only after all
of them."""
TRAININGS = ("finetune", "pretrain")
"""Stages that train. The first ones of a run start before its other stages."""
READ_BY_THE_DRIVER = ("report", "promote")
"""Stages whose artifacts the driver reads. Other artifacts are read by the workers that need
them."""


@dataclass
class RunOutcome:
    """What a run did."""

    report_path: Path | None = None  # the report's page; None if there is no report
    report: dict[str, Any] | None = None  # the report's manifest
    ran: list[str] = field(default_factory=list)  # labels of the stages that were run and published
    reused: list[str] = field(default_factory=list)  # labels of the stages that were published before
    failed: dict[str, str] = field(default_factory=dict)
    """Label -> reason, also for stages that could not run because one of their inputs failed."""
    seconds: float = 0.0
    refusals: list[str] = field(default_factory=list)
    """Why the gate refused the challenger; empty if it did not."""
    gate: dict[str, Any] = field(default_factory=dict)  # the gate's decision: passed, name, version
    headline: str = ""  # the report's first sentences
    unsent_points: int = 0  # metric points not yet in MLflow; `longreach sync` sends them


@dataclass
class _Run:
    """State of one run in the driver."""

    loaded: Loaded
    store: Store
    stages: list[Stage]
    artifacts: dict[str, Artifact]  # label -> artifact that was published before, or that the driver read since
    display: Display
    lease: Lease
    stopping: Stopping
    outcome: RunOutcome
    address: str | None
    again: Sequence[Stage] = ()  # stages that --force withdraws, once the cluster is known to fit all missing stages
    wait: bool = False  # wait for another run that is making one of `again` instead of raising LeaseHeld
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def spool_folder(self) -> Path:
        return Path(self.loaded.recipe.store.workdir).absolute() / "spool" / self.id

    def stage_start(self, stage: Stage, run: str) -> dict[str, Any]:
        """Return the first record of a stage's event file; `run` is the id of the stage's MLflow
        run."""
        reused = stage.label in self.artifacts
        tags = {"fingerprint": stage.fingerprint, "stage": stage.name, "cache_hit": str(reused)}
        in_brackets = stage.label.partition("[")[2].rstrip("]").split(",")
        for key, value in zip(("arm", "eval"), in_brackets, strict=False):
            if value:
                tags[key] = value
        return {
            "run": run,
            "parent": self.id,
            "experiment": self.loaded.recipe.experiment,
            "name": stage.label,
            "kind": "stage",
            "tags": {"recipe": self.loaded.recipe.name, **tags},
        }

    def stage_spool(self, stage: Stage, run: str) -> Spool:
        """Open the event file of a stage, or create it if the stage's worker has not."""
        return Spool.open(self.spool_folder / f"{file_name(stage.label)}.jsonl", **self.stage_start(stage, run))

    def task(self, stage: Stage, run: str) -> Task:
        return Task(
            stage=stage,
            resources=self.loaded.recipe.resources,
            root=self.store.root,
            scratch=str(self.store.scratch),
            spool_folder=str(self.spool_folder),
            run=run,
            stage_start=self.stage_start(stage, run),
            experiment=self.loaded.recipe.experiment,
            command=self.loaded.command,
            version=str(known_versions()["longreach"]),
            memory_gib=memory_gib(self.store, stage, self.loaded.recipe.resources),
        )


def run(
    loaded: Loaded,
    *,
    display: Display,
    force: tuple[str, ...] = (),
    wait: bool = False,
    address: str | None = None,
    gated: bool = True,
) -> RunOutcome:
    """Run a recipe until every stage is published or has failed.

    Args:
        force: Names or labels of stages to rerun even if they are done, with all stages that depend
            on them.
        wait: Wait for another run of this recipe instead of raising LeaseHeld.
        address: Address of a Ray cluster. Without it, Ray is started here for the time of the run.
        gated: If False, leave out the gate's stages and do not ask the registry for the champion.

    Raises:
        ValueError: Bad choices or input, or a stage that fits nowhere; before the first stage
            starts.
        LeaseHeld: Another run of this recipe is active, and `wait` is False.
    """
    began = time.monotonic()
    with use_tracking(loaded) as uri:
        cluster = f"the cluster at {address}" if address else ""
        check_rules(loaded.recipe, cluster=cluster)
        _check_tracking(loaded, uri, display)
        store = open_store(loaded)

        def as_it_will_be(stage: Stage) -> Artifact | None:
            return None if _is_forced(force, stage) else published(store, stage)

        stages = build(loaded.recipe, gated=gated, published=as_it_will_be)
        again = _forced(force, stages)
        outcome = RunOutcome()
        kept = [stage for stage in stages if stage not in again]
        artifacts = survey(store, kept, {}, repair=False)
        missing = [stage for stage in stages if stage.label not in artifacts]
        if not missing:
            display.note("nothing new to run: every stage is already published for this recipe and its documents")
        else:
            if address is None:
                check_fits(foresee(store, missing, loaded.recipe.resources).values())
            if again:
                kinds = [f"{name} {count}" for name, count in Counter(stage.name for stage in again).items()]
                what = f"rerunning {len(again)} of {len(stages)} stages, including those that depend on forced ones"
                display.note(f"--force {', '.join(force)}: {what}: {', '.join(kinds)}")
            with _lease(store, loaded.recipe.name, wait, display) as held, terminable() as stopping:
                artifacts = survey(store, kept, artifacts, repair=True)  # others may have removed some meanwhile
                this = _Run(loaded, store, stages, artifacts, display, held, stopping, outcome, address, again, wait)
                _run_missing(this)
        touched = {*outcome.ran, *outcome.failed}
        outcome.reused = [stage.label for stage in stages if stage.label not in touched]
        _read_results(store, artifacts, outcome)
    outcome.seconds = time.monotonic() - began
    return outcome


def _check_tracking(loaded: Loaded, uri: str, display: Display) -> None:
    """Raise ValueError if MLflow refuses the login or its embedded store is damaged; show a note if MLflow does
    not answer."""
    recipe = loaded.recipe
    if (recipe.tracking.enabled or recipe.promote) and (away := check_tracking(uri)):
        display.note(f"MLflow: {away}; metrics are kept here and sent when it answers, or later by longreach sync")


def _forced(force: tuple[str, ...], stages: list[Stage]) -> list[Stage]:
    """Return the stages that `force` names and all that depend on them.

    Forcing is needed where a fingerprint does not show that an artifact is outdated.

    Raises:
        ValueError: No stage has such a name.
    """
    if not force:
        return []
    names = {name for stage in stages for name in (stage.name, stage.label)}
    if unknown := sorted(set(force) - names):
        raise ValueError(f"--force {', '.join(unknown)}: no such stage; this recipe has {', '.join(sorted(names))}")
    again = {stage.fingerprint for stage in stages if _is_forced(force, stage)}
    return [stage for stage in stages if stage.fingerprint in again]


def _is_forced(force: tuple[str, ...], stage: Stage) -> bool:
    """True if `force` names the stage or any stage that it depends on."""
    named = stage.name in force or stage.label in force
    return named or any(_is_forced(force, source) for source in stage.inputs.values())


def _withdraw(store: Store, stages: Sequence[Stage], wait: bool, display: Display) -> None:
    """Unpublish stages, damaged ones too, and clear the attempts that they would resume from.

    Raises:
        LeaseHeld: Another run is making one of them, and `wait` is False.
    """
    for stage in stages:
        place = f"{stage.name}/{stage.fingerprint}/lease"
        with _lease(store, stage.label, wait, display, place=place):
            with contextlib.suppress(FileNotFoundError):  # it was not published
                store.withdraw(stage.name, stage.fingerprint)
            store.clear(stage.name, stage.fingerprint)


@contextmanager
def _lease(store: Store, name: str, wait: bool, display: Display, *, place: str = "") -> Iterator[Lease]:
    lease = Lease(store, name, holder_name(), place=place)
    if other := lease.current_holder():
        display.note(f"{name} is leased to {other}: checking whether that run is still alive")
    lease.acquire(wait=wait)
    try:
        yield lease
    finally:
        lease.release()


def _read_results(store: Store, artifacts: dict[str, Artifact], outcome: RunOutcome) -> None:
    if report := _report(artifacts):
        page = report.path if store.local else store.fetch("report", report.fingerprint).path
        outcome.report_path, outcome.report = page / "report.html", report.manifest
        outcome.headline = report.headline
    if decision := _decision(artifacts):
        gate = decision.summary
        outcome.gate, outcome.refusals = gate, decision.refusals
        if not decision.refusals and "promote" not in outcome.ran:
            passed = f"version {gate['version']} of {gate['name']} passed the gate in an earlier run but is"
            reason = "another model became champion since, it was rolled back, or this is another registry"
            # also under --quiet: a schedule's user would not notice otherwise that the recipe's model is not in use
            print(f"{passed} not champion: {reason}; to ask the gate again: --force promote", file=sys.stderr)


def _report(artifacts: dict[str, Artifact]) -> Report | None:
    artifact = artifacts.get("report")
    return Report(artifact.path, artifact.manifest) if artifact else None


def _decision(artifacts: dict[str, Artifact]) -> Decision | None:
    artifact = artifacts.get("promote")
    return Decision(artifact.path, artifact.manifest) if artifact else None


def _run_missing(run: _Run) -> None:
    """Run the missing stages while MLflow's mirror uploads their events; send the report to
    MLflow."""
    recipe = run.loaded.recipe
    pipeline = _open_pipeline(run)
    mirror = None
    if recipe.tracking.enabled:
        mirror = start_mirror(run.spool_folder, os.environ[TRACKING])
    status = "KILLED"
    try:
        with _shown_events(run):
            _run_on_ray(run)
        if report := _report(run.artifacts):
            page = run.store.fetch("report", report.fingerprint).path
            for name, gain_by_length in report.curves.items():
                for length, gain in gain_by_length.items():
                    pipeline.metrics({name: gain}, step=length)
            pipeline.table(page / Report.MEASURES)
            pipeline.tag("mlflow.note.content", _description(run, report))
            if decision := _decision(run.artifacts):
                pipeline.tag("gate", decision.verdict)
            for path in sorted(page.iterdir()):
                pipeline.artifact(path, "report")
        for stage in run.stages:
            if stage.kind.makes is Release and (released := run.store.find(stage.name, stage.fingerprint)):
                pipeline.output(released.summary["tags"][MODEL])
        status = "FAILED" if run.outcome.failed else "FINISHED"
    except Exception as error:  # not stopped by a signal: a stage fits nowhere, Ray did not start, the lease was lost
        status = "FAILED"
        pipeline.tag("mlflow.note.content", f"**Failed:** {error}")
        raise
    finally:
        pipeline.end(status)
        if mirror:
            at_most_s = 5 if status == "KILLED" else math.inf
            run.outcome.unsent_points = stop_mirror(mirror, at_most_s=at_most_s)


def _open_pipeline(run: _Run) -> Spool:
    """Open the event file of the whole run, with the recipe's choices and its documents."""
    recipe, origins = run.loaded.recipe, run.loaded.origins
    params = {}
    for location, value in values(recipe):
        field = dotted(location)
        if origins.get(field, DEFAULT) != DEFAULT:  # .get: a run without its gate has a field that no file sets
            text = value if isinstance(value, str) else json.dumps(value)
            params[NOT_IN_PARAMETERS.sub(" ", field)] = text
    pipeline = Spool.open(
        run.spool_folder / "=pipeline.jsonl",
        run=run.id,
        parent=None,
        experiment=recipe.experiment,
        name=recipe.name,
        kind="pipeline",
        tags={"recipe": recipe.name, "commit": git_commit()},
        params=params,
    )
    for stage in run.stages:
        if stage.kind.gives(HeldOutDocuments) and "documents" in stage.digests:
            place = f"{run.store.root}/{stage.name}/{stage.fingerprint}"
            pipeline.dataset(stage.label, stage.digests["documents"], place)
    return pipeline


def _description(run: _Run, report: Report) -> str:
    parts = [report.headline, report.table]
    decision = _decision(run.artifacts)
    if decision and "promote" in run.outcome.ran:
        parts.append(f"**Gate:** {decision.in_words}.")
    for label, reason in run.outcome.failed.items():
        parts.append(f"**Failed:** {label}: {reason}")
    parts.append(f"Report: `report/report.html` under Artifacts. Made by `{run.loaded.command}`.")
    return "\n\n".join(filter(None, parts))


def _run_on_ray(run: _Run) -> None:
    """Connect to Ray, run the missing stages, and report on the finished ones even if some
    failed."""
    from longreach.infra.cluster import connected

    workers_import: tuple[str, ...] = WORKERS_IMPORT
    if run.loaded.recipe.resources.gpus_per_worker > 0:  # untested: CUDA does not survive a fork unless used with care
        workers_import = ()
    with connected(run.address, workers_import=workers_import) as ray:
        run.stopping.listen()  # again, because Ray has set its own handler
        _check_room(ray, run)
        _withdraw(run.store, run.again, run.wait, run.display)
        environment = {TRACKING: os.environ[TRACKING]}
        # Without it Ray Train's helpers search for a cluster, and find two if another one runs on
        # this machine.
        environment["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        collector: Any = None  # Ray ends the actor when this reference is deleted
        if run.address:  # other nodes cannot write to this disk
            collector, environment[relay.DRIVER] = relay.start_collector(ray, run.spool_folder)
        remote = ray.remote(max_retries=STAGE_RETRIES, runtime_env={"env_vars": environment})(execute)
        run.stopping.file = stop_file(run.spool_folder)
        try:
            _Driver(ray, run, remote).follow()
        finally:
            run.stopping.file = None
        del collector
        if "report" in run.outcome.failed and len(run.outcome.failed) > 1:
            _report_on_the_rest(run)


def _check_room(ray: Any, run: _Run) -> None:
    """Raise ValueError, before the first stage starts, if a stage to run can never be placed."""
    resources = run.loaded.recipe.resources
    missing = [stage for stage in run.stages if stage.label not in run.artifacts]
    until_s, noted = time.monotonic(), False
    if run.address:
        until_s += JOIN_S
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        refusals = (no_room(stage, resources, nodes) for stage in missing)
        if not (refusal := next(filter(None, refusals), "")):
            return
        if time.monotonic() >= until_s:
            raise ValueError(refusal)
        if not noted:
            run.display.note(f"{refusal}; waiting {JOIN_S:.0f} s for more nodes to join")
            noted = True
        time.sleep(1.0)


class _Driver:
    """Submits the stages of a run to Ray in dependency order, and collects their results."""

    def __init__(self, ray: Any, run: _Run, remote: Any) -> None:
        self.ray, self.run, self.remote = ray, run, remote
        self.missing = {one.label: one for one in run.stages if one.label not in run.artifacts}
        self.running: set[str] = set()  # labels of the stages submitted to Ray
        self.ended: queue.SimpleQueue[tuple[Stage, Any]] = queue.SimpleQueue()
        """Stages whose Ray tasks have ended, and their futures."""
        self.elsewhere: dict[str, tuple[float, str]] = {}
        """Label of a stage that another run is making -> time of the next try, and that run's
        holder."""
        self.runs: dict[str, str] = {}  # label -> id of the stage's MLflow run
        self.causes: dict[str, str] = {}
        """Label of a stage that was not run -> label of the failed stage that it depends on."""
        self.stop_noted = False
        self.trainings: deque[str] = deque()  # labels of the trainings that can be submitted
        self.others: deque[str] = deque()  # labels of the other stages that can be submitted
        self.trainings_have_started = False
        """Whether the run's first trainings have started, so that other stages need not wait."""
        self.start_deadline_s = 0.0  # when other stages stop waiting for trainings that start

    def follow(self) -> None:
        """Submit stages and collect results until every stage has ended.

        Raises:
            RuntimeError: Another run took over the lease.
            SystemExit, KeyboardInterrupt: A signal asked the run to stop.
        """
        for stage in self.run.stages:
            if stage.label in self.run.artifacts:
                self.run.display.stage(stage.label, "reused", "")
                self.run.stage_spool(stage, uuid.uuid4().hex).end("FINISHED")
        order = self._order()
        while order.is_active():
            while len(self.running) < IN_FLIGHT and self.run.stopping.until_s is None:
                label = self._next_ready(order)
                if label is None:
                    break
                if not self._submit(self.missing[label]):
                    order.done(label)
            self._look_again()
            if self.running or self.elsewhere:
                with contextlib.suppress(queue.Empty):
                    stage, future = self.ended.get(timeout=1.0)
                    if self._collect(stage, future):
                        order.done(stage.label)
            self._check_lease()
            self._stop_if_asked()

    def _order(self) -> TopologicalSorter[str]:
        order: TopologicalSorter[str] = TopologicalSorter()
        for stage in self.missing.values():
            order.add(stage.label)
            for other in (*stage.inputs.values(), *stage.after):
                if other.label in self.missing:
                    order.add(stage.label, other.label)
        order.prepare()
        return order

    def _next_ready(self, order: TopologicalSorter[str]) -> str | None:
        """Return the next stage to submit, trainings first; None if no stage may start now."""
        for label in order.get_ready():
            if self.missing[label].name in TRAININGS:
                self.trainings.append(label)
            else:
                self.others.append(label)
        if self.trainings:
            self.start_deadline_s = time.monotonic() + TRAINING_STARTS_S
            return self.trainings.popleft()
        if self.others and not self._others_must_wait():
            return self.others.popleft()
        return None

    def _others_must_wait(self) -> bool:
        """Return whether the run's first trainings are starting: one was submitted less than
        TRAINING_STARTS_S ago, and not all have done their first step."""
        starting = self._trainings_running()
        if self.trainings_have_started or not starting:  # none yet, all have failed, or another run makes them
            return False
        if time.monotonic() > self.start_deadline_s or all(map(self._trains, starting)):
            self.trainings_have_started = True
        return not self.trainings_have_started

    def _trainings_running(self) -> list[str]:
        return [label for label in self.running if self.missing[label].name in TRAININGS]

    def _submit(self, stage: Stage) -> bool:
        """Submit a stage to Ray; return False if it cannot run because one of its inputs failed."""
        self.runs[stage.label] = uuid.uuid4().hex
        for source in stage.inputs.values():
            if source.label in self.run.outcome.failed:
                cause = self.causes.get(source.label, source.label)
                self.causes[stage.label] = cause
                self._post_failure(stage, f"not run, since {cause} failed")
                return False
        self.run.display.stage(stage.label, "waiting")
        self._place(stage)
        return True

    def _place(self, stage: Stage) -> None:
        """Start the Ray task of a stage, which also checks whether another run is still making
        it."""
        from longreach.infra.cluster import reservable_bytes

        resources, task = self.run.loaded.recipe.resources, self.run.task(stage, self.runs[stage.label])
        cpus = stage.kind.cpus(resources)
        # a stage without CPUs starts workers that reserve their own CPUs and memory
        memory = reservable_bytes(task.memory_gib) if cpus else 0
        placed = self.remote.options(
            num_cpus=cpus, num_gpus=stage.kind.gpus(resources), memory=memory, name=stage.label
        )
        future = placed.remote(task).future()
        future.add_done_callback(lambda future: self.ended.put((stage, future)))
        self.running.add(stage.label)

    def _look_again(self) -> None:
        """Retry stages that another run was making: reuse its result, or run the stage if it
        died."""
        for label, (when, other) in list(self.elsewhere.items()):
            if time.monotonic() > when and self.run.stopping.until_s is None:
                self.elsewhere[label] = (math.inf, other)  # no further try until this one has ended
                self._place(self.missing[label])

    def _collect(self, stage: Stage, future: Any) -> bool:
        """Record the result of a stage; return False if another run is making it."""
        run, label = self.run, stage.label
        self.running.remove(label)
        try:
            done: Done = future.result()
        except self.ray.exceptions.RayError as error:
            self._post_failure(stage, _reason(error))
            return True
        if done.made_by:
            self._wait_for(done.made_by, label)
            return False
        if done.held or label in READ_BY_THE_DRIVER:
            run.artifacts[label] = run.store.fetch(stage.name, stage.fingerprint)
        if done.held:
            relay.release(done.held, Spool(run.spool_folder / done.spool), done.out, run.artifacts[label].path)
        run.outcome.ran.append(label)
        if stage.name in TRAININGS and not self._trainings_running():
            self.trainings_have_started = True
        waited = f", after waiting {done.waited_s:.0f} s for other stages" if done.waited_s else ""
        run.display.stage(label, "done", f"{done.seconds:.0f} s{waited}")
        run.stage_spool(stage, self.runs[label]).end("FINISHED")
        return True

    def _wait_for(self, other: str, label: str) -> None:
        """Schedule the next try, and show a note once for each run that is waited for."""
        if label not in self.elsewhere or self.elsewhere[label][1] != other:
            self.run.display.note(f"{label} is being made by {other}: waiting for its result")
        self.elsewhere[label] = (time.monotonic() + LOOK_AGAIN_S, other)

    def _post_failure(self, stage: Stage, reason: str) -> None:
        self.run.outcome.failed[stage.label] = reason
        self.run.display.stage(stage.label, "failed", reason)
        self.run.stage_spool(stage, self.runs[stage.label]).end("FAILED")

    def _check_lease(self) -> None:
        if self.run.lease.lost.is_set():
            whose = repr(self.run.loaded.recipe.name)
            raise LeaseLost(
                f"another run took over the lease of {whose}, because this run sent no heartbeat for too long"
            )

    def _stop_if_asked(self) -> None:
        """End the run once training has saved its checkpoints, or the time for that is over."""
        stopping = self.run.stopping
        if stopping.until_s is None:
            return
        training = [label for label in self.running if self._trains(label)]
        if not training or time.monotonic() > stopping.until_s:
            stopping.end()
        if not self.stop_noted:
            note = (
                f"stopping: waiting up to {GRACE_S:.0f} s for {', '.join(training)} to save a checkpoint. "
                f"Press Ctrl-C again to stop immediately."
            )
            self.run.display.note(note)
            self.stop_noted = True

    def _trains(self, label: str) -> bool:
        """Whether a stage has done steps in this run that it can save; one that still waits for room
        has not."""
        if not self.missing[label].kind.saves_when_stopped:
            return False
        attempts = self.run.spool_folder.glob(f"{file_name(label)}@*.jsonl")
        return any(last_step(path, "train/seconds") for path in attempts)


def _report_on_the_rest(run: _Run) -> None:
    """Report on finished and failed stages: that an arm ran out of memory is a result too."""
    failed = run.outcome.failed
    (whole,) = (stage for stage in run.stages if stage.name == "report")
    done = [stage for stage in whole.inputs.values() if stage.label not in failed]
    others = {label: why for label, why in failed.items() if label != "report"}
    stage = report_on(run.loaded.recipe, done, others)
    try:
        if any(one.label in run.outcome.ran for one in done):  # a published report may show what --force withdrew
            _withdraw(run.store, [stage], True, run.display)
        known = published(run.store, stage)
        task = replace(run.task(stage, run.id), stage_start={})  # in MLflow its attempt is a child of the whole run
        while execute(task).made_by:  # another run is making the same report
            time.sleep(LOOK_AGAIN_S)
    except (ValueError, OSError, CorruptArtifact) as error:
        failed["report"] = f"on the finished stages: {_reason(error)}"
        return
    run.artifacts[stage.label] = run.store.fetch(stage.name, stage.fingerprint)
    run.display.note(f"the report covers the finished stages and names the {len(others)} that failed")
    del failed["report"]
    if known is None:
        run.outcome.ran.append("report")


def _reason(error: Exception) -> str:
    """Return the stage's exception as one line, without Ray's stack frames."""
    from ray.exceptions import OutOfMemoryError

    if isinstance(error, OutOfMemoryError):  # its own message is a page of tables
        largest = re.search(r"PID\s+MEM\(GB\)\s+COMMAND\s+(\d+)\s+([\d.]+)\s+([^\n]+)", str(error))
        who = f" (largest process: {largest[3].strip()}, id {largest[1]}, {largest[2]} GB)" if largest else ""
        return (
            f"the machine ran out of memory, so Ray killed the task{who}: stop other processes that use memory, or "
            "make the stage smaller: lower resources.workers, shorten the rows, set resources.activation_checkpointing "
            "(longreach plan shows how much memory each training needs), or lower the evaluation's longest input"
        )
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, ValueError):
        return str(cause)
    if isinstance(cause, OSError) and cause.errno in NO_SPACE:
        return f"{cause}: free space on the disks of store.root, store.workdir and /tmp, and run the same command again"
    return f"{type(cause).__name__}: {cause}"


@contextmanager
def _shown_events(run: _Run) -> Iterator[None]:
    """Display the events that stages write, until the run ends."""
    offsets: dict[str, int] = {}
    labels = {file_name(stage.label): stage.label for stage in run.stages}
    ended: set[str] = set()  # event files of attempts that have ended, which are not read again

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
        with polling(look, every_s=0.5, name="events"):
            yield
    finally:
        look()
