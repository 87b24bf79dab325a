"""Run a recipe: reuse what is published and whole, run the rest as Ray tasks once their inputs are
published.

When nothing is left to do no Ray is started. One run of a recipe at a time: a lease, kept by a
heartbeat counter (infra/lease.py). MLflow only watches: stages write events to local files, and a
process of its own uploads them (infra/mirror.py). What is done already is found by plan.py, a
stage's work is worker.py, signals are signals.py; how often what is tried again is stated in
infra/launch.py.

    run(load("quickstart"), display=Display())
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import re
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
from longreach.infra.artifact import Artifact, CorruptArtifact, Store
from longreach.infra.choices import dotted
from longreach.infra.lease import Lease, holder_name
from longreach.infra.mirror import start_mirror, stop_mirror
from longreach.infra.polling import polling
from longreach.infra.registry import MODEL, check_login
from longreach.infra.resources import STAGE_RETRIES
from longreach.infra.tracking import Spool, read_events
from longreach.infra.versions import git_commit
from longreach.pipelines.artifacts import Decision, PackedCorpus, Release, Report
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
"""Stages that Ray has at a time; each takes 30 KiB of this process."""
WORKERS_IMPORT = (
    "longreach.pipelines.worker",
    "longreach.training.loop",
    "deepspeed",
    "datasets",
    "altair",
    "ray.train.torch",
)
"""What is imported once for all workers: the slowest of what they use. The others import the rest
themselves."""
LOOK_AGAIN_S = 5.0
"""How long a stage that another run is making is left alone until it is tried again."""
JOIN_S = 60.0
"""How long nodes may take to join somebody's cluster before what has no room there is refused."""
NOT_IN_PARAMETERS = re.compile(r"[^\w./ -]")
"""Characters that MLflow's names of parameters do not allow, such as the plus in an arm's name."""
READ_BY_THE_DRIVER = ("report", "promote")
"""Stages whose artifacts the driver reads; the others' are read by the workers that need them."""


@dataclass
class RunOutcome:
    """What a run did."""

    report_path: Path | None = None  # the report's page; None if there is no report
    report: dict[str, Any] | None = None  # the report's manifest
    ran: list[str] = field(default_factory=list)  # labels of the stages that were run and published
    reused: list[str] = field(default_factory=list)  # labels of the stages that were published before
    failed: dict[str, str] = field(default_factory=dict)
    """Label -> why, also for stages that could not run because one before them failed."""
    seconds: float = 0.0
    refusals: list[str] = field(default_factory=list)
    """Why the gate refused the challenger; empty if it did not."""
    gate: dict[str, Any] = field(default_factory=dict)  # what the gate decided: passed, name, version
    headline: str = ""  # the report's first sentences
    unsent_points: int = 0  # metrics that MLflow does not have yet; `longreach sync` sends them


