"""The pipeline's stages: the choices of each, its inputs and artifact, and its call into training/.

evaluate, release, costs, promote and report have their own files. pipelines/graph.py decides which
stages a recipe needs, and their order. To add a stage, write its recipe model and function here or
in a new file, add it to STAGES, and add its builder to BUILDERS (graph.py). torch, transformers and
ray are imported inside the functions, so that `longreach plan` stays fast.

    longreach run quickstart
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from longreach.infra.choices import Choices
from longreach.infra.files import link_or_copy
from longreach.infra.resources import Resources
from longreach.pipelines.artifacts import (
    GAINS,
    AdapterCheckpoint,
    HeldOutDocuments,
    ModelCheckpoint,
    PackedCorpus,
    RowGains,
    TokenizerFolder,
)
from longreach.pipelines.costs import costs
from longreach.pipelines.evaluate import evaluate
from longreach.pipelines.gate import promote
from longreach.pipelines.kind import StageKind, StageRun, stage, stop_file
from longreach.pipelines.release import release
from longreach.pipelines.report.report import report
from longreach.training.corpus_recipe import CorpusRecipe, PackRecipe
from longreach.training.recipe import BaseRecipe, FinetuneStageRecipe, PretrainStageRecipe, RopeRecipe, TrainJob
from longreach.training.summary import HeldOutSummary, PackSummary, TrainingSummary

ARM = "arm"
"""Name of `convert`'s input that is an arm of the same recipe's pretraining."""
PROGRESS_EVERY_S = 0.5  # packing reports its progress at most this often


# ---- convert: the base model, from the recipe's source, as a plain Hugging Face folder


@stage(makes=ModelCheckpoint, revision=1, cpus=lambda resources: 1)
def convert(pretrained: Mapping[str, ModelCheckpoint], *, recipe: BaseRecipe, out: Path) -> dict[str, Any]:
    """Write the model with origin.json; the summary describes its origin and its architecture.

    Args:
        pretrained: The arm that a source `pretrain:ARM` names; empty for other sources.
    """
    from longreach.training.convert import convert as convert_model
    from longreach.training.model import describe

    at = pretrained[ARM].path if ARM in pretrained else None
    origin = convert_model(recipe.source, out, recipe.revision, at=at)
    return {"origin": origin, **describe(out)}


# ---- tokenizer: trained on the corpus, for pretraining from scratch


class TokenizerRecipe(Choices):
    """A tokenizer trained on the corpus."""

    corpus: CorpusRecipe
    """Documents to train on; only its training documents are used."""
    vocab_size: int
    """Number of tokens in the vocabulary."""


@stage(makes=TokenizerFolder, revision=1, cpus=lambda resources: 1)
def tokenizer(*, recipe: TokenizerRecipe, out: Path) -> dict[str, Any]:
    """Train a tokenizer on the corpus' training documents."""
    from longreach.training.train_tokenizer import train_tokenizer

    return train_tokenizer(recipe.corpus, recipe.vocab_size, out, base_dir=Path.cwd())


# ---- pack: documents as rows of equal length, tokenized for the base


class PackStageRecipe(Choices):
    """The documents to pack, and how to pack them."""

    corpus: CorpusRecipe
    """Documents and their split."""
    pack: PackRecipe
    """How documents become rows."""


@stage(makes=PackedCorpus, revision=3, cpus=lambda resources: 1)
def pack(base: TokenizerFolder, *, recipe: PackStageRecipe, out: Path, run: StageRun) -> dict[str, Any]:
    """Pack with Ray tasks if Ray runs, else with threads of this process; the rows are the same.

    Relative globs start at the working directory. The summary omits the list of malformed entries.
    """
    from transformers import AutoTokenizer

    from longreach.training.corpus import pack_corpus
    from longreach.training.documents import known_names

    tokenizer = AutoTokenizer.from_pretrained(base.path, local_files_only=True)
    total = 0  # unknown until all are read
    if not any(source.repositories for source in recipe.corpus.sources):  # a long one becomes several documents
        total = len(known_names(recipe.corpus, Path.cwd()) or ())
    packed = pack_corpus(
        recipe.corpus, recipe.pack, tokenizer, out,
        base_dir=Path.cwd(), workers=_ray_cpus(), progress=_progress(run, total),
    )  # fmt: skip
    metrics = {"pack/rows": packed.rows, "pack/tokens": packed.tokens, "pack/efficiency": packed.efficiency}
    run.spool.metrics(metrics)
    run.spool.artifact(out / PackSummary.file)
    run.spool.dataset(run.label, packed.source_digest, str(out))
    return packed.model_dump(mode="json", exclude={"bad": {"listed"}})


