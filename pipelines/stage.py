"""A stage of a pipeline: its kind, the choices that change its result, and its inputs; from these its fingerprint.

    fingerprint = hash(stage name, stage revision, recipe section, input fingerprints, data digests)

Literals are identity, context is not: resources, paths of the store, hosts and commits never enter. Code is not hashed
either; a stage whose meaning changes raises its `revision` (pipelines/stages.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from longreach.infra.choices import Choices
from longreach.infra.files import digest_of
from longreach.pipelines.kind import StageKind
from longreach.pipelines.stages import STAGES


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
    """The entry of STAGES, kept here so that the worker gets it with the stage."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", STAGES[self.name])
        for name, source in self.inputs.items():
            assert source.kind.gives(self.kind.type_of(name)), f"{source.label} is no {name} of {self.label}"

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
        """Pickle inputs as (name, fingerprint), not as whole upstream graphs."""
        inputs = {name: InputRef(stage.name, stage.fingerprint) for name, stage in self.inputs.items()}
        computed = {"identity": self.identity, "fingerprint": self.fingerprint}
        return {**vars(self), **computed, "inputs": inputs, "after": ()}


@dataclass(frozen=True)
class InputRef:
    """What a worker needs to find the artifact of an input in the store."""

    name: str
    """The input's stage: its key in STAGES."""
    fingerprint: str
    """The input's fingerprint."""


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
