"""Recipe -> stages, in an order in which each comes after its inputs.

    convert ─┬─ pack ─┬─ finetune[arm] ── merge[arm] ──┐
             │        └──────────────┬────────────────┼─ evaluate[model,eval] ── report
             └─ pack[sink] ── pretrain[arm] ──────────┘      (a vocabulary of its own: tokenizer ── pack[sink])

    an arm's model and its evaluations ── release[arm]
    release, its evaluations, the base's and the champion's ── promote

Nothing heavy is imported: `longreach plan` builds this in milliseconds, plus the time to hash the source texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from longreach.infra import registry
from longreach.infra.files import add_file
from longreach.pipelines.evaluate import EvaluateStageRecipe
from longreach.pipelines.gate import PromoteStageRecipe, lengths_of
from longreach.pipelines.recipe import Recipe
from longreach.pipelines.release import ReleaseRecipe
from longreach.pipelines.report.report import ReportRecipe
from longreach.pipelines.stage import Stage
from longreach.pipelines.stages import MergeRecipe, PackStageRecipe, TokenizerRecipe
from longreach.training.convert import source_digest as model_digest
from longreach.training.corpus import source_digest as corpus_digest
from longreach.training.recipe import (
    BaseRecipe,
    FinetuneRecipe,
    FinetuneStageRecipe,
    OptimRecipe,
    PackRecipe,
    PretrainRecipe,
    PretrainStageRecipe,
    RopeRecipe,
)

GATED = ("perplexity", "passkey")
"""Evaluations that the gate's rules are about."""
DATA = ("kv_data", "qa_data", "data")
"""Choices of evaluations that name files: their bytes are part of identity."""


@dataclass(frozen=True)
class _Model:
    """What is evaluated: a model folder's stage, a stretch applied while loading, and the corpus of its tokenizer."""

    stage: Stage
    rope: RopeRecipe | None
    corpus: Stage
    start: Stage | None = None
    """What an arm was trained from; None: it is a baseline."""


