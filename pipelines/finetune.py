"""Stage `finetune`: one arm, from the stretched base, as DeepSpeed ranks on Ray Train. The story is training/loop.py.

longreach run quickstart
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longreach.infra.artifact import Artifact
from longreach.infra.launch import run_ranks
from longreach.infra.resources import Resources
from longreach.pipelines.stage import StageRun, stop_file
from longreach.training.recipe import FinetuneStageRecipe, TrainJob
from longreach.training.summary import PackSummary, TrainingSummary


def finetune(
    corpus: Artifact, base: Artifact, *, recipe: FinetuneStageRecipe, resources: Resources, out: Path, run: StageRun
) -> dict[str, Any]:
    """PackedCorpus + ModelCheckpoint -> AdapterCheckpoint (ModelCheckpoint where everything is tuned)."""
    job = TrainJob(
        kind="finetune",
        corpus=str(corpus.path),
        base=str(base.path),
        rope=recipe.rope,
        arm=recipe.arm,
        optim=recipe.optim,
        seed=recipe.seed,
        resources=resources,
        **places(out, run),
    )
    return run_job(job, corpus, run)


def places(out: Path, run: StageRun) -> dict[str, Any]:
    """Where a training job reads and writes, as TrainJob names it."""
    return {
        "out": str(out),
        "work": str(run.attempt.work),
        "earlier": tuple(str(folder / "work") for folder in run.earlier),
        "superseded_file": str(run.attempt.superseded_file),
        "stop_file": str(stop_file(run.spool.path.parent)),
        "spool": str(run.spool.path),
        "share": run.share,
    }


def run_job(job: TrainJob, corpus: Artifact, run: StageRun) -> dict[str, Any]:
    """Trains on the ranks that the job's resources ask for; returns the training's summary."""
    packed = PackSummary.model_validate(corpus.summary)
    if not packed.rows:
        held = ", ".join(f"{split} {n}" for split, n in packed.documents.items() if n)
        raise ValueError(f"corpus.validation and corpus.test hold out all documents ({held}): nothing to train on")
    run.spool.dataset(corpus.manifest["label"], corpus.fingerprint, job.corpus)
    for key, value in {"ranks": job.resources.workers, "zero_stage": job.resources.zero_stage}.items():
        run.spool.param(key, value)
    trained = run_ranks(
        "longreach.training.loop:train",
        job.model_dump(mode="json"),
        resources=job.resources,
        name="train",
        storage=f"{run.share.root}/{run.share.folder}/work/ray" if run.share else str(run.attempt.work / "ray"),
        share=run.share,
    )
    if run.share and not (run.attempt.out / TrainingSummary.file).exists():  # rank 0 was on another node
        run.share.pull(run.attempt.out)
    summary = TrainingSummary.model_validate(trained)
    costs = {
        "cost/wall_s": summary.wall_s,
        "cost/peak_gib": summary.peak_gib,
        "cost/tokens_per_s": summary.tokens_per_s,
        "cost/step_s": summary.step_s_median,
    }
    run.spool.metrics(costs, step=summary.steps)
    return summary.to_json()
