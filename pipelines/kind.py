"""What all stages of one name share: a function, the type of what it makes, a revision, CPUs and
GPUs.

    @stage(makes=ModelCheckpoint, revision=1, cpus=lambda r: 1)
    def merge(base: ModelCheckpoint, adapter: AdapterCheckpoint, *, out: Path): ...

The parameters before the star are the stage's inputs. Each is given as the type that it names; a
parameter of the type `Mapping[str, T]` takes all inputs that have no parameter of their own, by
name. After the star it names what else it uses: its `recipe`, the `resources`, `out` for its files
and the `run`. It returns a summary: plain data for the manifest.
"""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    """What a running stage may use beside its inputs and choices."""

    label: str  # the stage's name in its pipeline, e.g. `finetune[lora]`.
    spool: Spool  # metrics and progress of this attempt
    attempt: Attempt  # `attempt.work` is private and survives until publication: checkpoints go there
    earlier: list[Path]
    """Folders of earlier unpublished attempts, newest first: to read checkpoints from, never to
    write."""
    command: str = ""
    experiment: str = "longreach"
    id: str = ""  # the attempt's own run, as its spool names it
    share: Share | None = None
    """How other nodes see this attempt; None: they share its disk, or there are none."""
    memory_gib: float = 0
    """About what all ranks, or one evaluation's process, will hold; 0: nothing is reserved."""

    def note(self, text: str) -> None:
        """Show the run's user a line, which MLflow keeps as well."""
        self.spool.tag("longreach.note", text)

    @property
    def storage(self) -> str:
        """A folder or URL that all ranks of this attempt see, for Ray Train's own records."""
        if self.share:
            return f"{self.share.root}/{self.share.folder}/work/ray"
        return str(self.attempt.work / "ray")


@dataclass(frozen=True)
class StageKind:
    """What all stages of one name share; calling it calls the function."""

    function: Callable[..., dict[str, Any]]  # writes the artifact's files and returns its summary
    makes: type[Artifact] | UnionType  # the artifact's type; a union where the choices decide which
    revision: int
    """Raised when the same choices would now give another result, since code is not
    fingerprinted."""
    cpus: Callable[[Resources], float]
    """Ray CPUs of the stage's task; 0 if it only drives ranks or tasks, which bring their own."""
    gpus: Callable[[Resources], float] = lambda resources: 0
    saves_when_stopped: bool = False
    """Whether it saves when the stop file appears, so that a run that is stopped waits for it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a name: the worker imports the module, so that no code travels."""
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
        """Whether what it makes may be an input of the type `wanted`."""
        made = typing.get_args(self.makes) or (self.makes,)
        return any(issubclass(one, wanted) for one in made)

    def arguments(self, artifacts: Mapping[str, Artifact], **context: Any) -> dict[str, Any]:
        """The function's inputs, each as the type that its parameter names, and what it uses of the
        context."""
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
    """Turn a function into a stage kind; the arguments are StageKind's other fields."""
    return lambda function: StageKind(function, **fields)


def stop_file(spool_folder: Path) -> Path:
    """Once this file exists, the training of this pipeline run writes a checkpoint and stops."""
    return spool_folder / "stop"


def _is_mapping(hint: Any) -> bool:
    return typing.get_origin(hint) is Mapping


def _imported(module: str, name: str) -> StageKind:
    return getattr(importlib.import_module(module), name)