def _ray_cpus() -> int:
    """Return the number of the cluster's CPUs; 0 if Ray does not run."""
    import ray

    return int(ray.cluster_resources()["CPU"]) if ray.is_initialized() else 0


def _progress(run: StageRun, total: int) -> Callable[[int], None]:
    """Return a function that reports how many documents are done, at most every PROGRESS_EVERY_S."""
    reported_at = 0.0

    def progress(documents: int) -> None:
        nonlocal reported_at
        if time.monotonic() - reported_at > PROGRESS_EVERY_S or documents == total:
            reported_at = time.monotonic()
            run.spool.progress(documents, total, unit="document")

    return progress


# ---- hold_out: the held-out documents alone, as token ids


class HoldOutRecipe(Choices):
    """The documents, of which those that are held out are tokenized."""

    corpus: CorpusRecipe
    """Documents and their split."""

    def identity(self, include: set[str] | None = None) -> dict[str, Any]:
        """Return only the patterns that hold documents out.

        The stage's digest stands for the rest (held_out_digest), so that evaluations stay valid
        when training documents change.
        """
        return self.corpus.identity({"validation", "test"})


@stage(makes=HeldOutDocuments, revision=1, cpus=lambda resources: 1)
def hold_out(base: TokenizerFolder, *, recipe: HoldOutRecipe, out: Path, run: StageRun) -> dict[str, Any]:
    """Tokenize the held-out documents like `pack`, but without reading others where possible. The
    summary omits the list of malformed entries."""
    from transformers import AutoTokenizer

    from longreach.training.corpus import hold_out as hold_out_documents

    tokenizer = AutoTokenizer.from_pretrained(base.path, local_files_only=True)
    summary = hold_out_documents(
        recipe.corpus, tokenizer, out, base_dir=Path.cwd(), workers=_ray_cpus(), progress=_progress(run, 0)
    )
    if summary.bad.count:
        first = summary.bad.listed[0]
        run.note(f"{summary.bad.count} malformed entries are left out; {first.file}:{first.line}: {first.reason}")
    run.spool.artifact(out / HeldOutSummary.file)
    run.spool.dataset(run.label, summary.source_digest, str(out))
    return summary.model_dump(mode="json", exclude={"bad": {"listed"}})


# ---- gains: how much a long context helps to predict each token, computed before an arm is trained


class GainsRecipe(Choices):
    """The rows to score, and the short context to compare with."""

    rope: RopeRecipe
    """The arm's stretch, under which the model scores the rows."""
    short_tokens: int
    """Length of the short context: a token sees at least half of it, and less than all."""
    global_batch_tokens: int
    """Together with `steps` and `seed`, it determines which rows the training reads."""
    steps: int
    seed: int


@stage(
    makes=RowGains,
    revision=1,
    cpus=lambda resources: resources.eval_cpus,
    gpus=lambda resources: resources.gpus_per_worker,
)
def gains(
    corpus: PackedCorpus, base: ModelCheckpoint, *, recipe: GainsRecipe, resources: Resources, out: Path, run: StageRun
) -> dict[str, Any]:
    """Score the rows that a training reads, with three forward passes each; an interrupted stage
    starts over."""
    import torch

    from longreach.training.corpus import PackedRows
    from longreach.training.long_ce import rows_of_training, score_rows
    from longreach.training.model import load_model

    resources.prepare_torch(resources.eval_cpus)
    model, _ = load_model(base.path, rope=recipe.rope, dtype=resources.dtype)
    if resources.gpus_per_worker:
        torch.nn.Module.to(model, "cuda")  # the type checker cannot follow transformers' decorated .cuda
    rows = PackedRows(corpus.path)
    batch_rows = recipe.global_batch_tokens // rows.summary.seq_len
    row_ids = rows_of_training(len(rows), recipe.seed, batch_rows, recipe.steps)

    def progress(done: int, total: int) -> None:
        run.spool.progress(done, total, unit="row")

    mean_weight = score_rows(model, rows, row_ids, recipe.short_tokens, out, progress)
    return {"rows": len(row_ids), "mean_weight": mean_weight}


# ---- finetune, pretrain: train one arm with DeepSpeed ranks on Ray Train (training/loop.py)


@stage(makes=AdapterCheckpoint | ModelCheckpoint, revision=1, cpus=lambda resources: 0, saves_when_stopped=True)
def finetune(
    corpus: PackedCorpus,
    base: ModelCheckpoint,
    weighing: Mapping[str, RowGains],
    *,
    recipe: FinetuneStageRecipe,
    resources: Resources,
    run: StageRun,
) -> dict[str, Any]:
    """Train one arm from the stretched base: an adapter, or a whole model if all weights are tuned.

    Args:
        weighing: The gains, for an arm with objective long_ce; empty for other arms.
    """
    gains_folder = str(weighing[GAINS].path) if GAINS in weighing else None
    return _train("finetune", corpus, base, recipe, resources, run, gains_folder)


