"""Cheap stages for tests of the runner. They record their calls in a folder that the test names."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longreach.infra.artifact import Artifact
from longreach.infra.choices import Choices
from longreach.pipelines.kind import StageRun, stage


class ToyRecipe(Choices):
    """The choices of a toy stage."""

    text: str = ""
    log: str = ""
    """Folder in which each call leaves a file."""
    fail: str = ""
    """Raise a ValueError with this message."""
    seconds: float = 0.0
    waits: float = 0.0
    """Seconds of these that it says it waited for other stages."""
    kill_self_once: bool = False
    """Kill the stage's own process with SIGKILL, the first time."""


def calls(log: Path, name: str) -> int:
    return len(list(log.glob(f"{name}-*")))


@stage(makes=Artifact, revision=1, cpus=lambda resources: 0.5)
def toy(
    inputs: Mapping[str, Artifact], *, recipe: ToyRecipe, resources: Any, out: Path, run: StageRun
) -> dict[str, Any]:
    """Write the texts of the inputs, and the stage's own text."""
    log = Path(recipe.log)
    (log / f"{run.label}-{uuid.uuid4().hex}").touch()
    if recipe.kill_self_once and calls(log, run.label) == 1:
        (run.attempt.work / "checkpoint").write_text("half done")
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(int(recipe.seconds * 20)):
        time.sleep(0.05)
        run.spool.progress(1, 2)
    run.waits_s.append(recipe.waits)
    if recipe.fail:
        raise ValueError(recipe.fail)
    checkpoints = [folder / "work/checkpoint" for folder in run.earlier]
    resumed = [path.read_text() for path in checkpoints if path.exists()]
    (out / "text").write_text(
        "".join((artifact.path / "text").read_text() for artifact in inputs.values()) + recipe.text
    )
    run.spool.metrics({"toy/length": len(recipe.text)}, step=1)
    return {"text": recipe.text, "resumed": resumed}


@stage(makes=Artifact, revision=1, cpus=lambda resources: 0.5)
def toy_report(
    inputs: Mapping[str, Artifact], *, recipe: Any, resources: Any, out: Path, run: StageRun
) -> dict[str, Any]:
    """Do what `toy` does, or write the report of a run in which something failed, which names the failures."""
    if isinstance(recipe, ToyRecipe):
        return toy(inputs, recipe=recipe, resources=resources, out=out, run=run)
    if "unspeakable" in str(recipe.failed):
        raise ValueError("the report cannot say that")
    (out / "report.html").write_text(str(recipe.failed))
    return {"failed": recipe.failed, "labels": list(inputs)}
