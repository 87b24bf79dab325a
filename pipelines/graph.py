"""Recipe -> stages, in an order in which each comes after its inputs.

    convert ─┬─ pack ─┬─ finetune[arm] ── merge[arm] ──┐
             │        └──────────────┬────────────────┼─ evaluate[model,eval] ── report
             └─ pack[sink] ── pretrain[arm] ──────────┘      (a vocabulary of its own: tokenizer ── pack[sink])

    an arm's model ── stretch[variant] ── evaluate[variant,eval]
    an arm's model and its evaluations ── release[arm]
    pack, convert ── gains[arm] ── finetune[arm]      (objective long_ce)
    pack, convert ── costs ── report
    release, its evaluations, the base's and the champion's ── promote

Nothing heavy is imported: `longreach plan` builds this in milliseconds, plus the time to hash the
texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from longreach.infra import registry
from longreach.infra.artifact import Artifact
from longreach.infra.files import add_file
from longreach.pipelines.artifacts import GAINS
from longreach.pipelines.costs import CostsStageRecipe
from longreach.pipelines.evaluate import EvaluateStageRecipe
from longreach.pipelines.gate import add_gate
from longreach.pipelines.hand_over import check_base
from longreach.pipelines.recipe import Recipe
from longreach.pipelines.release import ReleaseRecipe
from longreach.pipelines.report.report import ReportRecipe
from longreach.pipelines.stage import Stage
from longreach.pipelines.stages import (
    ARM,
    GainsRecipe,
    MergeRecipe,
    PackStageRecipe,
    StretchRecipe,
    TokenizerRecipe,
)
from longreach.training.chats import check_packable
from longreach.training.convert import source_digest as model_digest
from longreach.training.documents import first_chats
from longreach.training.documents import source_digest as corpus_digest
from longreach.training.recipe import (
    BaseRecipe,
    FinetuneStageRecipe,
    OptimRecipe,
    PackRecipe,
    PretrainStageRecipe,
    RopeRecipe,
)


@dataclass(frozen=True)
class EvaluatedModel:
    """A model that is evaluated: an arm's, a variant of one, or a baseline."""

    stage: Stage  # the stage that makes the model folder
    rope: RopeRecipe | None  # a stretch applied while loading; None: as the folder says
    corpus: Stage  # the held-out documents in the model's own tokens
    start: Stage | None = None  # the stage whose model the arm was trained from; None: it is no arm


