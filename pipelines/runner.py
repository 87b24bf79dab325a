"""Run a recipe: reuse what is published and whole, run the rest as Ray tasks chained by their ObjectRefs.

The manifests are the truth: a stage is done if its fingerprint is published and its files match. When nothing is left
to do no Ray is started. One run of a recipe at a time: a lease, kept by a heartbeat counter (infra/artifact.py).
MLflow only watches: stages write events to local files, and a process of its own uploads them (infra/mirror.py).

    run(load("quickstart"), display=Display())
"""

from __future__ import annotations

import datetime
import getpass
import os
import platform
import shutil
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from infra.artifact import AlreadyPublished, Artifact, CorruptArtifact, Lease, LeaseHeld, Store
from infra.environment import versions
from infra.mirror import default_uri, start_mirror, stop_mirror
from infra.registry import check_login
from infra.resources import Resources
from infra.tracking import Spool, read_events
from pipelines.display import Display
from pipelines.foresee import foresee
from pipelines.graph import build, report_on
from pipelines.recipe import Loaded
from pipelines.stage import Stage, StageRun, differences, load_function, stop_file

__all__ = ["LeaseHeld", "PlanRow", "RunOutcome", "plan", "run"]

State = Literal["done", "stale", "run"]


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


def open_store(loaded: Loaded) -> Store:
    """The recipe's store; a relative local root is this folder's."""
    recipe = loaded.recipe.store
    root = recipe.root if "://" in recipe.root else str(Path(recipe.root).absolute())
    return Store(root, Path(recipe.workdir).absolute() / "scratch")


def use_tracking(loaded: Loaded) -> str:
    """The recipe's MLflow, else the environment's, else the embedded one; from here on it is everybody's in here."""
    recipe = loaded.recipe
    uri = recipe.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(recipe.store.workdir)
    os.environ["MLFLOW_TRACKING_URI"] = uri
    return uri


def plan(loaded: Loaded) -> list[PlanRow]:
    """What `run` would do. Files are checked for presence and size; reading their content is `run`'s first act."""
    use_tracking(loaded)
    store, stages = open_store(loaded), build(loaded.recipe)
    costs = foresee(store, stages, loaded.recipe.resources)
    rows = (_examine(store, stage, hashes=False)[0] for stage in stages)
    return [replace(row, foreseen=costs.get(row.stage, "")) for row in rows]


def _examine(store: Store, stage: Stage, *, hashes: bool) -> tuple[PlanRow, Artifact | None]:
    """A stage's row, and its artifact if it is done."""

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
    same_label = [m for m in store.manifests(stage.name) if m["label"] == stage.label]
    if not same_label:
        return row("run", "never run", None), None
    newest = max(same_label, key=lambda m: m["published_at"])
    changes = [_readable(stage, line) for line in differences(newest["identity"], stage.identity)]
    more = f"; and {len(changes) - WHY} more changes" if len(changes) > WHY + 1 else ""
    return row("stale", "; ".join(changes[: WHY if more else None]) + more, newest["seconds"]), None


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
    started = time.monotonic()
    if away := check_login(use_tracking(loaded)):
        display.note(f"MLflow: {away}; metrics are kept here and sent when it does, or later by longreach sync")
    stages, store = build(loaded.recipe), open_store(loaded)
    _check_forced(force, stages)
    outcome = RunOutcome()
    found = _survey(store, stages, {}, repair=False)
    if not force and len(found) == len(stages):
        display.note("nothing new: every stage is published, with these choices and from these documents")
    if force or len(found) < len(stages):
        with _lease(store, loaded.recipe.name, wait, display) as lease, _terminable():
            for stage in stages:
                if {stage.name, stage.label} & set(force) and store.find(stage.name, stage.fingerprint):
                    store.withdraw(stage.name, stage.fingerprint)
                    found.pop(stage.label, None)
            found = _survey(store, stages, found, repair=True)
            _run_missing(_Run(loaded, store, stages, found, display, lease, address), outcome)
    outcome.reused = [stage.label for stage in stages if stage.label not in {*outcome.ran, *outcome.failed}]
    if report := found.get("report"):
        outcome.report_path, outcome.headline = report.path / "report.html", report.summary.get("headline", "")
    if gate := found.get("promote"):
        outcome.refusals = gate.summary["refusals"]
    outcome.seconds = time.monotonic() - started
    return outcome