@stage(makes=ModelCheckpoint, revision=2, cpus=lambda resources: 0, saves_when_stopped=True)
def pretrain(
    corpus: PackedCorpus, base: TokenizerFolder, *, recipe: PretrainStageRecipe, resources: Resources, run: StageRun
) -> dict[str, Any]:
    """Train a Llama from scratch, or the base further, with an attention sink (2309.17453, section
    3.3).

    Arms without a sink token read the same rows without it, and their tokenizer adds none.
    """
    return _train("pretrain", corpus, base, recipe, resources, run)


def _train(
    kind: Literal["finetune", "pretrain"],
    corpus: PackedCorpus,
    base: TokenizerFolder,
    recipe: FinetuneStageRecipe | PretrainStageRecipe,
    resources: Resources,
    run: StageRun,
    gains_folder: str | None = None,
) -> dict[str, Any]:
    """Train on the ranks that the resources specify, and return the training's summary."""
    from longreach.infra.launch import run_ranks

    run.spool.dataset(corpus.manifest["label"], corpus.fingerprint, str(corpus.path))
    run.spool.param("ranks", resources.workers)
    run.spool.param("zero_stage", resources.zero_stage)
    job = TrainJob(
        **dict(recipe),
        kind=kind,
        corpus=str(corpus.path),
        base=str(base.path),
        resources=resources,
        out=str(run.attempt.out),
        work=str(run.attempt.work),
        earlier=tuple(str(folder / "work") for folder in run.earlier),
        superseded_file=str(run.attempt.superseded_file),
        stop_file=str(stop_file(run.spool.path.parent)),
        spool=str(run.spool.path),
        share=run.share,
        gains=gains_folder,
    )
    trained = run_ranks(
        "longreach.training.loop:train",
        job.model_dump(mode="json"),
        resources=resources,
        name="train",
        storage=run.storage,
        share=run.share,
        memory_gib=run.memory_gib,
        note=run.note,
        waited=run.waits_s.append,
    )
    if run.share and not (run.attempt.out / TrainingSummary.file).exists():  # rank 0 was on another node
        run.share.pull(run.attempt.out)
    summary = TrainingSummary.model_validate(trained)
    costs = {f"cost/{fact}": getattr(summary, fact) for fact in ("wall_s", "peak_gib", "tokens_per_s")}
    run.spool.metrics(costs | {"cost/step_s": summary.step_s_median}, step=summary.steps)
    return summary.to_json()


# ---- merge: base and adapter as one model that plain transformers loads, with its stretch


class MergeRecipe(Choices):
    """No choices: merging an adapter into its base has no options."""


@stage(makes=ModelCheckpoint, revision=1, cpus=lambda resources: 1)
def merge(base: ModelCheckpoint, adapter: AdapterCheckpoint, *, out: Path) -> dict[str, Any]:
    """Write the merged model with its training.json; fail unless its logits match the adapter's."""
    from longreach.training.export import merge_adapter

    trained = TrainingSummary.read(adapter.path)
    merged = merge_adapter(base.path, adapter.path, out, rope=trained.rope)
    trained.write(out)
    return merged


# ---- stretch: a trained model with another stretch than it was trained with


class StretchRecipe(Choices):
    """The stretch of a variant."""

    rope: RopeRecipe
    """The whole stretch, relative to the base's positions."""


@stage(makes=ModelCheckpoint, revision=1, cpus=lambda resources: 1)
def stretch(model: ModelCheckpoint, base: ModelCheckpoint, *, recipe: StretchRecipe, out: Path) -> dict[str, Any]:
    """Copy the model with another stretch in its config.json; on a local disk, weights are hard
    links."""
    from longreach.training.model import restretched

    config = restretched(model.path, base.path, recipe.rope)
    for file in model.path.iterdir():
        link_or_copy(str(file), str(out / file.name))
    (out / "config.json").unlink()  # it may be a link to the arm's file, which must not be overwritten
    config.save_pretrained(out)
    return {"context_length": config.max_position_embeddings, "rope": config.rope_parameters}


STAGES: dict[str, StageKind] = {
    "convert": convert,
    "tokenizer": tokenizer,
    "pack": pack,
    "hold_out": hold_out,
    "pretrain": pretrain,
    "gains": gains,
    "finetune": finetune,
    "merge": merge,
    "stretch": stretch,
    "evaluate": evaluate,
    "release": release,
    "costs": costs,
    "promote": promote,
    "report": report,
}
