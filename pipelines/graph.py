"""Recipe -> stages, in an order in which each comes after its inputs.

    convert ─┬─ pack ─┬─ finetune[arm] ── merge[arm] ──┐
             │        └──────────────┬────────────────┼─ evaluate[model,eval] ── report
             └─ pack[sink] ── pretrain[arm] ──────────┘

Nothing heavy is imported: `longreach plan` builds this in milliseconds, plus the time to hash the source texts.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import SerializeAsAny

from infra.choices import Choices
from pipelines.recipe import Recipe
from pipelines.stage import Stage
from training.convert import source_digest as model_digest
from training.corpus import source_digest as corpus_digest
from training.recipe import (
    BaseRecipe,
    FinetuneStageRecipe,
    OptimRecipe,
    PackRecipe,
    PackStageRecipe,
    PretrainStageRecipe,
    RopeRecipe,
)


class EvaluateStageRecipe(Choices):
    """One evaluation of one model."""

    eval: str
    """Name in EVALS."""
    model: str
    """The model's name in the recipe; it stands in every row of the scores."""
    rope: RopeRecipe | None = None
    """A stretch applied while loading, for untrained baselines; None: as the folder says."""
    choices: SerializeAsAny[Choices]
    """The evaluation's own section."""


class MergeRecipe(Choices):
    """Merging an adapter into its base leaves nothing to choose."""


class ReportRecipe(Choices):
    """What the report is called; all else comes from its inputs."""

    name: str
    """The recipe's name."""
    labels: dict[str, str]
    """The report's inputs: parameter name -> the stage's label."""


def build(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe, inputs first.

    Raises:
        ValueError: source documents or the base model cannot be found.
    """
    base = Stage("convert", "convert", recipe.base, digests={"source": _base_digest(recipe.base)})
    texts = {"documents": corpus_digest(recipe.corpus, Path.cwd())}
    stages, models = [base], {}

    def pack(label: str, rows: PackRecipe) -> Stage:
        stages.append(Stage("pack", label, PackStageRecipe(corpus=recipe.corpus, pack=rows), {"base": base}, texts))
        return stages[-1]

    rows = recipe.finetune.pack if recipe.finetune else PackRecipe(seq_len=1024)
    corpus = pack("pack", rows) if recipe.finetune or not recipe.pretrain else None
    sink_corpus = pack("pack[sink]", recipe.pretrain.pack) if recipe.pretrain else None
    for name, rope in recipe.baselines.items():
        models[name] = (base, None if rope.type == "none" else rope, corpus or sink_corpus)

    previous: tuple[Stage, ...] = ()
    for name, arm in (recipe.finetune.arms if recipe.finetune else {}).items():
        section = FinetuneStageRecipe(
            rope=recipe.finetune.rope, arm=arm, optim=_optim(recipe.finetune), seed=recipe.seed
        )
        tuned = Stage(
            "finetune", f"finetune[{name}]", section, {"corpus": corpus, "base": base}, after=previous
        )  # arms whose wall clock is compared run one after the other: they never share cores
        previous = (tuned,)
        stages.append(tuned)
        if arm.tune != "all":
            tuned = Stage("merge", f"merge[{name}]", MergeRecipe(), {"base": base, "adapter": tuned})
            stages.append(tuned)
        models[name] = (tuned, None, corpus)

    for name, arm in (recipe.pretrain.arms if recipe.pretrain else {}).items():
        section = PretrainStageRecipe(
            model=recipe.pretrain.model, arm=arm, optim=_optim(recipe.pretrain), seed=recipe.seed
        )
        stages.append(Stage("pretrain", f"pretrain[{name}]", section, {"corpus": sink_corpus, "base": base}))
        models[name] = (stages[-1], None, sink_corpus)

    for eval_name, choices in recipe.evaluate.chosen().items():
        for name in choices.models or models:
            model, rope, documents = models[name]
            section = EvaluateStageRecipe(
                eval=eval_name, model=name, rope=rope, choices=choices.model_copy(update={"models": None})
            )
            inputs = {"model": model, "corpus": documents}
            stages.append(Stage("evaluate", f"evaluate[{name},{eval_name}]", section, inputs))

    inputs = {f"input_{n:03d}": stage for n, stage in enumerate(stages)}
    labels = {key: stage.label for key, stage in inputs.items()}
    stages.append(Stage("report", "report", ReportRecipe(name=recipe.name, labels=labels), inputs))
    return stages


def _base_digest(base: BaseRecipe) -> str:
    return model_digest(base.source, base.revision)


def _optim(section: OptimRecipe) -> OptimRecipe:
    """The optimizer's fields of a section that has more."""
    return OptimRecipe(**{name: getattr(section, name) for name in OptimRecipe.model_fields})