def build(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe, inputs first.

    Raises:
        ValueError: source documents or the base model cannot be found.
    """
    starts = bool(recipe.finetune or recipe.baselines or (recipe.pretrain and recipe.pretrain.vocab_size is None))
    base = _converted("convert", recipe.base if starts else BaseRecipe(source=""))
    texts = {"documents": corpus_digest(recipe.corpus, Path.cwd())}
    champion = registry.champion(recipe.promote.name) if recipe.promote else None

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
        start, rope = base, recipe.finetune.rope
        if champion and recipe.promote and recipe.promote.start_from == "champion":
            start, rope = _from_champion(base, rope, champion, texts["documents"])
            stages += [start] if start is not base else []
        for name, tuned in _finetuned(recipe.finetune, rope, recipe.seed, corpus, start):
            stages += tuned
            models[name] = _Model(tuned[-1], None, corpus, start)
    if recipe.pretrain:
        scratch = base
        if (size := recipe.pretrain.vocab_size) is not None:
            scratch = Stage("tokenizer", "tokenizer", TokenizerRecipe(corpus=recipe.corpus, vocab_size=size), {}, texts)
            stages.append(scratch)
        stages.append(sink_corpus := packed("pack[sink]", recipe.pretrain.pack, scratch))
        for name, pretrained in _pretrained(recipe.pretrain, recipe.seed, sink_corpus, scratch):
            stages.append(pretrained)
            models[name] = _Model(pretrained, None, sink_corpus, scratch)
    scores = list(_evaluations(recipe, models))
    releases = [_release(recipe, name, model, scores) for name, model in models.items() if model.start]
    report = report_on(recipe, [*stages, *scores])
    return [*stages, *scores, *releases, report, *_gate(recipe, base, models, [*stages, *scores], releases, champion)]


def _converted(label: str, base: BaseRecipe) -> Stage:
    """A source's stage; an alias of the registry stands for the version that it names now."""
    if base.source.startswith("models:/") and "@" in base.source:
        version = registry.version_of(base.source.removeprefix("models:/"))
        base = base.model_copy(update={"source": f"models:/{version.name}/{version.version}"})
    return Stage(
        "convert", label, base, digests={"source": model_digest(base.source, base.revision)} if base.source else {}
    )


def _from_champion(base: Stage, rope: RopeRecipe, champion: Any, documents: str) -> tuple[Stage, RopeRecipe]:
    """What fine-tuning starts from, and the stretch that is left to do. A champion that was trained on these very
    documents is not trained on them again: then the start is what it started from, and all is as it was."""
    source = f"models:/{champion.name}/{champion.version}"
    if champion.tags.get(registry.DOCUMENTS) == documents:
        source = champion.tags[registry.BASE]
        if not source.startswith(f"models:/{champion.name}/"):  # it was the first, made from the recipe's base
            return base, rope
    return _converted("convert[start]", BaseRecipe(source=source)), RopeRecipe()


def _release(recipe: Recipe, name: str, model: _Model, scores: list[Stage]) -> Stage:
    """An arm's model with a card; the untrained base's scores stand beside its own."""
    gated = recipe.promote and recipe.promote.model == name
    choices = ReleaseRecipe(name=recipe.name, arm=name, register_as="" if gated else f"{recipe.name}-{name}")
    assert model.start
    inputs = {"model": model.stage, "corpus": model.corpus, "base": model.start}
    for prefix, whose in (("own", name), ("base", recipe.plain_baseline())):
        inputs |= {f"{prefix}_{eval_of(s)}": s for s in scores if model_of(s) == whose}
    return Stage("release", f"release[{name}]", choices, inputs)


def _gate(
    recipe: Recipe, base: Stage, models: dict[str, _Model], known: list[Stage], releases: list[Stage], champion: Any
) -> list[Stage]:
    """The champion's stages and the decision; nothing where the challenger is the champion already."""
    gate, asked = recipe.promote, recipe.evaluate.chosen()
    if not gate:
        return []
    release = next(stage for stage in releases if stage.label == f"release[{gate.model}]")
    if champion and champion.tags.get(registry.FINGERPRINT) == release.fingerprint:
        return []
    inputs, new = {"model": release}, []
    for role, whose, evals in (("challenger", gate.model, GATED), ("base", recipe.plain_baseline(), GATED[:1])):
        scores = [s for s in known if s.name == "evaluate" and model_of(s) == whose and eval_of(s) in evals]
        inputs |= {f"{role}_{eval_of(stage)}": stage for stage in scores}
    if gate.base_ratio:
        inputs["base"] = base
    if champion and gate.perplexity_ratio is not None:
        model = _converted("convert[champion]", BaseRecipe(source=f"models:/{champion.name}/{champion.version}"))
        if same := next((stage for stage in known if stage.fingerprint == model.fingerprint), None):
            model = same  # training started from it
        else:
            new.append(model)
        choices = asked["perplexity"].model_copy(update={"models": None})
        measure = EvaluateStageRecipe(eval="perplexity", model="champion", choices=choices)
        scored = Stage(
            "evaluate", "evaluate[champion,perplexity]", measure, {"model": model, "corpus": models[gate.model].corpus}
        )
        inputs["champion_perplexity"] = scored
        new.append(scored)
    decision = PromoteStageRecipe(
        rules=gate, champion=champion and str(champion.version), lengths=lengths_of(recipe, "perplexity")
    )
    return [*new, Stage("promote", "promote", decision, inputs)]


def model_of(stage: Stage) -> str:
    """Whom an evaluation asks."""
    assert isinstance(stage.recipe, EvaluateStageRecipe)
    return stage.recipe.model


def eval_of(stage: Stage) -> str:
    """What it asks."""
    assert isinstance(stage.recipe, EvaluateStageRecipe)
    return stage.recipe.eval


def report_on(recipe: Recipe, stages: list[Stage], failed: dict[str, str] | None = None) -> Stage:
    """The report of these stages; `failed` are the others, by label, with the reason."""
    inputs = {f"input_{n:03d}": stage for n, stage in enumerate(stages)}
    labels = {key: stage.label for key, stage in inputs.items()}
    choices = ReportRecipe(name=recipe.name, labels=labels, prices=recipe.report, failed=failed or {})
    return Stage("report", "report", choices, inputs)


def _finetuned(
    section: FinetuneRecipe, rope: RopeRecipe, seed: int, corpus: Stage, base: Stage
) -> Iterator[tuple[str, list[Stage]]]:
    """Each arm's stages, the one that gives the model last. Arms whose wall clock is compared run one after the other:
    they never share cores."""
    previous: tuple[Stage, ...] = ()
    for name, arm in section.every_arm().items():
        choices = FinetuneStageRecipe(rope=rope, arm=arm, optim=_optim(section), seed=seed)
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
        add_file(digest, file)
    return digest.hexdigest()


def _optim(section: OptimRecipe) -> OptimRecipe:
    """The optimizer's fields of a section that has more."""
    return OptimRecipe(**{name: getattr(section, name) for name in OptimRecipe.model_fields})
