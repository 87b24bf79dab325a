"""Build the stages of a recipe in topological order: each comes after its inputs.

    convert ─┬─ pack ── finetune[arm] ── merge[arm] ──┐
             ├─ hold_out ─────────────────────────────┼─ evaluate[model,eval] ── report
             └─ pack[sink] ── pretrain[arm] ──────────┘      (a vocabulary of its own: tokenizer ── pack[sink])

    an arm's model ── stretch[variant] ── evaluate[variant,eval]
    an arm's model and its evaluations ── release[arm]
    pack, convert ── gains[arm] ── finetune[arm]      (objective long_ce)
    pack, convert ── costs ── report
    release, its evaluations, the base's and the champion's ── promote

No slow module is imported: `longreach plan` builds this graph in milliseconds, plus the time to
hash the documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from longreach.evaluation.base import EvalChoices
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
    HoldOutRecipe,
    MergeRecipe,
    PackStageRecipe,
    StretchRecipe,
    TokenizerRecipe,
)
from longreach.training.chats import check_chats
from longreach.training.convert import source_digest as model_digest
from longreach.training.corpus_recipe import PackRecipe
from longreach.training.documents import (
    check_patterns,
    first_chats,
    held_out_digest,
    known_names,
    listed_once,
    matches,
    split_of,
)
from longreach.training.documents import source_digest as corpus_digest
from longreach.training.recipe import BaseRecipe, FinetuneStageRecipe, OptimRecipe, PretrainStageRecipe, RopeRecipe


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to evaluate: of an arm, of a variant, or a baseline."""

    stage: Stage  # the stage that makes the model folder
    rope: RopeRecipe | None  # a stretch to apply on loading; None to use the folder's config
    vocabulary: Stage  # the stage whose tokenizer makes the tokens that it reads
    corpus: Stage | None = None  # the stage with the arm's rows; None if it is not an arm
    start: Stage | None = None  # the stage whose model the arm was trained from; None as above


