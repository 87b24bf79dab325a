"""Run one stage on a Ray worker: read verified inputs, write into a new attempt, publish.

If the worker dies, Ray calls `execute` again, and the new attempt may resume from the old one's
checkpoints.
"""

from __future__ import annotations

import datetime
import functools
import platform
import time
import traceback
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longreach.infra import relay
from longreach.infra.artifact import AlreadyPublished, Artifact, Attempt, Store
from longreach.infra.files import flatten
from longreach.infra.lease import Lease, LeaseHeld, holder_name
from longreach.infra.machine import give_back_memory
from longreach.infra.resources import Resources
from longreach.infra.share import Share, node_scratch
from longreach.infra.tracking import Spool
from longreach.infra.versions import git_commit, versions
from longreach.pipelines.artifacts import HeldOutDocuments
from longreach.pipelines.kind import StageRun
from longreach.pipelines.stage import Stage
from longreach.training.convert import source_digest as model_digest
from longreach.training.recipe import BaseRecipe


@dataclass(frozen=True)
class Task:
    """What is sent to the worker that runs a stage."""

    stage: Stage  # the stage with its choices and its inputs' fingerprints
    resources: Resources
    root: str
    scratch: str  # the driver's folder for attempts and fetched artifacts
    spool_folder: str  # the run's folder of event files, on the driver's node
    run: str  # id of the stage's MLflow run; its attempts are children of it
    experiment: str
    command: str
    version: str  # the driver's version of longreach, which every node must have
    stage_start: dict[str, Any] = field(default_factory=dict)
    """First record of the event file of the stage's MLflow run; empty if it has no run of its
    own."""
    memory_gib: float = 0  # estimated memory of the stage


@dataclass(frozen=True)
class Done:
    """What a worker returns to the driver once a stage is published, or being made elsewhere."""

    seconds: float  # of the stage itself
    waited_s: float = 0.0  # before that, for other stages to free resources
    spool: str = ""  # name of the attempt's event file
    out: str = ""  # the folder with the attempt's files
    held: list[dict[str, Any]] = field(default_factory=list)
    """Events that name files on another node; the driver sends them once it has the files."""
    made_by: str = ""  # another run that is making the artifact now; if set, nothing was done: try again later


known_versions = functools.cache(versions)
"""Versions of longreach and its dependencies, read once per process."""


def file_name(label: str) -> str:
    """Return a label as a file name: `finetune[lora]` -> `finetune-lora`."""
    return label.replace("[", "-").replace(",", "-").rstrip("]")


def execute(task: Task) -> Done:
    """Run a stage in a new attempt and publish its artifact, unless it is published or another run
    is making it.

    Raises:
        ValueError: This node has another version of longreach, or the stage refuses its choices.
        CorruptArtifact: An input is damaged.
    """
    version = str(known_versions()["longreach"])
    if version != task.version:
        raise ValueError(
            f"this node has longreach {version}, but the driver has {task.version}: install the same on all nodes"
        )
    stage, store = task.stage, Store(task.root, node_scratch(task.scratch))
    if done := store.find(stage.name, stage.fingerprint):  # published by another run, or before a retry
        return Done(done.manifest["seconds"])
    place = f"{stage.name}/{stage.fingerprint}/lease"
    try:
        lease = Lease(store, stage.label, holder_name(), place=place).acquire(wait=False)
    except LeaseHeld as other:
        return Done(0.0, made_by=other.holder)
    try:
        if done := store.find(stage.name, stage.fingerprint):  # published while this run waited for the lease
            return Done(done.manifest["seconds"])
        return _make(task, store)
    finally:
        lease.release()


