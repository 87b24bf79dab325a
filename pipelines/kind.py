"""Stage kinds: what all stages of one name share, as function, artifact type, revision, CPUs and
GPUs.

    @stage(makes=ModelCheckpoint, revision=1, cpus=lambda r: 1)
    def merge(base: ModelCheckpoint, adapter: AdapterCheckpoint, *, out: Path): ...

The parameters before the star are the stage's inputs. Each is passed as its annotated type. A
parameter of type `Mapping[str, T]` takes all inputs without a parameter of their own, by name.
After the star come the other arguments that the function uses: its `recipe`, the `resources`, `out`
(the folder for its files) and the `run`. The function returns a summary: plain data for the
manifest.
"""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any

from longreach.infra.artifact import Artifact, Attempt
from longreach.infra.resources import Resources
from longreach.infra.share import Share
from longreach.infra.tracking import Spool


@dataclass(frozen=True)
class StageRun:
    """What a running stage may use in addition to its inputs and choices."""

    label: str  # the stage's name in its pipeline, e.g. `finetune[lora]`
    spool: Spool  # for metrics and progress of this attempt
    attempt: Attempt  # `attempt.work` is private and is kept until publication: checkpoints go there
    earlier: list[Path]
    """Folders of earlier unpublished attempts, newest first, to read checkpoints from;
    read-only."""
    command: str = ""
    experiment: str = "longreach"
    id: str = ""  # id of the attempt's MLflow run, as in its spool
    share: Share | None = None
    """How other nodes access this attempt; None if they share its disk, or if there are none."""
    memory_gib: float = 0
    """Estimated memory of all ranks, or of one evaluation process; 0 if nothing is reserved."""
    waits_s: list[float] = field(default_factory=list)
    """Seconds that its ranks waited for other stages to free resources. They are not part of the
    stage's own time."""

    def note(self, text: str) -> None:
        """Show the user a line of text, which MLflow stores too."""
        self.spool.tag("longreach.note", text)

    @property
    def storage(self) -> str:
        """Folder or URL for Ray Train's own records that all ranks of this attempt can access."""
        if self.share:
            return f"{self.share.root}/{self.share.folder}/work/ray"
        return str(self.attempt.work / "ray")


@dataclass(frozen=True)
class StageKind:
    """What all stages of one name share; calling it calls the function."""

    function: Callable[..., dict[str, Any]]  # writes the artifact's files and returns its summary
    makes: type[Artifact] | UnionType  # the artifact's type; a union if it depends on the choices
    revision: int
    """Raise it when a change of the code gives another result for the same choices, because code is
    not part of the fingerprint."""
    cpus: Callable[[Resources], float]
    """Ray CPUs of the stage's task; 0 if it only starts ranks or tasks, which reserve their own."""
    gpus: Callable[[Resources], float] = lambda resources: 0
    saves_when_stopped: bool = False
    """Whether the stage saves when the stop file appears; a stopping run waits for such stages."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle only the function's name; the worker imports the module."""
        return _imported, (self.function.__module__, self.function.__qualname__)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        hints = typing.get_type_hints(self.function)
        parameters = inspect.signature(self.function).parameters.values()
        positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return {one.name: hints[one.name] for one in parameters if one.kind == positional}

    def type_of(self, name: str) -> type[Artifact]:
        if name in self.inputs:
            return self.inputs[name]
        mappings = [hint for hint in self.inputs.values() if _is_mapping(hint)]
        assert mappings, f"{self.function.__qualname__} has no parameter for its input {name!r}"
        return typing.get_args(mappings[0])[1]

    def gives(self, wanted: type[Artifact]) -> bool:
        """Whether the artifact can be an input of type `wanted`."""
        made = typing.get_args(self.makes) or (self.makes,)
        return any(issubclass(one, wanted) for one in made)

    def arguments(self, artifacts: Mapping[str, Artifact], **context: Any) -> dict[str, Any]:
        """Return the function's arguments: inputs as the annotated types, and the context that it
        uses."""
        named = inspect.signature(self.function).parameters
        arguments = {name: value for name, value in context.items() if name in named}
        rest = {}
        for name, artifact in artifacts.items():
            typed = self.type_of(name)(artifact.path, artifact.manifest)
            if name in self.inputs:
                arguments[name] = typed
            else:
                rest[name] = typed
        for parameter, hint in self.inputs.items():
            if _is_mapping(hint):
                arguments[parameter] = rest
        return arguments


def stage(**fields: Any) -> Callable[[Callable[..., dict[str, Any]]], StageKind]:
    """Decorate a function to make a StageKind; `fields` are StageKind's other fields."""
    return lambda function: StageKind(function, **fields)


def stop_file(spool_folder: Path) -> Path:
    """Return the stop file: once it exists, this run's training writes a checkpoint and stops."""
    return spool_folder / "stop"


def _is_mapping(hint: Any) -> bool:
    return typing.get_origin(hint) is Mapping


def _imported(module: str, name: str) -> StageKind:
    return getattr(importlib.import_module(module), name)