@dataclass
class Pipeline:
    """The stages of a recipe added so far, and what later stages need."""

    recipe: Recipe
    gated: bool = True  # False: do not ask for the champion, and leave out the gate's stages
    published: Callable[[Stage], Artifact | None] | None = None
    """Returns a stage's published artifact, or None if the stage will rerun. Without it, no stage
    is assumed to rerun."""
    stages: list[Stage] = field(default_factory=list)  # topologically sorted
    models: dict[str, EvaluatedModel] = field(default_factory=dict)

    @cached_property
    def base(self) -> Stage:
        """The stage that makes the base model."""
        source = self.recipe.base if self.needs_base else BaseRecipe(source="")
        if arm := source.pretrained_arm:
            return Stage("convert", "convert", source, {ARM: self.models[arm].stage})
        return self.converted("convert", source)

    @property
    def needs_base(self) -> bool:
        """False if all models are pretrained from scratch with their own vocabulary."""
        pretrain = self.recipe.pretrain
        keeps_tokenizer = pretrain is not None and pretrain.vocab_size is None
        return bool(self.recipe.finetune or self.recipe.baselines or keeps_tokenizer)

    @cached_property
    def texts(self) -> dict[str, str]:
        """The digest of the documents, for the identity of the stages that read them."""
        return {"documents": corpus_digest(self.recipe.corpus, Path.cwd())}

    @cached_property
    def held_out_texts(self) -> dict[str, str]:
        """The digest of the held-out documents, for the identity of the stage that reads them."""
        return {"documents": held_out_digest(self.recipe.corpus, Path.cwd())}

    @cached_property
    def splits(self) -> dict[str, str] | None:
        """The split of each document by name; None if names are only known once all are read."""
        corpus = self.recipe.corpus
        names = known_names(corpus, Path.cwd())
        if names is None:
            return None
        check_patterns(names, corpus)
        return {name: split_of(name, corpus) for name in names}

    def check_documents(self, evaluation: str, section: EvalChoices) -> None:
        """Raise ValueError if an evaluation selects held-out documents that do not exist, as far as
        that is known before the documents are read."""
        for name, patterns, splits in section.selected():
            if self.splits is None:
                return
            names = [document for document, split in self.splits.items() if split in splits]
            # NAME#2 is a piece of a long repository
            wanted = [*patterns, *(pattern.partition("#")[0] for pattern in patterns)]
            if not any(matches(document, pattern) for document in names for pattern in wanted):
                raise ValueError(
                    f"evaluate.{evaluation}.{name}: {list(patterns)} matches no {' or '.join(splits)} document of the "
                    f"corpus; there are: {', '.join(names[:10]) or 'none'}"
                )

    @cached_property
    def champion(self) -> Any:
        """The model version that the gate compares with; None without a gate or champion."""
        gate = self.recipe.promote
        return registry.champion(gate.name) if gate and self.gated else None

    def add(self, stage: Stage) -> Stage:
        """Add a stage, and return it; if an equal one is there already, return that one."""
        for known in self.stages:
            if known.name == stage.name and known.fingerprint == stage.fingerprint:
                return known
        self.stages.append(stage)
        return stage

    @cached_property
    def corpus(self) -> Stage:
        """The stage that packs the documents, tokenized for the base; it is added on first use."""
        rows = PackRecipe(seq_len=1024)
        if self.recipe.finetune:
            rows = self.recipe.finetune.pack
        return self.add(self.packed("pack", rows, self.base))

    def packed(self, label: str, rows: PackRecipe, base: Stage) -> Stage:
        for _ in first_chats(self.recipe.corpus, Path.cwd()):
            check_chats(self._may_have_template(base), rows.method)
        choices = PackStageRecipe(corpus=self.recipe.corpus, pack=rows)
        return Stage("pack", label, choices, {"base": base}, self.texts)

    def documents_for(self, model: str) -> Stage:
        """Return the stage with the held-out documents, tokenized for a model; it is added on first
        use."""
        vocabulary = self.models[model].vocabulary
        label = "hold_out[sink]" if vocabulary.name == "tokenizer" else "hold_out"
        choices = HoldOutRecipe(corpus=self.recipe.corpus)
        stage = Stage("hold_out", label, choices, {"base": vocabulary}, self.held_out_texts)
        added = self.add(stage)
        if added is stage:
            for _ in first_chats(self.recipe.corpus, Path.cwd()):
                check_chats(self._may_have_template(vocabulary))
        return added

    def _may_have_template(self, base: Stage) -> bool:
        """Return False if it is certain before the run that the tokenizer has no chat template."""
        if base.name == "tokenizer":
            return False
        folder = Path(self.recipe.base.source)
        if not folder.is_dir():
            return True
        for name in ("chat_template.jinja", "tokenizer_config.json"):
            file = folder / name
            if file.is_file() and "{%" in file.read_text("utf-8"):
                return True
        return False

    def converted(self, label: str, base: BaseRecipe) -> Stage:
        """Return the stage that converts a source; an alias is resolved to its current version."""
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
        gated: If False, leave out the gate's stages and do not ask for the champion. The other
            stages are the same, as long as training starts from the base.
        published: Returns a stage's published artifact, or None if the stage will rerun. It lets
            the gate decide on a release that is remade from the same choices as the champion.
    """
    pipeline = Pipeline(recipe, gated, published)
    with listed_once():
        for add in BUILDERS:
            add(pipeline)
    return pipeline.stages


def add_base(pipeline: Pipeline) -> None:
    """Add the base, its corpus and the baselines: the unchanged base, or untrained stretches of
    it."""
    recipe = pipeline.recipe
    if recipe.base.pretrained_arm:  # the base is one of these arms, so they come first
        _add_pretrained_arms(pipeline)
    if pipeline.needs_base:
        pipeline.stages.append(pipeline.base)
    for name, rope in recipe.baselines.items():
        stretch = None if rope.type == "none" else rope
        pipeline.models[name] = EvaluatedModel(pipeline.base, stretch, pipeline.base)


def add_finetuned(pipeline: Pipeline) -> None:
    """Add the fine-tuned arms. They run one after another, because their wall-clock times are
    compared."""
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
        # the identity has stretch and seed in one place, wherever the recipe sets them
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
        pipeline.models[name] = EvaluatedModel(model, None, pipeline.base, pipeline.corpus, start)


def _gains(
    pipeline: Pipeline,
    name: str,
    start: Stage,
    choices: FinetuneStageRecipe,
    short_tokens: int,
    previous: tuple[Stage, ...],
) -> Stage:
    """Add the stage that scores an arm's rows; arms with the same start and the same choices in
    GainsRecipe share it."""
    recipe = GainsRecipe(
        rope=choices.rope,
        short_tokens=short_tokens,
        global_batch_tokens=choices.optim.global_batch_tokens,
        steps=choices.optim.steps,
        seed=choices.seed,
    )
    inputs = {"corpus": pipeline.corpus, "base": start}
    # after the previous arm, whose time is measured
    return pipeline.add(Stage("gains", f"gains[{name}]", recipe, inputs, after=previous))


def add_pretrained(pipeline: Pipeline) -> None:
    """Add the pretrained arms, unless add_base has added them because the base is one of them."""
    if not pipeline.recipe.base.pretrained_arm:
        _add_pretrained_arms(pipeline)


def _add_pretrained_arms(pipeline: Pipeline) -> None:
    """Add the pretrained arms, on rows that start with the sink token."""
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
        pipeline.models[name] = EvaluatedModel(model, None, start, corpus, start)


def add_variants(pipeline: Pipeline) -> None:
    """Add trained arms with another stretch than their own, without further training."""
    finetuned = pipeline.recipe.finetuned_arms()
    for name, variant in pipeline.recipe.seeded_variants().items():
        arm = pipeline.models[variant.of]
        plain = arm.stage  # a pretrained arm is not stretched
        if variant.of in finetuned:
            plain = pipeline.base
        inputs = {"model": arm.stage, "base": plain}
        model = Stage("stretch", f"stretch[{name}]", StretchRecipe(rope=variant.rope), inputs)
        pipeline.stages.append(model)
        pipeline.models[name] = EvaluatedModel(model, None, arm.vocabulary)


def add_evaluations(pipeline: Pipeline) -> None:
    """Add the evaluations. They wait until packing has ended, so that training starts first. If
    packing fails, untrained models are evaluated all the same."""
    packed = tuple(stage for stage in pipeline.stages if stage.name == "pack")
    for eval_name, section in pipeline.recipe.evaluate.chosen().items():
        pipeline.check_documents(eval_name, section)
        digests = {field: _digest(Path(path)) for field, path in section.data_files().items()}
        for name in pipeline.recipe.measured_by(section):
            model = pipeline.models[name]
            choices = section.of_model(is_base=name == pipeline.recipe.plain_baseline())
            recipe = EvaluateStageRecipe(eval=eval_name, model=name, rope=model.rope, choices=choices)
            inputs = {"model": model.stage, "corpus": pipeline.documents_for(name)}
            label = f"evaluate[{name},{eval_name}]"
            pipeline.stages.append(Stage("evaluate", label, recipe, inputs, digests, after=packed))


def add_releases(pipeline: Pipeline) -> None:
    """Add each arm's release: its model with a card that shows its scores and the untrained
    base's."""
    recipe = pipeline.recipe
    check_base(recipe)
    baseline = pipeline.scores_of(recipe.plain_baseline() or "")
    for name, model in pipeline.models.items():
        if model.start is None or model.corpus is None:
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
    """Add the cost measurement, after all stages so far: one that ran meanwhile would distort
    it."""
    if pipeline.recipe.costs:
        inputs = {"corpus": pipeline.corpus, "base": pipeline.base}
        choices = CostsStageRecipe.of(pipeline.recipe)
        pipeline.stages.append(Stage("costs", "costs", choices, inputs, after=tuple(pipeline.stages)))


