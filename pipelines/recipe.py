"""The recipe's schema: each choice of a pipeline with its meaning and default, and how sections
agree.

pipelines/reader.py reads recipes from files. `longreach config schema` prints these classes for
editors, and docs/hooks.py makes the reference from them: the text below a field is what users read.

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
from longreach.infra.choices import Choices, Location, PathOrUrl, dotted, nearest
from longreach.infra.resources import Resources
from longreach.pipelines.costs import CostsRecipe
from longreach.pipelines.gate import PromoteRecipe
from longreach.pipelines.hand_over import HandOverRecipe
from longreach.training.recipe import (
    PACKAGE,
    BaseRecipe,
    CorpusRecipe,
    FinetuneRecipe,
    PretrainArm,
    PretrainRecipe,
    RopeRecipe,
    SeededArm,
    VariantRecipe,
)

SAFE_NAME = re.compile(r"[a-z0-9][a-z0-9._+-]*")  # names that become names of folders and files


class _Evaluations(Choices):
    """What is measured: each evaluation that has a section runs on the models that the section
    names."""

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
else:  # an evaluation needs its line in EVALS and none here: its section is a field of its name
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
    """Where artifacts live. Not part of identity: another root gives the same fingerprints."""

    root: PathOrUrl = ".longreach"
    """Store of artifacts: a folder or any fsspec URL (s3://bucket/prefix)."""
    workdir: PathOrUrl = ".longreach"
    """This machine's own folder: scratch files, spooled metrics and the embedded MLflow store."""


class PriceRecipe(Choices):
    """What a training rank costs: with it the report shows money and energy, from wall-clock
    time."""

    price_per_hour: float | None = Field(default=None, gt=0)
    """Price of one rank for an hour, in `currency`."""
    currency: str = "USD"
    """Name of the price's currency; it is only shown."""
    watts: float | None = Field(default=None, gt=0)
    """Mean power draw of one rank in watts, to estimate energy; it is not measured."""


class TrackingRecipe(Choices):
    """Where MLflow is. Not part of identity, and no run waits for it: metrics are spooled first."""

    uri: str | None = None
    """Tracking server; without it, an SQLite store in store.workdir (`longreach ui` shows it)."""
    enabled: bool = True
    """False: metrics are spooled but not sent; `longreach sync` sends them later."""


class Recipe(Choices):
    """A whole pipeline: documents, rows, arms, evaluations, and where they run."""

    name: str = Field(pattern=rf"^{SAFE_NAME.pattern}$")
    """Name of the pipeline run: lower-case letters, digits and . _ + -."""
    experiment: str = "longreach"
    """Name of MLflow's experiment."""
    seed: int = Field(default=0, ge=0)
    """Seeds initialisation, row order and LoRA; evaluations have seeds of their own."""
    base: BaseRecipe = BaseRecipe()
    """The model that is extended."""
    corpus: CorpusRecipe
    """Documents and their split."""
    baselines: dict[str, RopeRecipe] = Field(default_factory=dict)
    """Untrained variants of the base, by name: evaluated beside the arms."""
    finetune: FinetuneRecipe | None = None
    """Context extension; left out, nothing is fine-tuned."""
    pretrain: PretrainRecipe | None = None
    """Pretraining that compares attention sinks; left out, nothing is pretrained."""
    variants: dict[str, VariantRecipe] = Field(default_factory=dict)
    """Trained arms under another stretch than their own, by name: evaluated beside the arms."""
    evaluate: EvaluateRecipe = EvaluateRecipe()
    """Which evaluations measure which models."""
    costs: CostsRecipe | None = None
    """What a step costs by row length; left out, it is not measured."""
    promote: PromoteRecipe | None = None
    """The gate to production; left out, nothing is promoted."""
    release: HandOverRecipe = HandOverRecipe()
    """The forms in which arms' models leave, and where one is pushed to."""
    report: PriceRecipe = PriceRecipe()
    """Prices, for the report's columns of cost."""
    resources: Resources = Resources()
    """Where it runs; not part of identity."""
    store: StoreRecipe = StoreRecipe()
    """Where artifacts live; not part of identity."""
    tracking: TrackingRecipe = TrackingRecipe()
    """Where MLflow is; not part of identity."""

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
        """Return every training of the section `finetune` by its model's name; none without it."""
        if self.finetune is None:
            return {}
        return self.finetune.seeded_arms()

    def pretrained_arms(self) -> dict[str, PretrainArm]:
        """Return the arms of the section `pretrain` by name; none without it."""
        if self.pretrain is None:
            return {}
        return self.pretrain.arms

    def seeded_variants(self) -> dict[str, VariantRecipe]:
        """Return every variant by its model's name: of an arm with several seeds there is one for
        each."""
        variants = {}
        for name, variant in self.variants.items():
            for seed in self._seeds_of(variant.of):
                variants[f"{name}{seed}"] = variant.model_copy(update={"of": f"{variant.of}{seed}"})
        return variants

    def measured_by(self, section: EvalChoices) -> list[str]:
        """Return the models that an evaluation's section means: all, or those that it names, where
        an arm's or a variant's name stands for all its seeds."""
        if not section.models:
            return [name for _, name in self.models()]
        models = []
        for name in section.models:
            arm = self.variants[name].of if name in self.variants else name
            models += [f"{name}{seed}" for seed in self._seeds_of(arm)]
        return list(dict.fromkeys(models))

    def _seeds_of(self, arm: str) -> list[str]:
        """Return what the names of an arm's models have behind the arm's: nothing for the first
        seed, then `.s1`."""
        seeds = []
        for model, training in self.finetuned_arms().items():
            if training.of == arm:
                seeds.append(model.removeprefix(arm))
        return seeds or [""]

    def local_paths(self) -> dict[str, str]:
        """Return what may name a file or folder of this machine, by dotted field."""
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
        """Return the name of the baseline that is the base as it is, if there is one."""
        return next((name for name, rope in self.baselines.items() if rope.type == "none"), None)

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        problems = [*self._name_problems(), *self._base_problems(), *self._parallel_problems()]
        problems += [*self._variant_problems(), *self._evaluation_problems()]
        for section in (self.costs, self.promote, self.release):
            if section:
                problems += section.problems(self)
        if problems:
            raise SectionsDisagree(problems)
        return self

    def _name_problems(self) -> Iterator[tuple[Location, str]]:
        sections: dict[str, Location] = {}
        for section, name in self.models():
            if not SAFE_NAME.fullmatch(name):
                message = "names a folder: use lower-case letters, digits and . _ + - only"
                yield (*section, name), message
            if name in sections:
                taken = f"{dotted(sections[name])}.{name}"
                yield (*section, name), f"the name is taken by {taken}; each model needs its own"
            sections.setdefault(name, section)

    def _base_problems(self) -> Iterator[tuple[Location, str]]:
        arm = self.base.pretrained_arm
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
            message = "is made from the base itself: give pretrain a model and a vocab_size of its own"
            yield place, f"{self.base.source!r} {message}"
        elif arms[arm].sink == "token":
            message = "has a sink token, which finetune would not put into its rows: take an arm without one"
            yield place, f"{self.base.source!r} {message}"

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
            message = "'dynamic' depends on how much of a row a rank sees: not with"
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
                yield place, f"its seeds make a model {min(twice)}, and so is another variant called: rename it"
            if variant.of in self.baselines:
                yield (*place, "of"), f"{variant.of} is a baseline: give the stretch to a baseline of its own"
            elif variant.of not in arms:
                yield (*place, "of"), f"no arm {variant.of!r}{nearest(variant.of, arms, 'the recipe has')}"
            elif variant.of in finetuned and self.finetune:
                own = self.finetune.rope_of(finetuned[variant.of].arm)
                if own == variant.rope:
                    message = f"{own.about()} is what {variant.of} was trained with: factor {own.factor:g} counts from"
                    message += f" the base's length in both; twice the arm's length is factor {2 * own.factor:g}"
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


class SectionsDisagree(ValueError):
    """Sections that are valid alone do not fit together; carries (location, message) pairs."""

    def __init__(self, problems: list[tuple[Location, str]]) -> None:
        lines = (f"{dotted(location)}: {message}" for location, message in problems)
        super().__init__("; ".join(lines))
        self.problems = problems


def values(recipe: Recipe) -> Iterator[tuple[Location, Any]]:
    """Yield each value with its location, in the order of fields; a list of plain values is one."""
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
