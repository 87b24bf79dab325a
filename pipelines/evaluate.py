"""Stage `evaluate`: one evaluation of one model -> EvalScores (scores.json, scores.parquet,
cases.jsonl) and figures.

Each cell's result is saved in the attempt's folder as soon as it is known, so that an interrupted
grid resumes where it stopped. With `eval_workers` above 1, that many Ray tasks share the cells,
each with the model in its own memory; a cell's result does not depend on the task. Attention is
always full and causal here, whatever pattern the model was trained with (LongLoRA, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SerializeAsAny

from longreach.evaluation import EVALS
from longreach.evaluation.base import Background, Cell, EvalChoices, Evaluation, Result
from longreach.infra.choices import Choices
from longreach.infra.machine import usable_memory
from longreach.infra.resources import Resources
from longreach.infra.share import Share
from longreach.pipelines.artifacts import HeldOutDocuments, ModelCheckpoint, Scores
from longreach.pipelines.kind import StageRun, stage
from longreach.training.recipe import RopeRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from longreach.evaluation.scores import EvalScores
    from longreach.infra.tracking import Spool


class EvaluateStageRecipe(Choices):
    """One evaluation of one model."""

    eval: str
    """Name in EVALS."""
    model: str
    """The model's name in the recipe, which is in every row of the scores."""
    rope: RopeRecipe | None = None
    """A stretch to apply on loading, for untrained baselines; None to use the folder's config."""
    choices: SerializeAsAny[EvalChoices]
    """The evaluation's section of the recipe."""

    def identity(self, include: set[str] | None = None) -> dict[str, Any]:
        """Return the JSON to fingerprint, with the evaluation's revision if that is not 0."""
        identity = super().identity(include)
        if revision := EVALS[self.eval].revision:
            identity["revision"] = revision
        return identity


@dataclass(frozen=True)
class Job:
    """Everything that a task on any node needs to measure cells."""

    model: ModelCheckpoint
    corpus: HeldOutDocuments
    recipe: EvaluateStageRecipe
    resources: Resources
    share: Share | None = None
    """How a task on another node accesses model and corpus; None if all nodes share one disk."""

    def load(self) -> Evaluation:
        """Return the evaluation with the model, its tokenizer and the held-out documents in
        memory."""
        import torch
        from transformers import AutoTokenizer

        from longreach.evaluation.documents import held_out
        from longreach.training.model import load_model

        self.resources.prepare_torch(self.resources.eval_cpus)
        model, tokenizer = load_model(self.model.path, rope=self.recipe.rope, dtype=self.resources.dtype)
        of_corpus = AutoTokenizer.from_pretrained(self.corpus.path / "tokenizer", local_files_only=True)
        check_tokenizers(of_corpus, tokenizer)
        model.eval()
        if self.resources.gpus_per_worker:
            torch.nn.Module.to(model, "cuda")  # the type checker cannot follow transformers' decorated .cuda
        documents = held_out(self.corpus.path / "documents")
        return EVALS[self.recipe.eval](model, tokenizer, self.recipe.choices, documents)

    def on_this_node(self) -> Job:
        """Fetch the inputs to this node, and return the job with their paths here."""
        if not self.share:
            return self
        self.share.bring()
        model = replace(self.model, path=Path(self.share.here(str(self.model.path))))
        corpus = replace(self.corpus, path=Path(self.share.here(str(self.corpus.path))))
        return replace(self, model=model, corpus=corpus)


