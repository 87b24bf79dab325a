"""Recipe -> stages, in an order in which each comes after its inputs.

    convert ─┬─ pack ─┬─ finetune[arm] ── merge[arm] ──┐
             │        └──────────────┬────────────────┼─ evaluate[model,eval] ── report
             └─ pack[sink] ── pretrain[arm] ──────────┘      (a vocabulary of its own: tokenizer ── pack[sink])

Nothing heavy is imported: `longreach plan` builds this in milliseconds, plus the time to hash the source texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash
from pydantic import SerializeAsAny

from evaluation.recipe import EvalRecipe
from infra.choices import Choices
from pipelines.recipe import Recipe
from pipelines.stage import Stage
from training.convert import source_digest as model_digest
from training.corpus import source_digest as corpus_digest
from training.recipe import (
    FinetuneRecipe,
    FinetuneStageRecipe,
    OptimRecipe,
    PackRecipe,
    PackStageRecipe,
    PretrainRecipe,
    PretrainStageRecipe,
    RopeRecipe,
    TokenizerRecipe,
)

DATA = ("kv_data", "qa_data", "data")
"""Choices of evaluations that name files: their bytes are part of identity."""


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


class MergeRecipe(Choices):
    """Merging an adapter into its base leaves nothing to choose."""


class ReportRecipe(Choices):
    """What the report is called; all else comes from its inputs."""

    name: str
    """The recipe's name."""
    labels: dict[str, str]
    """The report's inputs: parameter name -> the stage's label."""


@dataclass(frozen=True)
class _Model:
    """What is evaluated: a model folder's stage, a stretch applied while loading, and the corpus of its tokenizer."""

    stage: Stage
    rope: RopeRecipe | None
    corpus: Stage


def build(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe, inputs first.

    Raises:
        ValueError: source documents or the base model cannot be found.
    """
    starts = bool(recipe.finetune or recipe.baselines or (recipe.pretrain and recipe.pretrain.vocab_size is None))
    source = model_digest(recipe.base.source, recipe.base.revision) if starts else ""
    base = Stage("convert", "convert", recipe.base, digests={"source": source})
    texts = {"documents": corpus_digest(recipe.corpus, Path.cwd())}

    def packed(label: str, rows: PackRecipe, base: Stage) -> Stage:
        return Stage("pack", label, PackStageRecipe(corpus=recipe.corpus, pack=rows), {"base": base}, texts)

    stages, models = [base] if starts else [], {}
    rows = recipe.finetune.pack if recipe.finetune else PackRecipe(seq_len=1024)  # evaluation needs held-out documents
    corpus = packed("pack", rows, base)
    if recipe.finetune or recipe.baselines:
        stages.append(corpus)
    for name, rope in recipe.baselines.items():
        models[name] = _Model(base, None if rope.type == "none" else rope, corpus)
    if recipe.finetune:
        for name, tuned in _finetuned(recipe.finetune, recipe.seed, corpus, base):
            stages += tuned
            models[name] = _Model(tuned[-1], None, corpus)
    if recipe.pretrain:
        start = base
        if (size := recipe.pretrain.vocab_size) is not None:
            start = Stage("tokenizer", "tokenizer", TokenizerRecipe(corpus=recipe.corpus, vocab_size=size), {}, texts)
            stages.append(start)
        stages.append(sink_corpus := packed("pack[sink]", recipe.pretrain.pack, start))
        for name, pretrained in _pretrained(recipe.pretrain, recipe.seed, sink_corpus, start):
            stages.append(pretrained)
            models[name] = _Model(pretrained, None, sink_corpus)
    stages += _evaluations(recipe, models)
    inputs = {f"input_{n:03d}": stage for n, stage in enumerate(stages)}
    labels = {key: stage.label for key, stage in inputs.items()}
    return [*stages, Stage("report", "report", ReportRecipe(name=recipe.name, labels=labels), inputs)]


def _finetuned(section: FinetuneRecipe, seed: int, corpus: Stage, base: Stage) -> Iterator[tuple[str, list[Stage]]]:
    """Each arm's stages, the one that gives the model last. Arms whose wall clock is compared run one after the other:
    they never share cores."""
    previous: tuple[Stage, ...] = ()
    for name, arm in section.every_arm().items():
        choices = FinetuneStageRecipe(rope=section.rope, arm=arm, optim=_optim(section), seed=seed)
        tuned = Stage("finetune", f"finetune[{name}]", choices, {"corpus": corpus, "base": base}, after=previous)
        previous = (tuned,)
        if arm.tune == "all":
            yield name, [tuned]
        else:
            yield name, [tuned, Stage("merge", f"merge[{name}]", MergeRecipe(), {"base": base, "adapter": tuned})]


def _pretrained(section: PretrainRecipe, seed: int, corpus: Stage, base: Stage) -> Iterator[tuple[str, Stage]]:
    for name, arm in section.arms.items():
        choices = PretrainStageRecipe(
            model=section.model, arm=arm, sink_mass_every=section.sink_mass_every, optim=_optim(section), seed=seed
        )
        yield name, Stage("pretrain", f"pretrain[{name}]", choices, {"corpus": corpus, "base": base})


def _evaluations(recipe: Recipe, models: dict[str, _Model]) -> Iterator[Stage]:
    for eval_name, section in recipe.evaluate.chosen().items():
        choices = section.model_copy(update={"models": None})  # which others are evaluated does not change this one
        data = {key: _digest(Path(path)) for key in DATA if (path := getattr(section, key, None))}
        for name in section.models or models:
            model = models[name]
            yield Stage(
                "evaluate",
                f"evaluate[{name},{eval_name}]",
                EvaluateStageRecipe(eval=eval_name, model=name, rope=model.rope, choices=choices),
                {"model": model.stage, "corpus": model.corpus},
                digests=data,
            )


def _digest(path: Path) -> str:
    """Of a file, or of all files below a folder; empty if there is none, which the evaluation will say."""
    digest = xxhash.xxh3_128()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path)}:{file.stat().st_size}:".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _optim(section: OptimRecipe) -> OptimRecipe:
    """The optimizer's fields of a section that has more."""
    return OptimRecipe(**{name: getattr(section, name) for name in OptimRecipe.model_fields})
