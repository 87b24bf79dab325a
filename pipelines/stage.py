"""A stage of a pipeline: its kind, choices and inputs, which determine its fingerprint.

    fingerprint = hash(stage name, stage revision, recipe section, input fingerprints, data digests)

Resources, store paths, hosts and commits are not part of it. Code is not hashed either: when a
change of the code changes a stage's result, raise its `revision` (pipelines/stages.py).
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
    """A stage with its choices and inputs: one node of a pipeline."""

    name: str  # the stage's key in STAGES
    label: str  # its displayed name, e.g. `finetune[lora]`: unique in a pipeline, not part of identity
    recipe: Choices  # the section of the recipe that changes its result
    inputs: Mapping[str, Stage] = field(default_factory=dict)
    """The stages whose artifacts it reads, by parameter of the function or by key of its
    Mapping."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Content digests of data from outside the store."""
    after: tuple[Stage, ...] = ()
    """Stages that must end before this one starts, without being inputs; not part of identity."""

    kind: StageKind = field(init=False)
    """The entry of STAGES, stored here so that it is pickled with the stage for the worker."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", STAGES[self.name])
        for name, source in self.inputs.items():
            fits = source.kind.gives(self.kind.type_of(name))
            assert fits, f"{source.label} does not make the type that {self.label} needs as {name}"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The plain data that is hashed; the manifest stores it, and `plan` compares it."""
        return {
            "stage": self.name,
            "revision": self.kind.revision,
            "recipe": self.recipe.identity(),
            "inputs": {name: stage.fingerprint for name, stage in self.inputs.items()},
            "digests": dict(self.digests),
        }

    @cached_property
    def fingerprint(self) -> str:
        """The identity's hash in 32 hex digits; ValueError if a choice has no unique JSON form."""
        return digest_of(self.identity)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle inputs as InputRef, not as whole upstream graphs."""
        inputs = {name: InputRef(one.name, one.fingerprint) for name, one in self.inputs.items()}
        computed = {"identity": self.identity, "fingerprint": self.fingerprint}
        return {**vars(self), **computed, "inputs": inputs, "after": ()}


@dataclass(frozen=True)
class InputRef:
    """What a worker needs to find an input's artifact in the store."""

    name: str  # the input's stage: its key in STAGES
    fingerprint: str


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return the leaves that differ between two identities: `recipe.arm.tune: lora -> all`."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{path}: {_short(old)} -> {_short(new)}"]
    lines = []
    for key in dict.fromkeys([*new, *old]):
        place = f"{path}.{key}" if path else key
        lines += differences(old.get(key), new.get(key), place)
    return lines


def _short(value: Any) -> str:
    text = str(value)
    if len(text) > 40:
        text = f"{text[:18]}…{text[-18:]}"
    return text