@dataclass
class Pipeline:
    """The stages of a recipe so far, and what later stages build on."""

    recipe: Recipe
    gated: bool = True  # False: nobody asks who is champion, and the gate's stages are left out
    published: Callable[[Stage], Artifact | None] | None = None
    """Finds what a stage has made, None if it will be made anew. Not given: each is as it was."""
    stages: list[Stage] = field(default_factory=list)  # in an order in which each comes after its inputs
    models: dict[str, EvaluatedModel] = field(default_factory=dict)

    @cached_property
    def base(self) -> Stage:
        """The model that everything starts from."""
        source = self.recipe.base if self.needs_base else BaseRecipe(source="")
        if arm := source.pretrained_arm:
            return Stage("convert", "convert", source, {ARM: self.models[arm].stage})
        return self.converted("convert", source)

    @property
    def needs_base(self) -> bool:
        """False where all models are pretrained from scratch with a vocabulary of their own."""
        pretrain = self.recipe.pretrain
        keeps_tokenizer = pretrain is not None and pretrain.vocab_size is None
        return bool(self.recipe.finetune or self.recipe.baselines or keeps_tokenizer)

    @cached_property
    def texts(self) -> dict[str, str]:
        """The identity of the documents, as stages that read them note it."""
        return {"documents": corpus_digest(self.recipe.corpus, Path.cwd())}

    @cached_property
    def champion(self) -> Any:
        """The version that the gate compares with; None: there is no gate, or no champion yet."""
        gate = self.recipe.promote
        return registry.champion(gate.name) if gate and self.gated else None

    @cached_property
    def corpus(self) -> Stage:
        """The documents in the base's tokens."""
        finetune = self.recipe.finetune
        rows = PackRecipe(seq_len=1024)  # evaluation needs the held-out documents only
        if finetune:
            rows = finetune.pack
        return self.packed("pack", rows, self.base)

    def packed(self, label: str, rows: PackRecipe, base: Stage) -> Stage:
        for _ in first_chats(self.recipe.corpus, Path.cwd()):
            check_packable(rows.method, self._may_have_template(base))
        choices = PackStageRecipe(corpus=self.recipe.corpus, pack=rows)
        return Stage("pack", label, choices, {"base": base}, self.texts)

    def _may_have_template(self, base: Stage) -> bool:
        """Return False where it is known before anything runs that the tokenizer has no chat
        template."""
        if base.name == "tokenizer":
            return False
        folder = Path(self.recipe.base.source).expanduser()
        if not folder.is_dir():
            return True
        for name in ("chat_template.jinja", "tokenizer_config.json"):
            file = folder / name
            if file.is_file() and "{%" in file.read_text("utf-8"):
                return True
        return False

    def converted(self, label: str, base: BaseRecipe) -> Stage:
        """The stage that converts a source; an alias stands for the version that it names now."""
        if base.source.startswith("models:/") and "@" in base.source:
            version = registry.version_of(base.source.removeprefix("models:/"))
            base = base.model_copy(update={"source": f"models:/{version.name}/{version.version}"})
        digests = {"source": model_digest(base.source, base.revision)} if base.source else {}
        return Stage("convert", label, base, digests=digests)

    def scores_of(self, model: str) -> dict[str, Stage]:
        scores = {}
        for stage in self.stages:
            if isinstance(stage.recipe, EvaluateStageRecipe) and stage.recipe.model == model:
                scores[stage.recipe.eval] = stage
        return scores


def build(
    recipe: Recipe, *, gated: bool = True, published: Callable[[Stage], Artifact | None] | None = None
) -> list[Stage]:
    """Return a recipe's stages, inputs first; ValueError if documents or the base cannot be found.

    Args:
        gated: False leaves out the gate's own stages and asks for no champion; the others are the
            same, as long as training starts from the base.
        published: finds what a stage has made, None if it will be made anew, so that the gate
            decides on a release that is made again from the same choices as the champion.
    """
    pipeline = Pipeline(recipe, gated, published)
    for add in BUILDERS:
        add(pipeline)
    return pipeline.stages


def add_base(pipeline: Pipeline) -> None:
    """Add the base, its corpus, and the baselines: the base as it is, or stretched but not
    trained."""
    recipe = pipeline.recipe
    if recipe.base.pretrained_arm:  # then the base is made here, before all that starts from it
        _add_pretrained_arms(pipeline)
    if pipeline.needs_base:
        pipeline.stages.append(pipeline.base)
    if recipe.finetune or recipe.baselines:
        pipeline.stages.append(pipeline.corpus)
    for name, rope in recipe.baselines.items():
        stretch = None if rope.type == "none" else rope
        pipeline.models[name] = EvaluatedModel(pipeline.base, stretch, pipeline.corpus)


def add_finetuned(pipeline: Pipeline) -> None:
    """Add the fine-tuned arms. Their wall clock is compared, so they never run at the same time."""
    section, gate = pipeline.recipe.finetune, pipeline.recipe.promote
    if section is None:
        return
    start = pipeline.base
    if pipeline.champion and gate and gate.start_from == "champion":
        start = _from_champion(pipeline)
        if start is not pipeline.base:
            pipeline.stages.append(start)
    previous: tuple[Stage, ...] = ()
    for name, training in section.seeded_arms().items():
        rope = RopeRecipe()  # a champion is stretched already
        if start is pipeline.base:
            rope = section.rope_of(training.arm)
        seed = pipeline.recipe.seed
        if training.seed is not None:
            seed = training.seed
        # stretch and seed stand in one place, so that it makes no difference where the recipe has
        # them
        arm = training.arm.model_copy(update={"rope": None, "seeds": ()})
        choices = FinetuneStageRecipe(rope=rope, arm=arm, optim=_optim(section), seed=seed)
        inputs = {"corpus": pipeline.corpus, "base": start}
        if arm.objective == "long_ce":
            inputs[GAINS] = _gains(pipeline, name, start, choices, section.short_tokens_of(arm), previous)
        model = Stage("finetune", f"finetune[{name}]", choices, inputs, after=previous)
        previous = (model,)
        pipeline.stages.append(model)
        if arm.tune != "all":
            inputs = {"base": start, "adapter": model}
            model = Stage("merge", f"merge[{name}]", MergeRecipe(), inputs)
            pipeline.stages.append(model)
        pipeline.models[name] = EvaluatedModel(model, None, pipeline.corpus, start)