def _check_forced(force: tuple[str, ...], stages: list[Stage]) -> None:
    names = {stage.name for stage in stages} | {stage.label for stage in stages}
    if unknown := sorted(set(force) - names):
        raise ValueError(f"--force {', '.join(unknown)}: no such stage; there are {', '.join(sorted(names))}")


def _survey(store: Store, stages: list[Stage], known: dict[str, Artifact], *, repair: bool) -> dict[str, Artifact]:
    """Artifacts of the stages that are done, every byte of them read; damaged ones are put aside if `repair`."""
    found = dict(known)
    for stage in stages:
        if stage.label in found:
            continue
        row, artifact = _examine(store, stage, hashes=True)
        if artifact:
            found[stage.label] = artifact
        elif repair and store.fs.exists(f"{store.base}/{stage.name}/{stage.fingerprint}/artifact.json"):
            print(f"{stage.label}: {row.why}: it is put aside as {store.quarantine(stage.name, stage.fingerprint)}")
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
    """SIGTERM: the run's training writes its checkpoints, for which there is so much time."""

    file: Path | None
    """Tells training to stop; None while there is nothing to be stopped."""
    until_s: float | None = None

    def asked(self, signum: int, frame: object) -> None:
        if self.file is None or self.until_s is not None:  # nothing to wait for, or told twice
            raise SystemExit(128 + signum)
        self.file.touch()
        self.until_s = time.monotonic() + GRACE_S


GRACE_S = 25.0
"""Kubernetes kills 30 seconds after it asked."""


