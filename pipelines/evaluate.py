"""Stage `evaluate`: one evaluation of one model -> EvalScores (scores.json, scores.parquet, cases.jsonl) and a PNG.

Attention is always full and causal here, whatever pattern the model was trained with (LongLoRA, section 3.2).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from evaluation import EVALS
from evaluation.documents import held_out
from evaluation.figures import save
from infra.artifact import Artifact
from infra.resources import Resources
from pipelines.graph import EvaluateStageRecipe
from pipelines.stage import StageRun
from training.model import load_model


def evaluate(
    model: Artifact, corpus: Artifact, *, recipe: EvaluateStageRecipe, resources: Resources, out: Path, run: StageRun
) -> dict[str, Any]:
    """Write the scores of a ModelCheckpoint on a PackedCorpus' held-out documents into `out`; returns their summary.

    Raises:
        ValueError: the corpus was tokenised for another model, or the evaluation refuses its choices.
        FloatingPointError: the model's logits are not finite.
    """
    torch.set_num_threads(resources.eval_cpus)
    network, tokenizer = load_model(model.path, rope=recipe.rope, dtype=resources.dtype)
    check_tokenizers(AutoTokenizer.from_pretrained(corpus.path / "tokenizer", local_files_only=True), tokenizer)
    network.eval()
    if resources.gpus_per_worker:
        torch.nn.Module.to(network, "cuda")  # transformers' own .cuda is decorated beyond what types can follow
    measure, draw = EVALS[recipe.eval].load()
    scores = measure(
        network,
        tokenizer,
        recipe=recipe.choices,
        documents=held_out(corpus.path / "documents"),
        progress=partial(run.spool.progress, unit="cell"),
    ).named(recipe.model)
    scores.write(out)
    run.spool.metrics({f"eval/{name}": value for name, value in scores.summary.items()})
    run.spool.table(out / "scores.json")
    run.spool.artifact(save(draw(scores), out / f"{recipe.eval}.png"), "figures")
    return {"eval": recipe.eval, "model": recipe.model, "rows": len(scores.rows)} | scores.summary


def check_tokenizers(corpus: PreTrainedTokenizerBase, model: PreTrainedTokenizerBase) -> None:
    """ValueError where a token of both has two ids; either may have more (a sink token)."""
    ours, theirs = corpus.get_vocab(), model.get_vocab()
    differ = [token for token, n in ours.items() if theirs.get(token, n) != n]
    if differ or abs(len(ours) - len(theirs)) > 16:
        raise ValueError(
            f"the corpus was tokenised with {len(ours)} tokens, the model has {len(theirs)}, and {len(differ)} of the "
            f"common ones have other ids: pack the documents with the model's own tokenizer"
        )