def _gains(
    pipeline: Pipeline,
    name: str,
    start: Stage,
    choices: FinetuneStageRecipe,
    short_tokens: int,
    previous: tuple[Stage, ...],
) -> Stage:
    """Return the stage that scores an arm's rows, which arms of one start and seed have in common;
    add it if it is new."""
    recipe = GainsRecipe(
        rope=choices.rope,
        short_tokens=short_tokens,
        global_batch_tokens=choices.optim.global_batch_tokens,
        steps=choices.optim.steps,
        seed=choices.seed,
    )
    inputs = {"corpus": pipeline.corpus, "base": start}
    # after the arm before it, whose time is measured
    scored = Stage("gains", f"gains[{name}]", recipe, inputs, after=previous)
    for stage in pipeline.stages:
        if stage.name == scored.name and stage.fingerprint == scored.fingerprint:
            return stage
    pipeline.stages.append(scored)
    return scored


def add_pretrained(pipeline: Pipeline) -> None:
    """Add the pretrained arms, unless the base is one of them: then they are there already."""
    if not pipeline.recipe.base.pretrained_arm:
        _add_pretrained_arms(pipeline)


def _add_pretrained_arms(pipeline: Pipeline) -> None:
    """Add the pretrained arms, on rows that begin with the sink token."""
    section = pipeline.recipe.pretrain
    if section is None:
        return
    if section.vocab_size is None:
        start = pipeline.base
    else:
        vocabulary = TokenizerRecipe(corpus=pipeline.recipe.corpus, vocab_size=section.vocab_size)
        start = Stage("tokenizer", "tokenizer", vocabulary, {}, pipeline.texts)
        pipeline.stages.append(start)
    corpus = pipeline.packed("pack[sink]", section.pack, start)
    pipeline.stages.append(corpus)
    for name, arm in section.arms.items():
        optim = _optim(section)
        if arm.learning_rate is not None:
            optim = optim.model_copy(update={"learning_rate": arm.learning_rate})
        choices = PretrainStageRecipe(
            model=section.model,
            sink=arm.sink,
            train=arm.train,
            attention=arm.attention,
            sink_mass_every=section.sink_mass_every,
            optim=optim,
            seed=pipeline.recipe.seed,
        )
        model = Stage("pretrain", f"pretrain[{name}]", choices, {"corpus": corpus, "base": start})
        pipeline.stages.append(model)
        pipeline.models[name] = EvaluatedModel(model, None, corpus, start)


def add_variants(pipeline: Pipeline) -> None:
    """Add trained arms under another stretch than their own, which no training follows."""
    finetuned = pipeline.recipe.finetuned_arms()
    for name, variant in pipeline.recipe.seeded_variants().items():
        arm = pipeline.models[variant.of]
        plain = arm.stage  # pretraining stretches nothing
        if variant.of in finetuned:
            plain = pipeline.base
        inputs = {"model": arm.stage, "base": plain}
        model = Stage("stretch", f"stretch[{name}]", StretchRecipe(rope=variant.rope), inputs)
        pipeline.stages.append(model)
        pipeline.models[name] = EvaluatedModel(model, None, arm.corpus)