@stage(
    makes=Scores,
    revision=5,
    cpus=lambda resources: resources.eval_cpus if resources.eval_workers == 1 else 0,
    gpus=lambda resources: resources.gpus_per_worker if resources.eval_workers == 1 else 0,
)
def evaluate(
    model: ModelCheckpoint,
    corpus: HeldOutDocuments,
    *,
    recipe: EvaluateStageRecipe,
    resources: Resources,
    out: Path,
    run: StageRun,
) -> dict[str, Any]:
    """Write a model's scores on a corpus' held-out documents, and return their summary.

    Raises:
        ValueError: The corpus has another tokenizer, the evaluation refuses its choices, or a
            prompt's KV cache does not fit into memory.
        FloatingPointError: The model's logits are not finite.
    """
    from longreach.evaluation.cells import CellFolder, measured

    job = here = Job(model, corpus, recipe, resources, run.share)
    spread = resources.eval_workers > 1
    if spread:  # the tasks use the GPUs; this process has none and only lists the cells
        here = replace(job, resources=resources.model_copy(update={"gpus_per_worker": 0}))
    if not (spread and resources.gpus_per_worker):  # otherwise each task checks its own GPU
        check_memory(model.path, recipe, resources)
    evaluation = here.load()
    cells = evaluation.cells()
    folder = CellFolder(
        run.attempt.work / "cells",
        (earlier / "work" / "cells" for earlier in run.earlier),
        setting=_number_setting(resources),
    )
    results = folder.known(cells)
    run.spool.progress(len(results), len(cells), unit="cell")
    missing = {number: cell for number, cell in enumerate(cells) if number not in results}
    if spread:
        del evaluation  # free its memory for the tasks
        arriving = _spread(job, missing, run.memory_gib)
    else:
        arriving = measured(evaluation, missing)
    for number, result in arriving:
        results[number] = result
        folder.keep(number, cells[number], result)
        run.spool.progress(len(results), len(cells), unit="cell")
    in_order = [(cell, results[number]) for number, cell in enumerate(cells)]
    scores = EVALS[recipe.eval].scores(recipe.choices, in_order).named(recipe.model)
    scores.write(out)
    run.spool.metrics({f"eval/{name}": value for name, value in scores.summary.items()})
    run.spool.table(out / "scores.json")
    _write_figures(scores, recipe, out, run.spool)
    return {"eval": recipe.eval, "model": recipe.model, "rows": len(scores.rows)} | scores.summary


def _write_figures(scores: EvalScores, recipe: EvaluateStageRecipe, out: Path, spool: Spool) -> None:
    """Write the figures of one model's scores, if there are any, as a PNG and as an interactive page."""
    from longreach.evaluation.figures import Style, stacked_png
    from longreach.pipelines.report.page import Page

    section = EVALS[recipe.eval].section({recipe.model: scores}, Style.of([recipe.model]), Background())
    about = f"{len(scores.rows)} rows in scores.json, {len(scores.cases)} cases in cases.jsonl"
    page = Page(f"{section.title}: {recipe.model}", about, "", [section])
    if page.figures():
        picture, interactive = out / f"{recipe.eval}.png", out / f"{recipe.eval}.html"
        picture.write_bytes(stacked_png(page.figures()))
        interactive.write_text(page.html(interactive=True), encoding="utf-8")
        spool.artifact(picture, "figures")
        spool.artifact(interactive, "figures")


def _spread(job: Job, cells: dict[int, Cell], memory_gib: float) -> Iterator[tuple[int, Result]]:
    """Yield (number, result) as Ray tasks measure the cells.

    Cells are dealt out in turn, so that every task gets some long ones.

    Args:
        memory_gib: Estimated memory of each task.
    """
    import ray

    from longreach.infra.cluster import reservable_bytes

    resources = job.resources
    numbers = list(cells)
    tasks = min(resources.eval_workers, len(cells))
    measure = ray.remote(_measure_part).options(
        num_cpus=resources.eval_cpus, num_gpus=resources.gpus_per_worker, memory=reservable_bytes(memory_gib),
        num_returns="streaming",
    )  # fmt: skip
    running: list[Any] = []
    for task in range(tasks):
        part = {number: cells[number] for number in numbers[task::tasks]}
        running.append(measure.remote(job, part))
    try:
        while running:
            ready: Any = ray.wait(running, num_returns=1)[0][0]
            try:
                result: Any = ray.get(next(ready))
            except StopIteration:
                running.remove(ready)
                continue
            yield result
    finally:  # after a failure, or if the caller stops early
        for left in running:
            ray.cancel(left)


