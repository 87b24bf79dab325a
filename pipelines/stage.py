"""A stage: a function, the choices that change its result, and its inputs; and from these its fingerprint.

    fingerprint = hash(stage name, stage revision, recipe section, input fingerprints, data digests)

Literals are identity, context is not: resources, paths of the store, hosts and commits never enter. Code is not hashed
either; a stage whose meaning changes raises its `revision` here.

To add a stage: a file with its recipe model and its function, one line in STAGES, and its place in pipelines/graph.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from longreach.infra.artifact import Attempt
from longreach.infra.choices import Choices
from longreach.infra.files import digest_of
from longreach.infra.resources import Resources
from longreach.infra.share import Share
from longreach.infra.tracking import Spool


@dataclass(frozen=True)
class StageKind:
    """What all stages of a name share."""

    function: str
    """`module:function`, imported only where it runs."""
    revision: int
    """Raised when the same choices would now give another result."""
    cpus: Callable[[Resources], float]
    """Ray CPUs of the stage's task; 0 for those that only drive ranks or tasks, which bring their own."""
    gpus: Callable[[Resources], float] = lambda r: 0
    """Ray GPUs of the stage's task."""


STAGES: dict[str, StageKind] = {
    "convert": StageKind("longreach.pipelines.convert:convert", 1, lambda r: 1),
    "tokenizer": StageKind("longreach.pipelines.pretrain:tokenizer", 1, lambda r: 1),
    "pack": StageKind("longreach.pipelines.pack:pack", 3, lambda r: 1),
    "pretrain": StageKind("longreach.pipelines.pretrain:pretrain", 2, lambda r: 0),
    "finetune": StageKind("longreach.pipelines.finetune:finetune", 1, lambda r: 0),
    "merge": StageKind("longreach.pipelines.merge:merge", 1, lambda r: 1),
    "evaluate": StageKind(
        "longreach.pipelines.evaluate:evaluate",
        4,
        cpus=lambda r: r.eval_cpus if r.eval_workers == 1 else 0,
        gpus=lambda r: r.gpus_per_worker if r.eval_workers == 1 else 0,
    ),
    "release": StageKind("longreach.pipelines.release:release", 1, lambda r: 1),
    "promote": StageKind("longreach.pipelines.gate:promote", 1, lambda r: 1),
    "report": StageKind("longreach.pipelines.report.report:report", 2, lambda r: 1),
}


@dataclass(frozen=True, eq=False)
class Stage:
    """One node of a pipeline."""

    name: str
    """Its key in STAGES."""
    label: str
    """What people call it, e.g. `finetune[lora]`: unique in a pipeline, and no part of identity."""
    recipe: Choices
    """The section of the recipe that changes its result."""
    inputs: Mapping[str, Stage] = field(default_factory=dict)
    """By the name of the function's parameter."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Content digests of data that comes from outside of the store."""
    after: tuple[Stage, ...] = ()
    """Stages that must not run at the same time and go first; no part of identity."""

    kind: StageKind = field(init=False)
    """Looked up once, so that it travels to the worker with the stage."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", STAGES[self.name])

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that the fingerprint is made of, readable: the manifest keeps it, `plan` compares it."""
        return {
            "stage": self.name,
            "revision": self.kind.revision,
            "recipe": self.recipe.model_dump(mode="json"),
            "inputs": {name: stage.fingerprint for name, stage in self.inputs.items()},
            "digests": dict(self.digests),
        }

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits.

        Raises:
            ValueError: a choice has no one serialisation.
        """
        return digest_of(self.identity)

    def __getstate__(self) -> dict[str, Any]:
        """As it travels to a worker: of its inputs what finds them, lest the whole pipeline before it goes along."""
        inputs = {name: Made(stage.name, stage.fingerprint) for name, stage in self.inputs.items()}
        known = {"identity": self.identity, "fingerprint": self.fingerprint}
        return {**vars(self), **known, "inputs": inputs, "after": ()}


@dataclass(frozen=True)
class Made:
    """What a worker needs to know of a stage before its own."""

    name: str
    fingerprint: str


@dataclass(frozen=True)
class StageRun:
    """What a running stage may use beside its inputs and choices."""

    label: str
    spool: Spool
    """Metrics and progress of this attempt."""
    attempt: Attempt
    """`attempt.work` is private and survives until publication: checkpoints go there."""
    earlier: list[Path]
    """Folders of earlier unpublished attempts, newest first: their checkpoints may be read, never written."""
    command: str = ""
    """What the user said to get this run."""
    experiment: str = "longreach"
    """MLflow's."""
    id: str = ""
    """The attempt's own run, as its spool names it."""
    share: Share | None = None
    """How other nodes see this attempt; None: they share its disk, or there are none."""


def stop_file(spool_folder: Path) -> Path:
    """Once it exists, the training of this pipeline run writes a checkpoint and stops."""
    return spool_folder / "stop"


def load_function(kind: StageKind) -> Callable[..., dict[str, Any]]:
    """Import a stage's function."""
    module, _, name = kind.function.partition(":")
    return getattr(importlib.import_module(module), name)


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Leaves in which two identities differ: `recipe.arm.learning_rate: 0.001 -> 0.002`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*new, *(key for key in old if key not in new)]
        return [
            line for key in keys for line in differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if old == new else [f"{path}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:18] + "…" + text[-18:]
