"""Stage `evaluate`: one evaluation of one model -> EvalScores (scores.json, scores.parquet, cases.jsonl) and figures.

Each cell's result is kept in the attempt's folder as soon as it is known, so that an interrupted grid goes on where
it stopped. With `eval_workers` above 1 the cells are spread over so many Ray tasks, each with the model in its own
memory; a cell's result is the same wherever it is measured. Attention is always full and causal here, whatever pattern
the model was trained with (LongLoRA, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SerializeAsAny

from longreach.evaluation import EVALS
from longreach.evaluation.recipe import EvalRecipe
from longreach.infra.choices import Choices
from longreach.infra.resources import Resources
from longreach.infra.share import Share
from longreach.pipelines.artifacts import ModelCheckpoint, PackedCorpus, Scores
from longreach.pipelines.kind import StageRun, stage
from longreach.training.recipe import RopeRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from longreach.evaluation.cells import Result
    from longreach.evaluation.documents import Document


class EvaluateStageRecipe(Choices):
    """One evaluation of one model."""

    eval: str
    """Name in EVALS."""
    model: str
    """The model's name in the recipe; it stands in every row of the scores."""
    rope: RopeRecipe | None = None
    """A stretch applied while loading, for untrained baselines; None: as the folder says."""
    choices: SerializeAsAny[EvalRecipe]
    """The evaluation's own section."""


@stage(
    makes=Scores,
    revision=4,
    cpus=lambda resources: resources.eval_cpus if resources.eval_workers == 1 else 0,
    gpus=lambda resources: resources.gpus_per_worker if resources.eval_workers == 1 else 0,
)
def evaluate(
    model: ModelCheckpoint,
    corpus: PackedCorpus,
    *,
    recipe: EvaluateStageRecipe,
    resources: Resources,
    out: Path,
    run: StageRun,
) -> dict[str, Any]:
    """Write the scores of a ModelCheckpoint on a PackedCorpus' held-out documents into `out`; returns their summary.

    Raises:
        ValueError: the corpus was tokenised for another model, the evaluation refuses its choices, or a prompt's keys
            and values do not fit into memory.
        FloatingPointError: the model's logits are not finite.
    """
    from longreach.evaluation.cells import CellFolder, measured
    from longreach.evaluation.figures import save

    code = EVALS[recipe.eval].load()
    check_memory(model.path, recipe, resources)
    spread = resources.eval_workers > 1  # then the tasks have the GPUs
    here = resources.model_copy(update={"gpus_per_worker": 0}) if spread else resources
    network, tokenizer, documents = _subject(model, corpus, recipe, here)
    cells = code.cells(network, tokenizer, recipe=recipe.choices, documents=documents)
    folder = CellFolder(
        run.attempt.work / "cells",
        (earlier / "work" / "cells" for earlier in run.earlier),
        setting=f"{resources.dtype}, GPUs: {resources.gpus_per_worker}",
    )
    found = folder.known(cells)
    run.spool.progress(len(found), len(cells), unit="cell")
    todo = {n: cell for n, cell in enumerate(cells) if n not in found}
    if spread:
        del network, documents
        results = _spread(model, corpus, recipe, resources, todo, run.share)
    else:
        results = measured(recipe.eval, network, tokenizer, recipe=recipe.choices, documents=documents, todo=todo)
    for n, result in results:
        found[n] = result
        folder.keep(n, cells[n], result)
        run.spool.progress(len(found), len(cells), unit="cell")
    scores = code.collect(recipe.choices, [(cell, found[n]) for n, cell in enumerate(cells)]).named(recipe.model)
    scores.write(out)
    run.spool.metrics({f"eval/{name}": value for name, value in scores.summary.items()})
    run.spool.table(out / "scores.json")
    run.spool.artifact(save(code.figure(scores), out, recipe.eval), "figures")
    run.spool.artifact(out / f"{recipe.eval}.html", "figures")
    return {"eval": recipe.eval, "model": recipe.model, "rows": len(scores.rows)} | scores.summary


def _subject(
    model: ModelCheckpoint, corpus: PackedCorpus, recipe: EvaluateStageRecipe, resources: Resources
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[Document]]:
    """The model, ready to be asked, its tokenizer and the held-out documents."""
    import torch
    from transformers import AutoTokenizer

    from longreach.evaluation.documents import held_out
    from longreach.training.model import load_model

    torch.set_num_threads(resources.eval_cpus)
    network, tokenizer = load_model(model.path, rope=recipe.rope, dtype=resources.dtype)
    check_tokenizers(AutoTokenizer.from_pretrained(corpus.path / "tokenizer", local_files_only=True), tokenizer)
    network.eval()
    if resources.gpus_per_worker:
        torch.nn.Module.to(network, "cuda")  # transformers' own .cuda is decorated beyond what types can follow
    return network, tokenizer, held_out(corpus.path / "documents")