@dataclass
class _Run:
    """One run's state in the driver."""

    loaded: Loaded
    store: Store
    stages: list[Stage]
    artifacts: dict[str, Artifact]  # what is published already, and what the driver read since, by label
    display: Display
    lease: Lease
    stopping: Stopping
    outcome: RunOutcome
    address: str | None
    again: Sequence[Stage] = ()  # what --force withdraws, once it is known that there is room for it
    wait: bool = False  # for another run that is making one of these, instead of raising LeaseHeld
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def spool_folder(self) -> Path:
        return Path(self.loaded.recipe.store.workdir).absolute() / "spool" / self.id

    def stage_start(self, stage: Stage, run: str) -> dict[str, Any]:
        """Return what opens the event file of a stage, beside its path; `run` is the stage's own
        MLflow run."""
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
        """Open the event file of a stage, which its worker has begun, or else make it."""
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
    """Bring every stage of a recipe to be published.

    Args:
        force: stage names or labels that run again even if they are done, with all that is made from them.
        wait: wait for another run of this recipe instead of raising LeaseHeld.
        address: a Ray cluster; without it one is started here for the time of the run.
        gated: False leaves out the gate's own stages, and asks no registry for the champion.

    ValueError: bad choices or input, or no room for a stage, found before the first one starts.
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
            display.note("nothing new: every stage is published, with these choices and from these documents")
        else:
            if address is None:
                check_fits(foresee(store, missing, loaded.recipe.resources).values())
            if again:
                kinds = [f"{name} {count}" for name, count in Counter(stage.name for stage in again).items()]
                what = f"{len(again)} of {len(stages)} stages are made anew, with all that is made from what is forced"
                display.note(f"--force {', '.join(force)}: {what}: {', '.join(kinds)}")
            with _lease(store, loaded.recipe.name, wait, display) as held, terminable() as stopping:
                artifacts = survey(store, kept, artifacts, repair=True)
                this = _Run(loaded, store, stages, artifacts, display, held, stopping, outcome, address, again, wait)
                _run_missing(this)
        touched = {*outcome.ran, *outcome.failed}
        outcome.reused = [stage.label for stage in stages if stage.label not in touched]
        _read_results(store, artifacts, outcome, display)
    outcome.seconds = time.monotonic() - began
    return outcome


def _check_tracking(loaded: Loaded, uri: str, display: Display) -> None:
    """Raise ValueError if MLflow refuses the login; note if it is away."""
    recipe = loaded.recipe
    if (recipe.tracking.enabled or recipe.promote) and (away := check_login(uri)):
        display.note(f"MLflow: {away}; metrics are kept here and sent when it does, or later by longreach sync")


def _forced(force: tuple[str, ...], stages: list[Stage]) -> list[Stage]:
    """Return the stages that `force` names and all that are made from them, whose fingerprints would
    not say that they are old; ValueError: a name that no stage has."""
    if not force:
        return []
    names = {name for stage in stages for name in (stage.name, stage.label)}
    if unknown := sorted(set(force) - names):
        raise ValueError(f"--force {', '.join(unknown)}: no such stage; there are {', '.join(sorted(names))}")
    again = {stage.fingerprint for stage in stages if _is_forced(force, stage)}
    return [stage for stage in stages if stage.fingerprint in again]


def _is_forced(force: tuple[str, ...], stage: Stage) -> bool:
    """True if `force` names a stage or anything that it is made from."""
    named = stage.name in force or stage.label in force
    return named or any(_is_forced(force, source) for source in stage.inputs.values())


def _withdraw(store: Store, stages: Sequence[Stage], wait: bool, display: Display) -> None:
    """Unpublish stages, damaged ones too, and clear their attempts, which they would resume from.

    LeaseHeld: another run is making one of them, and not `wait`.
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
        display.note(f"{name} is being run by {other}, or was when it died: looking for a sign of life")
    lease.acquire(wait=wait)
    try:
        yield lease
    finally:
        lease.release()


def _read_results(store: Store, artifacts: dict[str, Artifact], outcome: RunOutcome, display: Display) -> None:
    if report := _report(artifacts):
        page = report.path if store.local else store.fetch("report", report.fingerprint).path
        outcome.report_path, outcome.report = page / "report.html", report.manifest
        outcome.headline = report.headline
    if decision := _decision(artifacts):
        gate = decision.summary
        outcome.gate, outcome.refusals = gate, decision.refusals
        if not decision.refusals and "promote" not in outcome.ran:
            passed = f"version {gate['version']} of {gate['name']} passed the gate in an earlier run and is"
            reason = "it was rolled back, or the registry is another one; --force promote asks again"
            display.note(f"{passed} not champion: {reason}")


def _report(artifacts: dict[str, Artifact]) -> Report | None:
    artifact = artifacts.get("report")
    return Report(artifact.path, artifact.manifest) if artifact else None


def _decision(artifacts: dict[str, Artifact]) -> Decision | None:
    artifact = artifacts.get("promote")
    return Decision(artifact.path, artifact.manifest) if artifact else None