def _measure_part(job: Job, cells: dict[int, Cell]) -> Iterator[tuple[int, Result]]:
    """Measure some of the cells in a Ray task, on any node."""
    from longreach.evaluation.cells import measured

    job = job.on_this_node()
    if job.resources.gpus_per_worker:
        check_memory(job.model.path, job.recipe, job.resources)
    yield from measured(job.load(), cells)


def _number_setting(resources: Resources) -> str:
    """Return the numeric settings that a cell's result depends on: dtype, device, and precision if
    it is not the highest."""
    setting = f"{resources.dtype}, GPUs: {resources.gpus_per_worker}"
    if resources.matmul_precision != "highest":
        setting += f", products: {resources.matmul_precision}"
    return setting


def check_memory(folder: Path, recipe: EvaluateStageRecipe, resources: Resources) -> None:
    """Raise ValueError if weights and the longest prompt's KV cache do not fit into free memory."""
    import psutil
    import torch
    from transformers import AutoConfig

    from longreach.attention.kv_budget import KVBudget, readable

    config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config(decoder=True)
    longest = recipe.choices.longest_input()
    if not longest:
        return
    dtype, loaded_bytes = "fp32", 4
    if resources.dtype == "bfloat16":
        dtype, loaded_bytes = "bf16", 2
    try:
        cache = KVBudget.of(config).bytes(1, longest, dtype)
    except ValueError:  # not a plain KV cache; what it keeps instead is smaller
        cache = 0
    hidden = 2 * longest * (config.hidden_size + getattr(config, "intermediate_size", config.hidden_size)) * 4
    stored_bytes = 4
    if str(config.dtype) in ("torch.bfloat16", "torch.float16"):
        stored_bytes = 2
    weights = int(loaded_bytes / stored_bytes * sum(path.stat().st_size for path in folder.glob("*.safetensors")))
    if resources.gpus_per_worker:  # each task has a GPU of its own
        free, at_once = torch.cuda.mem_get_info()[0], 1
    else:
        free, at_once = min(psutil.virtual_memory().available, usable_memory()), resources.eval_workers
    need = (cache + hidden + weights) * at_once
    if need > free:
        tasks, fewer = "", ""
        if at_once > 1:
            tasks, fewer = f" in {at_once} tasks at once", ", or resources.eval_workers"
        raise ValueError(
            f"evaluate.{recipe.eval} at {longest:,} tokens needs about {readable(need)} for weights, keys and values"
            f"{tasks}, but {readable(free)} is free: lower its longest input{fewer}"
        )


EXTRA_TOKENS = 16
"""Most tokens that one of two tokenizers may have beyond the other: a sink token, chat markers. With
more, they are taken for different vocabularies."""


def check_tokenizers(corpus: PreTrainedTokenizerBase, model: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if a token of both has different ids. Either may have extra tokens (a sink
    token)."""
    ours, theirs = corpus.get_vocab(), model.get_vocab()
    advice = "tokenize the documents with the model's tokenizer"
    if differ := [token for token, n in ours.items() if theirs.get(token, n) != n]:
        raise ValueError(
            f"{len(differ)} tokens have another id in the corpus' tokenizer than in the model's ({differ[0]!r}: "
            f"{ours[differ[0]]} and {theirs[differ[0]]}): {advice}"
        )
    if abs(len(ours) - len(theirs)) > EXTRA_TOKENS:
        raise ValueError(
            f"the corpus was tokenized with {len(ours)} tokens, but the model has {len(theirs)}, and at most "
            f"{EXTRA_TOKENS} extra tokens are allowed: {advice}"
        )