@contextmanager
def _terminable(file: Path | None = None) -> Iterator[_Stopping]:
    """SIGTERM ends the run as Ctrl-C does, after its checkpoints: leases are released and Ray's processes ended. Exit
    status 143; a second one does not wait."""
    stopping = _Stopping(file)
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    previous = signal.signal(signal.SIGTERM, stopping.asked)
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGTERM, previous)


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

    @property
    def spool_folder(self) -> Path:
        return Path(self.loaded.recipe.store.workdir).absolute() / "spool" / self.id

    def spool(self, label: str, run: str, parent: str | None, kind: str, tags: dict[str, str]) -> Spool:
        """The event file of the pipeline or of a stage."""
        recipe = self.loaded.recipe
        return Spool.open(
            self.spool_folder / f"{safe(label)}.jsonl",
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


def _run_missing(run: _Run, outcome: RunOutcome) -> None:
    recipe = run.loaded.recipe
    pipeline = run.spool(recipe.name, run.id, None, "pipeline", {"commit": git_commit()})
    mirror = None
    if recipe.tracking.enabled:
        mirror = start_mirror(run.spool_folder, os.environ["MLFLOW_TRACKING_URI"])
    status = "KILLED"
    try:
        with _tail(run):
            _run_on_ray(run, outcome)
        if report := run.found.get("report"):
            pipeline.metrics(report.summary.get("metrics", {}))
            pipeline.tag("mlflow.note.content", _description(run, outcome, report.summary))
            for path in sorted(report.path.iterdir()):
                pipeline.artifact(path, "report")
        if gate := run.found.get("promote"):
            pipeline.tag(
                "gate", "passed" if gate.summary["passed"] else "refused: " + "; ".join(gate.summary["refusals"])
            )
        status = "FAILED" if outcome.failed else "FINISHED"
    finally:
        pipeline.end(status)
        if mirror:
            outcome.unsent_points = stop_mirror(mirror, timeout_s=30)


def _description(run: _Run, outcome: RunOutcome, summary: dict[str, Any]) -> str:
    """What MLflow shows on the pipeline's page, in Markdown."""
    parts = [summary.get("headline", ""), summary.get("table", "")]
    if gate := run.found.get("promote"):
        refusals = "; ".join(gate.summary["refusals"])
        name = gate.summary["name"]
        parts.append(f"**Gate:** {name} refused: {refusals}" if refusals else f"**Gate:** {name} has a new champion.")
    parts += [f"**Failed:** {label}: {why}" for label, why in outcome.failed.items()]
    parts.append(f"Report: `report/report.html` under Artifacts. Made by `{run.loaded.command}`.")
    return "\n\n".join(part for part in parts if part)


def _run_on_ray(run: _Run, outcome: RunOutcome) -> None:
    """Submit what is missing in the order of the graph and follow it to the end."""
    from infra.cluster import connected

    recipe = run.loaded.recipe
    # Ray sets a handler of its own when it starts, so ours comes after it.
    with connected(run.address) as ray, _terminable(stop_file(run.spool_folder)) as stopping:
        # Ray Train's helpers look for the cluster by themselves, and find two where another one runs on this machine.
        environment = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        here = {"env_vars": environment | {"MLFLOW_TRACKING_URI": os.environ["MLFLOW_TRACKING_URI"]}}
        execute = ray.remote(_execute)
        refs: dict[str, Any] = {}
        spools: dict[str, Spool] = {}
        for stage in run.stages:
            stage_run = uuid.uuid4().hex
            tags = {"fingerprint": stage.fingerprint, "stage": stage.name, "cache_hit": str(stage.label in run.found)}
            about = stage.label.partition("[")[2].rstrip("]").split(",")
            tags |= {key: value for key, value in zip(("arm", "eval"), about, strict=False) if value}
            spools[stage.label] = run.spool(stage.label, stage_run, run.id, "stage", tags)
            if stage.label in run.found:
                run.display.stage(stage.label, "reused", "")
                spools[stage.label].end("FINISHED")
                continue
            task = Task(
                stage, recipe.resources, run.store.root, str(run.store.scratch), str(run.spool_folder), stage_run,
                recipe.experiment, run.loaded.command,
            )  # fmt: skip
            inputs = [refs[s.label] for s in stage.inputs.values() if s.label in refs]
            before = [refs[s.label] for s in stage.after if s.label in refs]
            cpus = stage.kind.cpus(recipe.resources)
            # max_retries: how often it is run again if its worker dies
            gpus = stage.kind.gpus(recipe.resources)
            placed = execute.options(num_cpus=cpus, num_gpus=gpus, name=stage.label, max_retries=2, runtime_env=here)
            run.display.stage(stage.label, "waiting")
            refs[stage.label] = placed.remote(task, before, *inputs)
        _follow(ray, run, outcome, refs, spools, stopping)
        if "report" in outcome.failed and len(outcome.failed) > 1:
            _report_on_the_rest(run, outcome)


def _follow(
    ray: Any, run: _Run, outcome: RunOutcome, refs: dict[str, Any], spools: dict[str, Spool], stopping: _Stopping
) -> None:
    by_label = {stage.label: stage for stage in run.stages}
    labels = {ref: label for label, ref in refs.items()}
    pending = list(labels)
    while pending:
        ready, pending = ray.wait(pending, num_returns=1, timeout=1.0)
        if run.lease.lost.is_set():
            raise RuntimeError(f"the lease of {run.loaded.recipe.name!r} was taken over: this run was silent too long")
        for ref in ready:
            label = labels[ref]
            stage = by_label[label]
            try:
                seconds = ray.get(ref)
            except ray.exceptions.RayError as error:
                blamed = [s.label for s in stage.inputs.values() if s.label in outcome.failed]
                outcome.failed[label] = f"not run, since {blamed[0]} failed" if blamed else _reason(error)
                run.display.stage(label, "failed", outcome.failed[label])
                spools[label].end("FAILED")
                continue
            run.found[label] = run.store.fetch(stage.name, stage.fingerprint)
            outcome.ran.append(label)
            run.display.stage(label, "done", f"{seconds:.0f} s")
            spools[label].end("FINISHED")
        in_training = any(_trains(run, by_label[labels[ref]]) for ref in pending)
        if stopping.until_s is not None and not (in_training and time.monotonic() < stopping.until_s):
            raise SystemExit(128 + signal.SIGTERM)


def _report_on_the_rest(run: _Run, outcome: RunOutcome) -> None:
    """A report of what was done, in which what failed is named: an arm that ran out of memory is a result too."""
    (whole,) = (stage for stage in run.stages if stage.name == "report")
    done = [stage for stage in whole.inputs.values() if stage.label in run.found]
    failed = {label: why for label, why in outcome.failed.items() if label != "report"}
    stage = report_on(run.loaded.recipe, done, failed)
    task = Task(
        stage, run.loaded.recipe.resources, run.store.root, str(run.store.scratch), str(run.spool_folder), run.id,
        run.loaded.recipe.experiment, run.loaded.command,
    )  # fmt: skip
    _execute(task, [])
    run.found[stage.label] = run.store.fetch(stage.name, stage.fingerprint)
    run.display.note(f"the report is on what was done; {len(failed)} stages failed and are named in it")
    del outcome.failed["report"]


def _trains(run: _Run, stage: Stage) -> bool:
    """Whether the stage is training that has begun."""
    return stage.name in ("finetune", "pretrain") and any(run.spool_folder.glob(f"{safe(stage.label)}--*.jsonl"))


def _reason(error: Exception) -> str:
    """The stage's own exception in a line, without Ray's frames."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {cause}" if not isinstance(cause, ValueError) else str(cause)


@contextmanager
def _tail(run: _Run) -> Iterator[None]:
    """Show the events that stages write, until the run ends."""
    offsets: dict[Path, int] = {}
    labels = {safe(stage.label): stage.label for stage in run.stages}
    stop = threading.Event()

    def look() -> None:
        for path in run.spool_folder.glob("*--*.jsonl"):
            events, offsets[path] = read_events(path, offsets.get(path, 0))
            label = labels[path.name.split("--")[0]]
            for event in events:
                run.display.event(label, event)

    def loop() -> None:
        while not stop.wait(0.5):
            look()

    thread = threading.Thread(target=loop, daemon=True, name="tail")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()


def _execute(task: Task, before: list[Any], *inputs: float) -> float:
    """A stage on a Ray worker: read verified inputs, write into an attempt of its own, publish. Returns seconds.

    Ray calls it again after the worker died: the new attempt may start from the old one's checkpoints.
    """
    import ray

    if before:
        ray.wait(before, num_returns=len(before))
    stage, store = task.stage, Store(task.root, task.scratch)
    if done := store.find(stage.name, stage.fingerprint):  # published by another run in the meantime, or before a retry
        return done.manifest["seconds"]
    artifacts = {name: store.fetch(source.name, source.fingerprint) for name, source in stage.inputs.items()}
    attempt = store.new_attempt(stage.name, stage.fingerprint)
    earlier = [f for f in store.earlier_attempts(stage.name, stage.fingerprint) if f.name != attempt.id]
    spool = Spool.open(
        Path(task.spool_folder) / f"{safe(stage.label)}--{attempt.id}.jsonl",
        run=uuid.uuid4().hex,
        parent=task.run,
        experiment=task.experiment,
        name=f"{stage.label} attempt {int(attempt.id.split('-')[0])}",
        kind="attempt",
        tags={"fingerprint": stage.fingerprint, "attempt": attempt.id},
        params=_flat(stage.identity["recipe"]),
    )
    started, status = time.monotonic(), "FAILED"
    try:
        work = StageRun(stage.label, spool, attempt, earlier, task.command, task.experiment)
        function = load_function(stage.kind)
        summary = function(**artifacts, recipe=stage.recipe, resources=task.resources, out=attempt.out, run=work)
        seconds = round(time.monotonic() - started, 3)
        record = {
            "schema": 1,
            "label": stage.label,
            "identity": stage.identity,
            "inputs": {name: {"stage": a.stage, "fingerprint": a.fingerprint} for name, a in artifacts.items()},
            "summary": summary,
            "seconds": seconds,
            "resources": task.resources.model_dump(mode="json"),
            "versions": versions(),
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
        return seconds
    finally:
        spool.end(status)


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """A section as MLflow parameters: `optim.steps` -> `8`."""
    flat: dict[str, str] = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return flat


def git_commit() -> str:
    """The commit of the code that runs, `-dirty` if it was changed since; `unknown` outside of a checkout."""
    if not shutil.which("git"):
        return "unknown"
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