def add_report(pipeline: Pipeline) -> None:
    """Add the report on all stages so far except releases, which only repeat other stages'
    results."""
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
"""Functions that add stages to a pipeline, in stage order. Add the function of a new stage here."""


def report_on(recipe: Recipe, stages: list[Stage], failed: dict[str, str] | None = None) -> Stage:
    """Return the report stage on `stages`; `failed` maps labels of failed stages to reasons."""
    choices = ReportRecipe(name=recipe.name, prices=recipe.report, failed=failed or {})
    return Stage("report", "report", choices, {stage.label: stage for stage in stages})


def _from_champion(pipeline: Pipeline) -> Stage:
    """Return the stage that fine-tuning starts from: the champion, which is already stretched, or
    the base.

    A champion that was trained on the same documents is not trained on them again: fine-tuning then
    starts where the champion's did, so that the fingerprints are those of the champion's own run.
    """
    champion = pipeline.champion
    source = f"models:/{champion.name}/{champion.version}"
    if champion.tags.get(registry.DOCUMENTS) == pipeline.texts["documents"]:
        source = champion.tags[registry.BASE]
        if not source.startswith(f"models:/{champion.name}/"):  # the first champion started from the base
            return pipeline.base
    return pipeline.converted("convert[start]", BaseRecipe(source=source))


def _digest(path: Path) -> str:
    """Return the digest of a file or of all files in a folder; missing files are the evaluation's
    to report."""
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
