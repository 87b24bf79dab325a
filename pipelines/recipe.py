"""The recipe schema: every field of a recipe with its meaning and default, and checks across
sections.

pipelines/reader.py reads recipes from files. `longreach config schema` prints these classes as a
JSON Schema, and docs/hooks.py generates the reference from them: users read the text below a field.

    from longreach.pipelines.recipe import Recipe
    Recipe.model_fields["evaluate"].description
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, create_model, model_validator

from longreach.evaluation import EVALS
from longreach.evaluation.base import EvalChoices
from longreach.infra.choices import Choices, Location, PathOrUrl, Seed, dotted, nearest
from longreach.infra.registry import CHAMPION
from longreach.infra.resources import Resources
from longreach.infra.tracking import metric_part
from longreach.pipelines.costs import CostsRecipe
from longreach.pipelines.gate import PromoteRecipe
from longreach.pipelines.hand_over import HandOverRecipe
from longreach.training.corpus_recipe import PACKAGE, CorpusRecipe
from longreach.training.recipe import (
    BaseRecipe,
    FinetuneRecipe,
    PretrainArm,
    PretrainRecipe,
    RopeRecipe,
    SeededArm,
    VariantRecipe,
)

SAFE_NAME = re.compile(r"[a-z0-9][a-z0-9._+-]{0,99}")  # for names that are used as folder and file names


class _Evaluations(Choices):
    """Evaluations to run: each evaluation with a section here runs on the models that it names."""

    def chosen(self) -> dict[str, EvalChoices]:
        """Return the evaluations that have a section, by name."""
        chosen = {}
        for name in type(self).model_fields:
            section = getattr(self, name)
            if section is not None:
                chosen[name] = section
        return chosen


if TYPE_CHECKING:
    EvaluateRecipe = _Evaluations
else:  # each evaluation in EVALS gets a field of its name; adding one needs no change here
    EvaluateRecipe = create_model(
        "EvaluateRecipe",
        __base__=_Evaluations,
        __doc__=_Evaluations.__doc__,
        **{
            name: (one.Choices | None, Field(default=None, description=one.Choices.__doc__))
            for name, one in EVALS.items()
        },
    )


class StoreRecipe(Choices):
    """Where artifacts are stored. Not part of identity: another root gives the same
    fingerprints."""

    root: PathOrUrl = Field(default=".longreach", min_length=1)
    """Artifact store: a folder or any fsspec URL (s3://bucket/prefix)."""
    workdir: PathOrUrl = Field(default=".longreach", min_length=1)
    """Local folder of this machine: scratch files, spooled metrics and the embedded MLflow
    store."""


class PriceRecipe(Choices):
    """Price and power of a training rank, from which the report computes money and energy by
    wall-clock time."""

    price_per_hour: float | None = Field(default=None, gt=0)
    """Price per rank and hour, in `currency`."""
    currency: str = "USD"
    """Currency of the price; only displayed."""
    watts: float | None = Field(default=None, gt=0)
    """Mean power draw of one rank in watts, an assumption to estimate energy; it is not
    measured."""


class TrackingRecipe(Choices):
    """MLflow tracking. Not part of identity, and no run waits for it: metrics are spooled first."""

    uri: str | None = None
    """URI of the tracking server. Default: an SQLite store in store.workdir (`longreach ui` shows
    it)."""
    enabled: bool = True
    """If false, metrics are spooled but not sent; `longreach sync` sends them later."""


class Recipe(Choices):
    """A whole pipeline: documents, rows, arms, evaluations and resources."""

    name: str = Field(pattern=rf"^{SAFE_NAME.pattern}$")
    """Name of the pipeline run: at most 100 lower-case letters, digits and . _ + -."""
    experiment: str = Field(default="longreach", min_length=1)
    """Name of the MLflow experiment."""
    seed: Seed = 0
    """Seed of initialization, row order and LoRA; evaluations have their own seeds."""
    base: BaseRecipe = BaseRecipe()
    """The model whose context is extended."""
    corpus: CorpusRecipe
    """Documents and their split."""
    baselines: dict[str, RopeRecipe] = Field(default_factory=dict)
    """Untrained variants of the base by name, evaluated alongside the arms."""
    finetune: FinetuneRecipe | None = None
    """Context extension by fine-tuning. Without this section, nothing is fine-tuned."""
    pretrain: PretrainRecipe | None = None
    """Pretraining to compare attention sinks. Without this section, nothing is pretrained."""
    variants: dict[str, VariantRecipe] = Field(default_factory=dict)
    """Trained arms with another stretch than their own, by name, evaluated alongside the arms."""
    evaluate: EvaluateRecipe = EvaluateRecipe()
    """Which evaluations measure which models."""
    costs: CostsRecipe | None = None
    """Cost of a step by row length. Without this section, it is not measured."""
    promote: PromoteRecipe | None = None
    """The gate to production. Without this section, nothing is promoted."""
    release: HandOverRecipe = HandOverRecipe()
    """Extra formats of the arms' models, and the hub repository that one is pushed to."""
    report: PriceRecipe = PriceRecipe()
    """Prices for the report's cost columns."""
    resources: Resources = Resources()
    """Workers, CPUs, GPUs and precision; not part of identity."""
    store: StoreRecipe = StoreRecipe()
    """Where artifacts are stored; not part of identity."""
    tracking: TrackingRecipe = TrackingRecipe()
    """MLflow tracking; not part of identity."""

    def models(self) -> list[tuple[Location, str]]:
        """Return (section, name) of every model that can be evaluated."""
        named: dict[Location, Iterable[str]] = {
            ("baselines",): self.baselines,
            ("finetune", "arms"): self.finetuned_arms(),
            ("pretrain", "arms"): self.pretrained_arms(),
            ("variants",): self.seeded_variants(),
        }
        models = []
        for section, names in named.items():
            for name in names:
                models.append((section, name))
        return models

    def finetuned_arms(self) -> dict[str, SeededArm]:
        """Return every training of the section `finetune` by model name; empty without the
        section."""
        if self.finetune is None:
            return {}
        return self.finetune.seeded_arms()

    def pretrained_arms(self) -> dict[str, PretrainArm]:
        """Return the arms of the section `pretrain` by name; empty without the section."""
        if self.pretrain is None:
            return {}
        return self.pretrain.arms

    def trained_length(self) -> int | None:
        """Return the base's trained length in tokens; None if it is unknown before conversion."""
        from longreach.training.convert import known_config  # imported here: `config show` does not need fsspec

        if self.base.pretrained_arm is None:
            return known_config(self.base.source).get("max_position_embeddings")
        if self.pretrain is None or self.pretrain.model is None:
            return None
        return self.pretrain.model.context_length

    def seeded_variants(self) -> dict[str, VariantRecipe]:
        """Return every variant by model name; an arm with several seeds has one variant per
        seed."""
        variants = {}
        for name, variant in self.variants.items():
            for seed in self._seeds_of(variant.of):
                variants[f"{name}{seed}"] = variant.model_copy(update={"of": f"{variant.of}{seed}"})
        return variants

    def measured_by(self, section: EvalChoices) -> list[str]:
        """Return the models that an evaluation measures: those that its section names, else all.

        The name of an arm or variant stands for all its seeds.
        """
        if not section.models:
            return [name for _, name in self.models()]
        models = []
        for name in section.models:
            arm = self.variants[name].of if name in self.variants else name
            models += [f"{name}{seed}" for seed in self._seeds_of(arm)]
        return list(dict.fromkeys(models))

    def _seeds_of(self, arm: str) -> list[str]:
        """Return the seed suffixes of an arm's model names: empty for the first seed, then e.g.
        `.s1`."""
        seeds = []
        for model, training in self.finetuned_arms().items():
            if training.of == arm:
                seeds.append(model.removeprefix(arm))
        return seeds or [""]

    def local_paths(self) -> dict[str, str]:
        """Return every value that may be a path on this machine, by dotted field."""
        paths = {"store.root": self.store.root, "store.workdir": self.store.workdir}
        for index, source in enumerate(self.corpus.sources):
            if source.files:
                paths[f"corpus.sources.{index}.files"] = source.files
            if source.dataset and Path(source.dataset).exists():
                paths[f"corpus.sources.{index}.dataset"] = source.dataset
            for n, entry in enumerate(source.repositories):
                if not entry.startswith(PACKAGE):
                    paths[f"corpus.sources.{index}.repositories.{n}"] = entry
        if Path(self.base.source).is_dir():
            paths["base.source"] = self.base.source
        for name, section in self.evaluate.chosen().items():
            for field, path in section.data_files().items():
                paths[f"evaluate.{name}.{field}"] = path
        return paths

    def plain_baseline(self) -> str | None:
        """Return the name of the baseline that is the unchanged base, or None."""
        return next((name for name, rope in self.baselines.items() if rope.type == "none"), None)

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        problems = [*self._name_problems(), *self._base_problems(), *self._parallel_problems()]
        problems += [*self._variant_problems(), *self._evaluation_problems(), *self._validation_problems()]
        for section in (self.costs, self.promote, self.release):
            if section:
                problems += section.problems(self)
        if problems:
            raise SectionsDisagree(problems)
        return self

    def _name_problems(self) -> Iterator[tuple[Location, str]]:
        sections: dict[str, Location] = {}
        in_metrics: dict[str, str] = {}
        for section, name in self.models():
            if not SAFE_NAME.fullmatch(name):
                message = "names a folder: use at most 100 lower-case letters, digits and . _ + -"
                yield (*section, name), message
            if name in sections:
                taken = f"{dotted(sections[name])}.{name}"
                yield (*section, name), f"{taken} already has this name: choose another one"
            sections.setdefault(name, section)
            other = in_metrics.setdefault(metric_part(name), name)
            if other != name:
                yield (*section, name), f"{other} and {name} have the same name in metrics: rename one of them"
            if name == CHAMPION:
                yield (*section, name), "the name is reserved for the gate: choose another one"

    def _base_problems(self) -> Iterator[tuple[Location, str]]:
        arm = self.base.pretrained_arm
        if not self.base.source:
            yield ("base", "source"), "is empty: name a folder, or package:, hub: or models: and a name"
        if arm is None:
            return
        arms = self.pretrained_arms()
        place = ("base", "source")
        if self.pretrain is None or arm not in arms:
            hint = ": there is no section pretrain"
            if arms:
                hint = nearest(arm, arms, "pretrain has")
            yield place, f"no arm {arm!r}{hint}"
        elif self.pretrain.model is None or self.pretrain.vocab_size is None:
            message = "is itself made from the base: set pretrain.model and pretrain.vocab_size"
            yield place, f"{self.base.source!r} {message}"
        elif arms[arm].sink == "token":
            message = "has a sink token, which finetune does not put into its rows: choose an arm without one"
            yield place, f"{self.base.source!r} {message}"

    def _validation_problems(self) -> Iterator[tuple[Location, str]]:
        for name, section in (("finetune", self.finetune), ("pretrain", self.pretrain)):
            if section and section.validate_every_steps and not self.corpus.validation:
                message = f"{section.validate_every_steps} needs validation documents, but corpus.validation is empty: "
                yield (name, "validate_every_steps"), f"{message}name some there, or set it to 0"

    def _parallel_problems(self) -> Iterator[tuple[Location, str]]:
        ranks = self.resources.sequence_parallel
        for section, training in (("finetune", self.finetune), ("pretrain", self.pretrain)):
            if not training:
                continue
            seq_len = training.pack.seq_len
            try:
                self.resources.check_row(seq_len)
            except ValueError as error:
                yield (section, "pack", "seq_len"), str(error)
            try:
                self.resources.accumulation(training.global_batch_tokens // seq_len, self.resources.workers)
            except ValueError as error:
                yield (section, "global_batch_tokens"), str(error)
        if ranks > 1 and self.finetune:
            message = "'dynamic' depends on how much of a row a rank sees, so it does not work with"
            message += f" resources.sequence_parallel {ranks}"
            for place, rope in self.finetune.ropes().items():
                if rope.type == "dynamic":
                    yield ("finetune", *place, "type"), message

    def _variant_problems(self) -> Iterator[tuple[Location, str]]:
        finetuned = self.finetuned_arms()
        arms = [*finetuned, *self.pretrained_arms()]
        for name, variant in self.variants.items():
            place = ("variants", name)
            taken = [f"{name}.s{one.seed}" for one in finetuned.values() if one.of == variant.of]
            if twice := {*taken} & {*self.variants}:
                yield place, f"its seeds make a model {min(twice)}, which is also the name of a variant: rename one"
            if variant.of in self.baselines:
                yield (*place, "of"), f"{variant.of} is a baseline: add another baseline with this stretch"
            elif variant.of not in arms:
                yield (*place, "of"), f"no arm {variant.of!r}{nearest(variant.of, arms, 'the recipe has')}"
            elif variant.of in finetuned and self.finetune:
                own = self.finetune.rope_of(finetuned[variant.of].arm)
                if own == variant.rope:
                    message = (
                        f"{own.about()} is what {variant.of} was trained with: factor {own.factor:g} is relative to"
                    )
                    message += f" the base's length in both; for twice the arm's length use factor {2 * own.factor:g}"
                    yield (*place, "rope"), message

    def _evaluation_problems(self) -> Iterator[tuple[Location, str]]:
        known = [name for _, name in self.models()]
        for evaluation, section in self.evaluate.chosen().items():
            if not known:
                message = "nothing to evaluate: the recipe has no baselines and no arms"
                yield ("evaluate", evaluation), message
            for model in section.models or ():
                if model not in known:
                    hint = nearest(model, dict.fromkeys(known), "the recipe has")
                    yield ("evaluate", evaluation, "models"), f"no model {model!r}{hint}"
            splits = {split for _, _, splits in section.selected() for split in splits}
            if splits and not any(getattr(self.corpus, split) for split in splits):
                message = f"is empty, but evaluate.{evaluation} measures held-out documents: name some here"
                yield ("corpus", "test"), message


class SectionsDisagree(ValueError):
    """Sections that are valid on their own contradict each other; has (location, message) pairs."""

    def __init__(self, problems: list[tuple[Location, str]]) -> None:
        lines = (f"{dotted(location)}: {message}" for location, message in problems)
        super().__init__("; ".join(lines))
        self.problems = problems


def values(recipe: Recipe) -> Iterator[tuple[Location, Any]]:
    """Yield each value with its location in field order; a list of plain values counts as one
    value."""
    yield from _leaves(recipe.model_dump(mode="json"), ())


def _leaves(value: Any, location: Location) -> Iterator[tuple[Location, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*location, key))
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, (*location, index))
    else:
        yield location, value