def _make(task: Task, store: Store) -> Done:
    """Run a stage whose lease is held here, and publish its artifact."""
    stage = task.stage
    if task.stage_start:  # here and not in the driver, so that the run's duration excludes the queue
        relay.spool(Path(task.spool_folder) / f"{file_name(stage.label)}.jsonl", **task.stage_start)
    artifacts = {name: store.fetch(ref.name, ref.fingerprint) for name, ref in stage.inputs.items()}
    attempt = store.new_attempt(stage.name, stage.fingerprint)
    spool, run_id = _open_spool(task, attempt)
    began = time.monotonic()
    status = "FAILED"
    try:
        run = _stage_run(task, store, attempt, artifacts, spool, run_id)
        summary = _call(task, run, artifacts)
        waited_s = round(sum(run.waits_s), 3)
        seconds = round(time.monotonic() - began - waited_s, 3)
        try:
            store.publish(attempt, _record(task, artifacts, summary, seconds))
        except AlreadyPublished as refused:  # another attempt's result is published, and is used instead
            spool.tag("publication", f"refused: attempt {refused.artifact.attempt} was first")
        spool.metrics({"cost/stage_s": seconds})
        if waited_s:
            spool.metrics({"cost/waited_s": waited_s})
        status = "FINISHED"
        return Done(seconds, waited_s, spool.path.name, str(attempt.out), getattr(spool, "held", []))
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # their variables may hold gigabytes, and Ray keeps the error
        raise
    finally:
        spool.end(status)
        give_back_memory()


def _open_spool(task: Task, attempt: Attempt) -> tuple[Spool, str]:
    stage, run_id = task.stage, uuid.uuid4().hex
    spool = relay.spool(
        Path(task.spool_folder) / f"{file_name(stage.label)}@{attempt.id}.jsonl",
        run=run_id,
        parent=task.run,
        experiment=task.experiment,
        name=f"{stage.label} attempt {int(attempt.id.split('-')[0])}",
        kind="attempt",
        tags={"fingerprint": stage.fingerprint, "attempt": attempt.id},
        params={name: str(value) for name, value in flatten(stage.identity["recipe"]).items()},
    )
    return spool, run_id


def _stage_run(
    task: Task, store: Store, attempt: Attempt, artifacts: dict[str, Artifact], spool: Spool, run_id: str
) -> StageRun:
    stage, share = task.stage, None
    if not store.local:
        share = Share(
            root=store.root,
            scratch=str(store.scratch),
            stage=stage.name,
            fingerprint=stage.fingerprint,
            attempt=attempt.id,
            inputs=tuple((artifact.stage, artifact.fingerprint) for artifact in artifacts.values()),
        )
    earlier = store.earlier_attempts(stage.name, stage.fingerprint)
    return StageRun(
        label=stage.label,
        spool=spool,
        attempt=attempt,
        earlier=[folder for folder in earlier if folder.name != attempt.id],
        command=task.command,
        experiment=task.experiment,
        id=run_id,
        share=share,
        memory_gib=task.memory_gib,
    )


def _call(task: Task, run: StageRun, artifacts: dict[str, Artifact]) -> dict[str, Any]:
    stage = task.stage
    context = {"recipe": stage.recipe, "resources": task.resources, "out": run.attempt.out, "run": run}
    summary = stage.kind(**stage.kind.arguments(artifacts, **context))
    if isinstance(stage.recipe, BaseRecipe):
        _check_unchanged(stage.recipe.source, stage.digests.get("source"))
    if not stage.kind.gives(HeldOutDocuments) or "documents" not in stage.digests:
        return summary
    if summary["source_digest"] != stage.digests["documents"]:
        raise ValueError("the corpus' documents changed during the run: run again to use the current documents")
    return summary


def _check_unchanged(source: str, digest: str | None) -> None:
    """Raise ValueError if a base's folder is no longer what it was when the run was planned."""
    if digest and Path(source).is_dir() and model_digest(source) != digest:
        raise ValueError(f"{source} changed during the run: run again to use the current model")


def _record(task: Task, artifacts: dict[str, Artifact], summary: dict[str, Any], seconds: float) -> dict[str, Any]:
    inputs = {}
    for name, artifact in artifacts.items():
        inputs[name] = {"stage": artifact.stage, "fingerprint": artifact.fingerprint}
    return {
        "schema": 1,
        "label": task.stage.label,
        "identity": task.stage.identity,
        "inputs": inputs,
        "summary": summary,
        "seconds": seconds,
        "resources": task.resources.model_dump(mode="json"),
        "versions": known_versions(),
        "commit": git_commit(),
        "command": task.command,
        "run": Path(task.spool_folder).name,
        "host": platform.node(),
        "published_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
    }
