"""Stage `pretrain`: a tiny Llama from scratch, with or without a sink token first (arXiv:2309.17453, section 3.3).

longreach run quickstart
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from infra.artifact import Artifact
from infra.resources import Resources
from pipelines.finetune import places, run_job
from pipelines.stage import StageRun
from training.recipe import PretrainStageRecipe, TrainJob


def pretrain(
    corpus: Artifact, base: Artifact, *, recipe: PretrainStageRecipe, resources: Resources, out: Path, run: StageRun
) -> dict[str, Any]:
    """PackedCorpus (sink first in each row) -> ModelCheckpoint.

    The arm `none` reads the same rows without that column and leaves with the base's tokenizer, which adds no sink.
    """
    job = TrainJob(
        kind="pretrain",
        corpus=str(corpus.path),
        base=str(base.path),
        model=recipe.model,
        sink=recipe.arm.sink,
        optim=recipe.optim,
        seed=recipe.seed,
        resources=resources,
        **places(out, run),
    )
    return run_job(job, corpus, run)