def add_evaluations(pipeline: Pipeline) -> None:
    for eval_name, section in pipeline.recipe.evaluate.chosen().items():
        digests = {field: _digest(Path(path)) for field, path in section.data_files().items()}
        for name in pipeline.recipe.measured_by(section):
            model = pipeline.models[name]
            choices = section.of_model(is_base=name == pipeline.recipe.plain_baseline())
            recipe = EvaluateStageRecipe(eval=eval_name, model=name, rope=model.rope, choices=choices)
            inputs = {"model": model.stage, "corpus": model.corpus}
            label = f"evaluate[{name},{eval_name}]"
            pipeline.stages.append(Stage("evaluate", label, recipe, inputs, digests))


def add_releases(pipeline: Pipeline) -> None:
    """Add each arm's model with a card; the untrained base's scores stand there beside its own."""
    recipe = pipeline.recipe
    check_base(recipe)
    baseline = pipeline.scores_of(recipe.plain_baseline() or "")
    for name, model in pipeline.models.items():
        if model.start is None:
            continue
        by_gate = recipe.promote is not None and recipe.promote.model == name
        registered = "" if by_gate else f"{recipe.name}-{name}"
        inputs = {"model": model.stage, "corpus": model.corpus, "base": model.start}
        for evaluation, scores in pipeline.scores_of(name).items():
            inputs[f"own_{evaluation}"] = scores
        for evaluation, scores in baseline.items():
            inputs[f"base_{evaluation}"] = scores
        types = recipe.release.gguf_types()
        choices = ReleaseRecipe(name=recipe.name, arm=name, register_as=registered, gguf=types)
        pipeline.stages.append(Stage("release", f"release[{name}]", choices, inputs))


def add_costs(pipeline: Pipeline) -> None:
    """Add the measurement of costs. Nothing before it may run at the same time, since that would be
    measured too."""
    if pipeline.recipe.costs:
        inputs = {"corpus": pipeline.corpus, "base": pipeline.base}
        choices = CostsStageRecipe.of(pipeline.recipe)
        pipeline.stages.append(Stage("costs", "costs", choices, inputs, after=tuple(pipeline.stages)))


def add_report(pipeline: Pipeline) -> None:
    """Add the report on all stages so far; a release only repeats what it reads."""
    reported = [stage for stage in pipeline.stages if stage.name != "release"]
    pipeline.stages.append(report_on(pipeline.recipe, reported))


BUILDERS: list[Callable[[Pipeline], None]] = [
    add_base,
    add_finetuned,
    add_pretrained,
    add_variants,
    add_evaluations,
    add_releases,
    add_costs,
    add_report,
    add_gate,
]
"""What adds stages to a pipeline, in the order of the stages. A new stage has its place here."""


def report_on(recipe: Recipe, stages: list[Stage], failed: dict[str, str] | None = None) -> Stage:
    """Return the report on these stages; `failed` are the others, by label, with the reason."""
    choices = ReportRecipe(name=recipe.name, prices=recipe.report, failed=failed or {})
    return Stage("report", "report", choices, {stage.label: stage for stage in stages})


def _from_champion(pipeline: Pipeline) -> Stage:
    """What fine-tuning starts from: the champion, which is stretched already, or the base.

    A champion that was trained on these very documents is not trained on them again: then the start
    is what it started from, and the fingerprints are those of its own run.
    """
    champion = pipeline.champion
    source = f"models:/{champion.name}/{champion.version}"
    if champion.tags.get(registry.DOCUMENTS) == pipeline.texts["documents"]:
        source = champion.tags[registry.BASE]
        if not source.startswith(f"models:/{champion.name}/"):  # the first champion began with the base
            return pipeline.base
    return pipeline.converted("convert[start]", BaseRecipe(source=source))


def _digest(path: Path) -> str:
    """Digest of a file, or of all files below a folder; that there is none is reported by the
    evaluation."""
    files = [path]
    if not path.is_file():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(f"{file.relative_to(path)}:{file.stat().st_size}:".encode())
        add_file(digest, file)
    return digest.hexdigest()


def _optim(section: OptimRecipe) -> OptimRecipe:
    return OptimRecipe(**section.model_dump(include={*OptimRecipe.model_fields}))
