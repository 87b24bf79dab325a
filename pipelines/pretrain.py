"""Stages `tokenizer` and `pretrain`: a Llama from scratch, or the base again, with one attention sink or another.

    longreach run sink-lab

The sinks are those of StreamingLLM (arXiv:2309.17453, section 3.3), and gpt-oss's learned logit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longreach.infra.artifact import Artifact
from longreach.infra.resources import Resources
from longreach.pipelines.finetune import places, run_job
from longreach.pipelines.stage import StageRun
from longreach.training.recipe import PretrainStageRecipe, TokenizerRecipe, TrainJob
from longreach.training.tokenizer import train_tokenizer


def tokenizer(*, recipe: TokenizerRecipe, resources: Resources, out: Path, run: StageRun) -> dict[str, Any]:
    """The corpus' training documents -> a tokenizer folder."""
    return train_tokenizer(recipe.corpus, recipe.vocab_size, out, base_dir=Path.cwd())


def pretrain(
    corpus: Artifact, base: Artifact, *, recipe: PretrainStageRecipe, resources: Resources, out: Path, run: StageRun
) -> dict[str, Any]:
    """PackedCorpus (sink first in each row) -> ModelCheckpoint.

    Arms without a sink token read the same rows without it and leave with the tokenizer that adds none.
    """
    job = TrainJob(
        kind="pretrain",
        corpus=str(corpus.path),
        base=str(base.path),
        model=recipe.model,
        sink=recipe.arm.sink,
        sink_mass_every=recipe.sink_mass_every,
        optim=recipe.optim,
        seed=recipe.seed,
        resources=resources,
        **places(out, run),
    )
    return run_job(job, corpus, run)