def _spread(
    model: ModelCheckpoint,
    corpus: PackedCorpus,
    recipe: EvaluateStageRecipe,
    resources: Resources,
    todo: dict[int, Any],
    share: Share | None,
) -> Iterator[tuple[int, Result]]:
    """Results of the cells as tasks yield them. Cells are dealt in turn, so that long ones are shared fairly."""
    import ray

    numbers, tasks = list(todo), min(resources.eval_workers, len(todo))
    parts = [{n: todo[n] for n in numbers[task::tasks]} for task in range(tasks)]
    task = ray.remote(_share).options(
        num_cpus=resources.eval_cpus, num_gpus=resources.gpus_per_worker, num_returns="streaming"
    )
    running: list[Any] = [task.remote(model, corpus, recipe, resources, part, share) for part in parts]
    try:
        while running:
            ready: list[Any] = ray.wait(running, num_returns=1)[0]
            try:
                found: Any = ray.get(next(ready[0]))
            except StopIteration:
                running.remove(ready[0])
                continue
            yield found
    finally:  # one has failed, or nobody wants the rest
        for left in running:
            ray.cancel(left)


def _share(
    model: ModelCheckpoint,
    corpus: PackedCorpus,
    recipe: EvaluateStageRecipe,
    resources: Resources,
    todo: dict[int, Any],
    share: Share | None,
) -> Iterator[tuple[int, Result]]:
    """What one task of `_spread` does, on whichever node."""
    from longreach.evaluation.cells import measured

    if share:
        share.bring()
        model = replace(model, path=Path(share.here(str(model.path))))
        corpus = replace(corpus, path=Path(share.here(str(corpus.path))))
    network, tokenizer, documents = _subject(model, corpus, recipe, resources)
    yield from measured(recipe.eval, network, tokenizer, recipe=recipe.choices, documents=documents, todo=todo)


def check_memory(folder: Path, recipe: EvaluateStageRecipe, resources: Resources) -> None:
    """ValueError if the weights and the keys and values of the longest prompt do not fit into what is free."""
    import psutil
    import torch
    from transformers import AutoConfig

    from longreach.attention.kv_budget import KVBudget, readable

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    lengths = [*(getattr(recipe.choices, "lengths", None) or [getattr(recipe.choices, "tokens", 0)])]
    if not (longest := max(lengths)):
        return
    try:
        dtype = "bf16" if resources.dtype == "bfloat16" else "fp32"
        cache = KVBudget.of(config).bytes(1, longest, dtype)
    except ValueError:  # it keeps something else than keys and values, which is smaller
        cache = 0
    hidden = 2 * longest * (config.hidden_size + getattr(config, "intermediate_size", config.hidden_size)) * 4
    half = ("torch.bfloat16", "torch.float16")
    grown = (2 if resources.dtype == "bfloat16" else 4) / (2 if str(config.dtype) in half else 4)
    weights = int(grown * sum(path.stat().st_size for path in folder.glob("*.safetensors")))
    free = torch.cuda.mem_get_info()[0] if resources.gpus_per_worker else psutil.virtual_memory().available
    if (need := (cache + hidden + weights) * (1 if resources.gpus_per_worker else resources.eval_workers)) > free:
        raise ValueError(
            f"{recipe.eval} at {longest:,} tokens needs about {readable(need)} for weights, keys and values "
            f"({resources.eval_workers} at once), {readable(free)} is free: lower the length or resources.eval_workers"
        )


def check_tokenizers(corpus: PreTrainedTokenizerBase, model: PreTrainedTokenizerBase) -> None:
    """ValueError where a token of both has two ids; either may have more (a sink token)."""
    ours, theirs = corpus.get_vocab(), model.get_vocab()
    differ = [token for token, n in ours.items() if theirs.get(token, n) != n]
    if differ or abs(len(ours) - len(theirs)) > 16:
        raise ValueError(
            f"the corpus was tokenised with {len(ours)} tokens, the model has {len(theirs)}, and {len(differ)} of the "
            f"common ones have other ids: pack the documents with the model's own tokenizer"
        )
