"""Stage `evaluate`: one evaluation of one model -> EvalScores (scores.json, scores.parquet,
cases.jsonl) and figures.

Each cell's result is kept in the attempt's folder as soon as it is known, so that an interrupted
grid goes on where it stopped. With `eval_workers` n above 1 the cells are spread over n Ray tasks,
each with the model in its own memory; a cell's result is the same wherever it is measured.
Attention is always full and causal here, whatever pattern the model was trained with (LongLoRA,
section 3.2).
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
from longreach.infra.resources import Resources
from longreach.infra.share import Share
from longreach.pipelines.artifacts import ModelCheckpoint, PackedCorpus, Scores
from longreach.pipelines.kind import StageRun, stage
from longreach.training.recipe import RopeRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EvaluateStageRecipe(Choices):
    """One evaluation of one model."""

    eval: str
    """Name in EVALS."""
    model: str
    """The model's name in the recipe; it stands in every row of the scores."""
    rope: RopeRecipe | None = None
    """A stretch applied while loading, for untrained baselines; None: as the folder says."""
    choices: SerializeAsAny[EvalChoices]
    """The evaluation's own section."""

    def identity(self, include: set[str] | None = None) -> dict[str, Any]:
        """Return the JSON that a fingerprint is made of; with the evaluation's revision, once it has
        been raised."""
        identity = super().identity(include)
        if revision := EVALS[self.eval].revision:
            identity["revision"] = revision
        return identity


@dataclass(frozen=True)
class Job:
    """What is evaluated, and with what: all that a task needs to measure cells, wherever it
    runs."""

    model: ModelCheckpoint
    corpus: PackedCorpus
    recipe: EvaluateStageRecipe
    resources: Resources
    share: Share | None = None
    """How a task on another node gets at the model and the corpus; None where all nodes see one
    disk."""

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
            torch.nn.Module.to(model, "cuda")  # transformers' own .cuda is decorated beyond what types can follow
        documents = held_out(self.corpus.path / "documents")
        return EVALS[self.recipe.eval](model, tokenizer, self.recipe.choices, documents)

    def on_this_node(self) -> Job:
        """Return the job with the paths of this node, its inputs fetched."""
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
    corpus: PackedCorpus,
    *,
    recipe: EvaluateStageRecipe,
    resources: Resources,
    out: Path,
    run: StageRun,
) -> dict[str, Any]:
    """Write the scores of a ModelCheckpoint on a PackedCorpus' held-out documents; returns their
    summary.

    ValueError: the corpus has another tokenizer, the evaluation refuses its choices, or a prompt's
    keys and values do not fit into memory. FloatingPointError: the model's logits are not finite.
    """
    from longreach.evaluation.cells import CellFolder, measured
    from longreach.evaluation.figures import Style, stacked_png
    from longreach.pipelines.report.page import Page

    job = here = Job(model, corpus, recipe, resources, run.share)
    spread = resources.eval_workers > 1
    if spread:  # the tasks have the GPUs, and this process sees none: it only lists the cells
        here = replace(job, resources=resources.model_copy(update={"gpus_per_worker": 0}))
    if here.resources == resources:  # else each task checks its own GPU
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
        del evaluation  # its memory is for the tasks
        arriving = _spread(job, missing, run.memory_gib)
    else:
        arriving = measured(evaluation, missing)
    for number, result in arriving:
        results[number] = result
        folder.keep(number, cells[number], result)
        run.spool.progress(len(results), len(cells), unit="cell")
    kind = EVALS[recipe.eval]
    in_order = [(cell, results[number]) for number, cell in enumerate(cells)]
    scores = kind.scores(recipe.choices, in_order).named(recipe.model)
    scores.write(out)
    run.spool.metrics({f"eval/{name}": value for name, value in scores.summary.items()})
    run.spool.table(out / "scores.json")
    section = kind.section({recipe.model: scores}, Style.of([recipe.model]), Background())
    about = f"{len(scores.rows)} rows in scores.json, {len(scores.cases)} cases in cases.jsonl"
    page = Page(f"{section.title}: {recipe.model}", about, "", [section])
    if page.figures():
        picture, interactive = out / f"{recipe.eval}.png", out / f"{recipe.eval}.html"
        picture.write_bytes(stacked_png(page.figures()))
        interactive.write_text(page.html(interactive=True), encoding="utf-8")
        run.spool.artifact(picture, "figures")
        run.spool.artifact(interactive, "figures")
    return {"eval": recipe.eval, "model": recipe.model, "rows": len(scores.rows)} | scores.summary


def _spread(job: Job, cells: dict[int, Cell], memory_gib: float) -> Iterator[tuple[int, Result]]:
    """Yield (number, result) as Ray tasks measure the cells, which are dealt in turn, so that all
    get long ones; `memory_gib`: about what each of them holds."""
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
    finally:  # one has failed, or nobody wants the rest
        for left in running:
            ray.cancel(left)


def _measure_part(job: Job, cells: dict[int, Cell]) -> Iterator[tuple[int, Result]]:
    """Measure some of the cells in a Ray task, on whichever node."""
    from longreach.evaluation.cells import measured

    job = job.on_this_node()
    if job.resources.gpus_per_worker:
        check_memory(job.model.path, job.recipe, job.resources)
    yield from measured(job.load(), cells)


def _number_setting(resources: Resources) -> str:
    """Return what else the numbers of a cell depend on: type, device, and precision if it is not
    the highest."""
    setting = f"{resources.dtype}, GPUs: {resources.gpus_per_worker}"
    if resources.matmul_precision != "highest":
        setting += f", products: {resources.matmul_precision}"
    return setting


def check_memory(folder: Path, recipe: EvaluateStageRecipe, resources: Resources) -> None:
    """ValueError if the weights and the keys and values of the longest prompt do not fit into what
    is free."""
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
    except ValueError:  # it keeps something else than keys and values, which is smaller
        cache = 0
    hidden = 2 * longest * (config.hidden_size + getattr(config, "intermediate_size", config.hidden_size)) * 4
    stored_bytes = 4
    if str(config.dtype) in ("torch.bfloat16", "torch.float16"):
        stored_bytes = 2
    weights = int(loaded_bytes / stored_bytes * sum(path.stat().st_size for path in folder.glob("*.safetensors")))
    if resources.gpus_per_worker:  # each task has a GPU of its own
        free, at_once = torch.cuda.mem_get_info()[0], 1
    else:
        free, at_once = psutil.virtual_memory().available, resources.eval_workers
    need = (cache + hidden + weights) * at_once
    if need > free:
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