def _run_missing(run: _Run) -> None:
    """Run what is not published, while MLflow's mirror follows; the report goes to MLflow as
    well."""
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
    except (ValueError, RuntimeError) as error:  # nobody stopped it: it has no room, or its lease was lost
        status = "FAILED"
        pipeline.tag("mlflow.note.content", f"**Failed:** {error}")
        raise
    finally:
        pipeline.end(status)
        if mirror:
            at_most_s = 5 if status == "KILLED" else math.inf
            run.outcome.unsent_points = stop_mirror(mirror, at_most_s=at_most_s)


def _open_pipeline(run: _Run) -> Spool:
    """Open the event file of the whole run, with what was chosen and from which documents."""
    recipe, origins = run.loaded.recipe, run.loaded.origins
    params = {}
    for location, value in values(recipe):
        field = dotted(location)
        if origins.get(field, DEFAULT) != DEFAULT:  # without its gate a recipe has a field that was not written
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
        if stage.kind.makes is PackedCorpus and "documents" in stage.digests:
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
    """Connect to Ray, run what is missing, and report on what was done even if something failed."""
    from longreach.infra.cluster import connected

    workers_import: tuple[str, ...] = WORKERS_IMPORT
    if run.loaded.recipe.resources.gpus_per_worker > 0:  # not tried there: CUDA and forks are a matter of care
        workers_import = ()
    with connected(run.address, workers_import=workers_import) as ray:
        run.stopping.listen()  # Ray has set a handler of its own
        _check_room(ray, run)
        _withdraw(run.store, run.again, run.wait, run.display)
        environment = {TRACKING: os.environ[TRACKING]}
        # Ray Train's helpers look for the cluster, and find two where another one runs on this
        # machine.
        environment["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        collector: Any = None  # the actor lives as long as this reference
        if run.address:  # other nodes do not see this disk
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
    """Raise ValueError if a stage that is to run can never be placed, before the first one has
    begun."""
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
            run.display.note(f"{refusal}; for {JOIN_S:.0f} s more nodes may join it")
            noted = True
        time.sleep(1.0)


class _Driver:
    """Submits the stages of a run to Ray in their order, and collects what becomes of them."""

    def __init__(self, ray: Any, run: _Run, remote: Any) -> None:
        self.ray, self.run, self.remote = ray, run, remote
        self.missing = {one.label: one for one in run.stages if one.label not in run.artifacts}
        self.running: set[str] = set()  # labels of the stages that Ray has
        self.ended: queue.SimpleQueue[tuple[Stage, Any]] = queue.SimpleQueue()
        """Stages that Ray is done with, and their futures."""
        self.elsewhere: dict[str, tuple[float, str]] = {}
        """Label of a stage that another run is making -> when to look again, and who that is."""
        self.runs: dict[str, str] = {}  # label -> the stage's own MLflow run
        self.causes: dict[str, str] = {}
        """Label of a stage that was not run -> label of the failed stage before it."""
        self.stop_noted = False

    def follow(self) -> None:
        """Return when every stage has ended.

        RuntimeError: another run took the lease over. SystemExit, KeyboardInterrupt: somebody asked
        to stop.
        """
        for stage in self.run.stages:
            if stage.label in self.run.artifacts:
                self.run.display.stage(stage.label, "reused", "")
                self.run.stage_spool(stage, uuid.uuid4().hex).end("FINISHED")
        order = self._order()
        ready: deque[str] = deque()
        while order.is_active():
            ready += order.get_ready()
            while ready and len(self.running) < IN_FLIGHT and self.run.stopping.until_s is None:
                label = ready.popleft()
                if not self._submit(self.missing[label]):
                    order.done(label)
                    ready += order.get_ready()
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

    def _submit(self, stage: Stage) -> bool:
        """Give a stage to Ray. False if one that it needs has failed, so that it cannot run."""
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
        """Let Ray run a stage, or look whether another run still makes it."""
        from longreach.infra.cluster import reservable_bytes

        resources, task = self.run.loaded.recipe.resources, self.run.task(stage, self.runs[stage.label])
        cpus = stage.kind.cpus(resources)
        memory = reservable_bytes(task.memory_gib) if cpus else 0  # without CPUs, what it starts brings both
        placed = self.remote.options(
            num_cpus=cpus, num_gpus=stage.kind.gpus(resources), memory=memory, name=stage.label
        )
        future = placed.remote(task).future()
        future.add_done_callback(lambda future: self.ended.put((stage, future)))
        self.running.add(stage.label)

    def _look_again(self) -> None:
        """Try stages again that another run was making: its result is taken, or its place if it
        died."""
        for label, (when, other) in list(self.elsewhere.items()):
            if time.monotonic() > when and self.run.stopping.until_s is None:
                self.elsewhere[label] = (math.inf, other)  # not again until this look has ended
                self._place(self.missing[label])

    def _collect(self, stage: Stage, future: Any) -> bool:
        """Take what became of a stage; False if another run is making it."""
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
        run.display.stage(label, "done", f"{done.seconds:.0f} s")
        run.stage_spool(stage, self.runs[label]).end("FINISHED")
        return True

    def _wait_for(self, other: str, label: str) -> None:
        """Look again later, and say so once for each run that is waited for."""
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
            raise RuntimeError(f"the lease of {whose} was taken over: this run was silent too long")

    def _stop_if_asked(self) -> None:
        """End the run once training has saved, or the time for it is over."""
        stopping = self.run.stopping
        if stopping.until_s is None:
            return
        training = [label for label in self.running if self._trains(label)]
        if not training or time.monotonic() > stopping.until_s:
            stopping.end()
        if not self.stop_noted:
            note = f"stopping: {', '.join(training)} may save within {GRACE_S:.0f} s; once more: at once"
            self.run.display.note(note)
            self.stop_noted = True

    def _trains(self, label: str) -> bool:
        begun = any(self.run.spool_folder.glob(f"{file_name(label)}@*.jsonl"))
        return begun and self.missing[label].kind.saves_when_stopped


def _report_on_the_rest(run: _Run) -> None:
    """Report on what was done, and on what failed: an arm that ran out of memory is a result
    too."""
    failed = run.outcome.failed
    (whole,) = (stage for stage in run.stages if stage.name == "report")
    done = [stage for stage in whole.inputs.values() if stage.label not in failed]
    others = {label: why for label, why in failed.items() if label != "report"}
    stage = report_on(run.loaded.recipe, done, others)
    if any(one.label in run.outcome.ran for one in done):  # else it may be there, on what --force took back
        _withdraw(run.store, [stage], True, run.display)
    task = replace(run.task(stage, run.id), stage_start={})  # its attempt stands below the whole run
    try:
        while execute(task).made_by:  # another run reports on the very same
            time.sleep(LOOK_AGAIN_S)
    except (ValueError, OSError, CorruptArtifact) as error:
        failed["report"] = f"of what was done: {error}"
        return
    run.artifacts[stage.label] = run.store.fetch(stage.name, stage.fingerprint)
    run.display.note(f"the report is on what was done; {len(others)} stages failed and are named in it")
    del failed["report"]


def _reason(error: Exception) -> str:
    """The stage's own exception in a line, without Ray's frames."""
    from ray.exceptions import OutOfMemoryError

    if isinstance(error, OutOfMemoryError):  # its own message is a page of tables
        return (
            "the machine's memory was full, so Ray ended it; to try it again would only repeat that: end what else "
            "fills the memory, or take fewer resources.workers, shorter rows or resources.activation_checkpointing "
            "(longreach plan says what each training needs)"
        )
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, ValueError):
        return str(cause)
    return f"{type(cause).__name__}: {cause}"


@contextmanager
def _shown_events(run: _Run) -> Iterator[None]:
    """Show the events that stages write, until the run ends."""
    offsets: dict[str, int] = {}
    labels = {file_name(stage.label): stage.label for stage in run.stages}
    ended: set[str] = set()  # files of attempts that are over, which need no further look

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
