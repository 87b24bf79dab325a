"""What a run would do, and which stages are done.

Manifests decide: a stage is done if its fingerprint is published and its files match the manifest.

    for row in plan(load("quickstart")): print(row.stage, row.state, row.why)
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from longreach.infra.artifact import Artifact, Store
from longreach.infra.errors import CorruptArtifact
from longreach.infra.mlflow_store import check_tracking_uri, sqlite_path, tracking_uri
from longreach.pipelines.foresee import Forecast, foresee, no_room, this_node
from longreach.pipelines.graph import build
from longreach.pipelines.hand_over import check_base, check_token
from longreach.pipelines.reader import Loaded
from longreach.pipelines.recipe import Recipe
from longreach.pipelines.stage import Stage, differences

State = Literal["done", "stale", "run"]
Manifests = dict[str, dict[str, Any]]

TRACKING = "MLFLOW_TRACKING_URI"
MAX_CHANGES = 3  # maximum number of changes that a plan lists for one stage


@dataclass(frozen=True)
class PlanRow:
    """What a run would do with a stage."""

    stage: str
    state: State  # done: published and intact; stale: published with other choices, or damaged; run: never run
    why: str  # the reason to run it; empty if it is done
    fingerprint: str
    seconds_last: float | None  # seconds that its newest artifact took to make
    foreseen: Forecast | None = None  # forecast cost of a stage that trains
    no_room: str = ""  # why this machine can never run it; empty if it can, or if the plan is for a cluster


def open_store(loaded: Loaded) -> Store:
    """Open the recipe's store and check that it can be read; a relative root is in the current
    folder."""
    recipe = loaded.recipe.store
    root = recipe.root
    if "://" not in root:
        root = str(Path(root).absolute())
    return Store(root, Path(recipe.workdir).absolute() / "scratch").checked()


@contextmanager
def use_tracking(loaded: Loaded) -> Iterator[str]:
    """Set MLflow's URI: the recipe's, else the environment's, else that of the embedded store."""
    uri = tracking_uri(loaded.recipe.tracking.uri, loaded.recipe.store.workdir)
    before = os.environ.get(TRACKING)
    os.environ[TRACKING] = uri
    try:
        yield uri
    finally:
        os.environ.pop(TRACKING)
        if before is not None:
            os.environ[TRACKING] = before


def check_rules(recipe: Recipe, *, cluster: str = "", driver_here: bool = True) -> None:
    """Raise ValueError for what every run refuses before it starts, in addition to what `build`
    finds.

    Every command that runs, submits or schedules a recipe calls this. If only `run` checked a rule,
    a scheduled run would be the first to report that it is broken.

    Args:
        cluster: Description of the cluster; empty if this machine runs everything.
        driver_here: The driver has this process's environment. If not, its tokens and MLflow URI
            are unknown here, and the base is checked now, since such a caller may not call `build`.
    """
    _check_rows(recipe)
    uri = recipe.tracking.uri and check_tracking_uri(recipe.tracking.uri)
    if driver_here:
        uri = tracking_uri(uri, recipe.store.workdir)
    if cluster:
        _check_registry(recipe, cluster, uri)
    elif driver_here and "harness" in recipe.evaluate.chosen() and importlib.util.find_spec("lm_eval") is None:
        raise ValueError("evaluate.harness: lm-evaluation-harness is not installed: pip install 'longreach[eval]'")
    if driver_here:
        check_token(recipe)
    else:
        check_base(recipe)


def _check_rows(recipe: Recipe) -> None:
    """Raise ValueError if an arm's rows are longer than its stretched base, where the base's length
    is known before it is converted."""
    finetune, trained = recipe.finetune, recipe.trained_length()
    if finetune is None or trained is None:
        return
    for name, arm in finetune.every_arm().items():
        try:
            finetune.rope_of(arm).check_row(arm.longest_row(finetune.pack.seq_len, finetune), trained)
        except ValueError as error:
            raise ValueError(f"finetune.pack.seq_len of arm {name}: {error}") from None


def notes(recipe: Recipe) -> list[str]:
    """Return warnings about a valid recipe that probably does not do what its author meant."""
    said = []
    for name, section in {"finetune": recipe.finetune, "pretrain": recipe.pretrain}.items():
        note = section.warmup_note() if section else ""
        if note:
            said.append(f"{name}.{note}")
    return said + _equal_arms(recipe)


def _equal_arms(recipe: Recipe) -> list[str]:
    """Return a warning for each arm that is equal to an earlier one of its section."""
    sections: dict[str, dict[str, BaseModel]] = {"pretrain": {**recipe.pretrained_arms()}, "finetune": {}}
    if recipe.finetune:
        for name, arm in recipe.finetune.every_arm().items():
            sections["finetune"][name] = arm.model_copy(update={"rope": recipe.finetune.rope_of(arm)})
    said = []
    for section, arms in sections.items():
        first: dict[str, str] = {}
        for name, choices in arms.items():
            other = first.setdefault(choices.model_dump_json(), name)
            if other != name:
                said.append(f"{section}.arms: {name} equals {other}, so both are the same model, trained once")
    return said


