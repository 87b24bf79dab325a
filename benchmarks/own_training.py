"""Run longreach's training as a stage does: through Ray Train and DeepSpeed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longreach.infra.launch import run_ranks
from longreach.infra.resources import Resources
from longreach.training.recipe import ArmRecipe, OptimRecipe, TrainJob
from longreach.training.summary import TrainingSummary


@dataclass(frozen=True)
class Trained:
    """The result of a training."""

    steps: list[dict[str, Any]]
    """The rows of metrics.jsonl, one per step."""
    summary: TrainingSummary


def train(corpus: Path, base: Path, place: Path, arm: ArmRecipe, optim: OptimRecipe, resources: Resources) -> Trained:
    """Train the model in `base` on packed rows, with all files in `place`. Ray must be connected."""
    job = TrainJob(
        kind="finetune",
        corpus=str(corpus),
        base=str(base),
        arm=arm,
        optim=optim,
        seed=0,
        resources=resources,
        out=str(place / "out"),
        work=str(place / "work"),
        superseded_file=str(place / "superseded"),
    )
    function, choices = "longreach.training.loop:train", job.model_dump(mode="json")
    run_ranks(function, choices, resources=resources, name="train", storage=place / "ray")
    rows = [json.loads(line) for line in (place / "out" / "metrics.jsonl").read_text().splitlines()]
    return Trained(rows, TrainingSummary.read(place / "out"))