def check_scheduled(recipe: Recipe, *, driver_here: bool) -> None:
    """Raise ValueError for what a later run on this machine would refuse.

    Args:
        driver_here: False if the run gets its keys and addresses from a file, so that sources that
            need them cannot be checked here.
    """
    check_rules(recipe, driver_here=driver_here)
    if driver_here:
        nodes = [this_node(recipe.resources)]
        for stage in build(recipe, gated=False):  # ungated: the champion may change before the run
            if refusal := no_room(stage, recipe.resources, nodes):
                raise ValueError(refusal)


def _check_registry(recipe: Recipe, where: str, uri: str | None) -> None:
    """Raise ValueError if each node of a cluster would use its own model registry.

    Args:
        uri: MLflow's URI; None if only the nodes' environment could set it.
    """
    uses_registry = recipe.promote or recipe.base.source.startswith("models:/")
    if uses_registry and (uri is None or sqlite_path(uri)):
        raise ValueError(
            f"on {where} every node would use its own model registry in {uri or 'its own folder'}: "
            f"set tracking.uri to an MLflow server that all nodes can reach"
        )


def plan(loaded: Loaded, *, here: bool = False, gated: bool = True) -> list[PlanRow]:
    """Return what `run` would do. Checks only that files exist with the right size; `run` also
    hashes them.

    Args:
        here: The run would be on this machine. If nothing has trained here yet, measure the
            machine's speed for the forecast.
        gated: If False, leave out the gate's stages and do not ask the registry for the champion.
    """
    store = open_store(loaded)
    with use_tracking(loaded):
        stages = build(loaded.recipe, gated=gated, published=functools.partial(published, store))
    resources = loaded.recipe.resources
    costs = foresee(store, stages, resources, trying=here)
    newest = functools.cache(functools.partial(_newest, store))
    nodes = [this_node(resources)] if here else []
    rows = []
    for stage in stages:
        row, _ = _examine(store, stage, newest, hashes=False)
        refusal = no_room(stage, resources, nodes) if here and row.state != "done" else ""
        rows.append(replace(row, foreseen=costs.get(row.stage), no_room=refusal))
    return rows


def published(store: Store, stage: Stage) -> Artifact | None:
    """Return a stage's published artifact; None if it is missing or damaged, so that the stage
    reruns."""
    try:
        return store.find(stage.name, stage.fingerprint)
    except CorruptArtifact:
        return None


def survey(store: Store, stages: list[Stage], known: dict[str, Artifact], *, repair: bool) -> dict[str, Artifact]:
    """Return the artifacts of the finished stages by label. Files of `known` ones are not checked
    again, but one that is gone or was remade since is not taken from `known`.

    In a local store every byte is read. In a remote store only names and sizes are compared,
    because workers verify what they use. `repair` quarantines damaged artifacts, so that their
    stages rerun.
    """
    artifacts = {}
    for stage in stages:
        if before := known.get(stage.label):
            now = published(store, stage)
            if now and now.attempt == before.attempt:
                artifacts[stage.label] = before
                continue
        row, artifact = _examine(store, stage, lambda name: {}, hashes=store.local)
        if artifact:
            artifacts[stage.label] = artifact
            continue
        manifest = f"{store.base}/{stage.name}/{stage.fingerprint}/artifact.json"
        if repair and store.fs.exists(manifest):
            aside = store.quarantine(stage.name, stage.fingerprint)
            if aside:
                print(f"{stage.label}: {row.why}: moved to {aside}", file=sys.stderr)
    return artifacts


def _newest(store: Store, name: str) -> Manifests:
    manifests: Manifests = {}
    for manifest in store.manifests(name):
        label = manifest["label"]
        if label not in manifests or manifest["published_at"] > manifests[label]["published_at"]:
            manifests[label] = manifest
    return manifests


def _examine(
    store: Store, stage: Stage, newest: Callable[[str], Manifests], *, hashes: bool
) -> tuple[PlanRow, Artifact | None]:
    """Return a stage's row, and its artifact if it is done.

    Args:
        newest: Returns the newest manifests of a stage name, by label.
    """

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
    last = newest(stage.name).get(stage.label)
    if last is None:
        return row("run", "never run", None), None
    changes = [in_words(stage, change) for change in differences(last["identity"], stage.identity)]
    if len(changes) > MAX_CHANGES + 1:  # "and 1 more changes" would be as long as the change itself
        changes[MAX_CHANGES:] = [f"and {len(changes) - MAX_CHANGES} more changes"]
    return row("stale", "; ".join(changes), last["seconds"]), None


def in_words(stage: Stage, change: str) -> str:
    """Say what a difference between identities means, if it is an input that changes, or a stage
    that had failed when the last report was made; others are returned as they are."""
    name = change.split(":")[0]
    if name.startswith("recipe.failed."):
        return f"{name.removeprefix('recipe.failed.')} had failed"
    name = name.removeprefix("inputs.")
    return f"its input {stage.inputs[name].label} changes" if name in stage.inputs else change
