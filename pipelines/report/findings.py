"""The report's inputs: read artifacts once into models with their training, steps and scores.

gather({"convert": artifact, "evaluate[base,perplexity]": another}).ppl()[8192]["base"]["ppl"]
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from longreach.evaluation.base import Background
from longreach.evaluation.scores import EvalScores
from longreach.evaluation.sections import finite
from longreach.infra.artifact import Artifact
from longreach.infra.files import digest_of
from longreach.infra.resources import Resources
from longreach.pipelines.artifacts import GAINS, Costs
from longreach.pipelines.recipe import PriceRecipe
from longreach.training.recipe import ArmRecipe, RopeRecipe
from longreach.training.summary import CostsSummary, HeldOutSummary, PackSummary, Spread, Summary, TrainingSummary

S = TypeVar("S", bound=Summary)

POINTS = 500  # maximum number of a training's steps to read for its curves, about
PROMPT_ENDS = 300  # number of characters to keep at each end of a long prompt
PERPLEXITY = "perplexity"
"""The evaluation that compares models in the main table, the headline and the frontier."""
NOT_RUN = "not run, since "  # prefix of the reason of a stage that failed only because an earlier one did


@dataclass
class Model:
    """A baseline, a fine-tuned or pretrained arm, or a variant, with the content of its
    artifacts."""

    name: str
    kind: str
    """baseline, finetune, pretrain or variant; `failed finetune` or `failed pretrain` if training
    failed."""
    about: str
    of: str = ""
    """The first model of the same arm: models with the same `of` differ only by seed. For an arm
    with one seed it is the model's own name; empty for a baseline."""
    variant_of: Model | None = None  # the arm that was stretched again after its training
    summary: TrainingSummary | None = None
    """Its training summary; None for a baseline, a variant and a failed training."""
    trained_on: str = ""
    """Description of the host and ranks of its training; empty if it was not trained."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """The lines of metrics.jsonl; of a long run only about POINTS."""
    scores: dict[str, EvalScores] = field(default_factory=dict)  # by evaluation; long prompts of cases are shortened
    weights: str = ""
    """The fingerprint of a baseline's model folder; empty for a trained model."""
    corpus: str = ""
    """The fingerprint of the HeldOutDocuments (in older runs: the PackedCorpus) that it was
    evaluated on."""
    stretched: bool = False
    """Whether a baseline is loaded with a stretch."""

    def rows(self, evaluation: str, **where: Any) -> list[dict[str, Any]]:
        """Return the rows of an evaluation's scores whose columns have these values; empty if it
        was not evaluated."""
        if evaluation not in self.scores:
            return []
        return self.scores[evaluation].rows_with(**where)

    def curve(self, key: str) -> list[tuple[float, float]]:
        """Return a metric of the training as (step, value), without steps that lack it."""
        return [(row["step"], row[key]) for row in self.steps if finite(row.get(key))]

    @property
    def training(self) -> TrainingSummary:
        """The training summary of a trained model."""
        assert self.summary is not None, f"{self.name} was not trained"
        return self.summary

    def ratio(self, other: Model, cost: str) -> float:
        """Return this model's cost (a field of TrainingSummary) as a multiple of another
        model's."""
        return getattr(self.training, cost) / getattr(other.training, cost)

    @property
    def rank_hours(self) -> float:
        return self.training.wall_s * self.training.ranks / 3600

    @property
    def mfu(self) -> float:
        """A step's FLOPs over what the ranks reach in plain matrix products in the same time; NaN
        if not counted."""
        predicted, machine = self.training.predicted, self.training.machine
        if predicted is None or machine is None:
            return math.nan
        return predicted.flops / self.training.step_s_median / (machine.matmul * self.training.ranks)


@dataclass(eq=False)  # compared by identity, because claim.py caches results per instance
class Findings:
    """The content of the report's inputs."""

    artifacts: dict[str, Artifact]
    base: dict[str, Any] = field(default_factory=dict)
    """The base's origin and description; empty if there is no base."""
    packs: dict[str, PackSummary] = field(default_factory=dict)  # summaries of packing, by label
    held_out: dict[str, HeldOutSummary] = field(default_factory=dict)  # summaries of held-out documents, by label
    models: dict[str, Model] = field(default_factory=dict)
    prices: PriceRecipe = field(default_factory=PriceRecipe)
    failed: dict[str, str] = field(default_factory=dict)  # failed stages: label -> reason
    costs: CostsSummary | None = None
    """Cost of the arms by row length; None if not measured."""

    def of(self, *kinds: str) -> dict[str, Model]:
        return {name: model for name, model in self.models.items() if model.kind in kinds}

    def yardstick(self, tune: str) -> Model | None:
        """Return the first arm that trains `tune` with full attention, with which others are
        compared."""
        for model in self.of("finetune").values():
            arm = model.training.arm
            if arm.tune == tune and arm.attention.pattern == "causal":
                return model
        return None

    def trained_alike(self, model: Model, other: Model) -> bool:
        """True if the speeds of two models are comparable: trained on the same machine with the
        same ranks, or measured in turns."""
        return model.trained_on == other.trained_on or self.in_turns(model, other) is not None

    def speedup(self, model: Model, other: Model) -> Spread:
        """Return the model's training speed as a multiple of another's.

        It comes from the measurements in turns if they include this row length; else it is the
        ratio of the two trainings, a single number.
        """
        return self.in_turns(model, other) or Spread.of([model.ratio(other, "tokens_per_s")])

    def in_turns(self, model: Model, other: Model) -> Spread | None:
        """Return the speed as a multiple of another arm's, measured in turns on rows of the
        training's length; None if not measured."""
        if self.costs is None or "pack" not in self.packs:
            return None
        return self.costs.times_as_fast(self.packs["pack"].seq_len, model.of, other.of)

    @property
    def compared(self) -> dict[str, Model]:
        """The models that come from the base, whose numbers are comparable."""
        compared = {}
        for name, model in self.models.items():
            of_trained = model.variant_of is not None and model.variant_of.kind == "finetune"
            if of_trained or model.kind in ("baseline", "finetune", "failed finetune"):
                compared[name] = model
        return compared

    @property
    def trained(self) -> dict[str, Model]:
        """The compared models that were trained, and therefore have a cost."""
        return {name: model for name, model in self.compared.items() if model.summary}

    def ppl(self, protocol: str = "last_stride") -> dict[int, dict[str, dict[str, Any]]]:
        """Return the rows of perplexity over all documents, by context length and model."""
        return by_length(self.models, PERPLEXITY, kind="pooled", protocol=protocol, domain="*")

    def scores_of(self, evaluation: str) -> dict[str, EvalScores]:
        return {name: model.scores[evaluation] for name, model in self.models.items() if evaluation in model.scores}

    def background(self) -> Background:
        base = self.plain_base()
        stretches = []
        for name, model in self.of("baseline").items():
            if base and model.stretched and model.weights == base.weights:
                stretches.append(name)
        arms: dict[str, list[str]] = {}
        for name, model in self.compared.items():
            if model.kind in ("finetune", "variant"):
                arms.setdefault(model.of, []).append(name)
        return Background(
            self.base.get("context_length"),
            frozenset(self.compared),
            base=base.name if base else None,
            stretches=tuple(stretches),
            arms={members[0]: tuple(members) for members in arms.values()},
        )

    def plain_base(self) -> Model | None:
        """Return the baseline that is the unchanged base, or None."""
        for name, model in self.of("baseline").items():
            if not model.stretched and name != "champion":  # a name reserved for the gate's champion
                return model
        return None

    def greatest(self) -> tuple[int, dict[str, float]]:
        """Return the greatest length measured, and the compared models' perplexities there, best
        first, NaN last."""
        by_length = self.ppl()
        length = max(by_length, default=0)
        ppl = {name: row["ppl"] for name, row in by_length.get(length, {}).items() if name in self.compared}
        return length, dict(sorted(ppl.items(), key=lambda item: item[1] if finite(item[1]) else math.inf))

    def last_tokens(self) -> str:
        """Return a phrase for the tokens that the `last_stride` protocol scores."""
        counts = {scores.recipe["last_tokens"] for scores in self.scores_of(PERPLEXITY).values()}
        return f"last {' or '.join(map(str, sorted(counts)))} tokens"

    def where(self) -> str:
        """Return the row length and model width, as far as known, on which speed ratios depend."""
        parts = []
        if "pack" in self.packs:
            parts.append(f"rows of {self.packs['pack'].seq_len:,} tokens")
        if self.base:
            parts.append(f"width {self.base['hidden']:,}")
        return ", ".join(parts)


def by_length(models: dict[str, Model], evaluation: str, **where: Any) -> dict[int, dict[str, dict[str, Any]]]:
    """Return an evaluation's rows by length and model; `where` must select one row for each."""
    lengths: dict[int, dict[str, dict[str, Any]]] = {}
    for name, model in models.items():
        for row in model.rows(evaluation, **where):
            lengths.setdefault(row["length"], {})[name] = row
    return dict(sorted(lengths.items()))


def gather(
    artifacts: Mapping[str, Artifact], prices: PriceRecipe | None = None, failed: Mapping[str, str] | None = None
) -> Findings:
    """Read the artifacts, given by label, of which any may be missing; ValueError names a malformed
    file."""
    findings = Findings(dict(artifacts), prices=prices or PriceRecipe(), failed=dict(failed or {}))
    arms: dict[str, Model] = {}
    firsts: dict[str, Model] = {}  # the first of the models that differ only by seed
    for label, artifact in artifacts.items():
        if artifact.stage == "convert" and not findings.base:  # a second one is the start of a retraining
            findings.base = artifact.summary["origin"] | artifact.summary
        elif artifact.stage == "pack":
            findings.packs[label] = _summary(PackSummary, artifact)
        elif artifact.stage == "hold_out":
            findings.held_out[label] = _summary(HeldOutSummary, artifact)
        elif artifact.stage == "costs":
            findings.costs = Costs(artifact.path, artifact.manifest).measured
        elif artifact.stage in ("finetune", "pretrain"):
            name = _model_of(label)
            arms[name] = _arm(name, artifact)
            first = firsts.setdefault(_but_for_its_seed(artifact), arms[name])
            arms[name].of = first.name
    finetuned = [arm for arm in arms.values() if arm.kind == "finetune"]
    if len({arm.training.rope for arm in finetuned}) > 1:
        for arm in finetuned:
            arm.about += f", from {arm.training.rope.about()}"
    seeds = Counter(arm.of for arm in arms.values())
    for arm in arms.values():
        if seeds[arm.of] > 1:
            arm.about += f", seed {arm.training.seed}"
    variants = {variant.name: variant for variant in _variants(artifacts, arms)}
    for artifact in artifacts.values():
        if artifact.stage == "evaluate":
            choices = artifact.manifest["identity"]["recipe"]
            name = choices["model"]
            model = arms.get(name) or variants.get(name) or findings.models.get(name)
            if model is None:
                model = findings.models[name] = Model(name, "baseline", about_rope(choices["rope"]))
                model.weights = artifact.manifest["identity"]["inputs"]["model"]
                model.stretched = choices["rope"] is not None
            model.corpus = artifact.manifest["identity"]["inputs"]["corpus"]
            content = read(artifact, "scores.json", "eval", "rows", "summary", "protocol", "recipe")
            fields = {one.name for one in dataclasses.fields(EvalScores)}
            known = {key: content[key] for key in fields & content.keys()}
            model.scores[choices["eval"]] = EvalScores(**known, cases=cases_of(artifact))
    findings.models |= arms | variants  # after the baselines
    for label, reason in findings.failed.items():
        _note_failure(findings, label, reason)
    return findings


def _arm(name: str, artifact: Artifact) -> Model:
    try:
        summary = TrainingSummary.model_validate(artifact.summary)
    except ValueError as error:  # written by another version of longreach
        raise ValueError(
            f"{artifact.manifest['label']}: its summary is of another version of longreach: {error}"
        ) from error
    steps = thinned((artifact.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return Model(
        name, artifact.stage, about_arm(summary), summary=summary, trained_on=_place(artifact.manifest),
        steps=[json.loads(line) for line in steps],
    )  # fmt: skip


def _place(manifest: Mapping[str, Any]) -> str:
    """Describe where a training ran, as far as its speed depends on it.

    Resources are not part of a fingerprint, so they may differ between arms of one report.
    """
    usual = Resources().model_dump(mode="json")  # values for fields that an older manifest does not have
    asked = usual | manifest["resources"]
    ranks = f"{asked['workers']} ranks of {asked['cpus_per_worker']} CPU and {asked['gpus_per_worker']} GPU"
    rest = f"{asked['dtype']}, products {asked['matmul_precision']}, ZeRO {asked['zero_stage']}"
    return f"{manifest['host']}, {ranks}, {rest}"


def _variants(artifacts: Mapping[str, Artifact], arms: dict[str, Model]) -> Iterator[Model]:
    """Yield the variants: arms' models with another stretch after their training."""
    made = {artifact.fingerprint: label for label, artifact in artifacts.items()}
    firsts: dict[tuple[str, RopeRecipe], str] = {}  # the first of the variants of one arm's seeds
    for label, artifact in artifacts.items():
        if artifact.stage != "stretch":
            continue
        identity = artifact.manifest["identity"]
        rope = RopeRecipe.model_validate(identity["recipe"]["rope"])
        name, arm = _model_of(label), arms.get(_model_of(made.get(identity["inputs"]["model"], "")))
        about, of = f"stretched after its training, {rope.about()}", name
        if arm:
            about, of = f"{arm.name} {about}", firsts.setdefault((arm.of, rope), name)
        yield Model(name, "variant", about, of, variant_of=arm)


def _model_of(label: str) -> str:
    """Return the model's name in a stage's label: `lora` in `merge[lora]`."""
    return label.partition("[")[2].removesuffix("]")


def _but_for_its_seed(artifact: Artifact) -> str:
    """Return a digest of a training's identity without its seed, and without the gains of its rows,
    which the seed selects."""
    identity = artifact.manifest["identity"]
    inputs = {name: made for name, made in identity["inputs"].items() if name != GAINS}
    return digest_of(identity | {"recipe": identity["recipe"] | {"seed": None}, "inputs": inputs})


def _note_failure(findings: Findings, label: str, reason: str) -> None:
    """Add an arm whose training failed, or add to a model's description that another stage of it
    failed."""
    stage, _, rest = label.removesuffix("]").partition("[")
    name, _, evaluation = rest.partition(",")
    if stage in ("finetune", "pretrain"):
        findings.models[name] = Model(name, f"failed {stage}", f"failed: {brief(reason)}")
    elif name in findings.models and not reason.startswith(NOT_RUN):
        findings.models[name].about += f"; {evaluation or stage} failed: {brief(reason)}"


def brief(reason: str) -> str:
    """Return a reason for a table cell: "out of memory" if it is that, else the shortened first
    line."""
    if re.search(r"out ?of ?memory|low on memory|oom.?kill", reason, re.IGNORECASE):
        return "out of memory"
    return textwrap.shorten(next(iter(reason.splitlines()), "no reason given"), 100, placeholder=" …")


def thinned(lines: list[str]) -> list[str]:
    """Return about POINTS evenly spaced lines of a long run, including the last one.

    Lines with a validation loss or a sink mass are rare, so about POINTS of each of these are kept
    too.
    """
    kept: set[int] = set()
    for mark in ("", '"validation_loss"', '"sink_mass"'):
        numbers = [n for n, line in enumerate(lines) if mark in line]
        every = max(1, math.ceil(len(numbers) / POINTS))
        kept.update(numbers[::every], numbers[-1:])
    return [lines[n] for n in sorted(kept)]


def frontier(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names on the Pareto frontier by x: no other point (x, y) is at least as good in
    both and better in one."""
    names: list[str] = []
    least = math.inf
    for name, (_, y) in sorted(points.items(), key=lambda item: item[1]):
        if y < least:
            names.append(name)
            least = y
    return names


def read(artifact: Artifact, name: str, *needed: str) -> dict[str, Any]:
    """Read a JSON object that must have the keys `needed`; ValueError names the missing ones."""
    path = artifact.path / name
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{artifact.manifest['label']}: {path} cannot be read: {error}") from error
    missing = list(needed)
    if isinstance(value, dict):
        missing = [key for key in needed if key not in value]
    if missing:
        raise ValueError(f"{artifact.manifest['label']}: {path} has no {', '.join(missing)}")
    return value


def cases_of(artifact: Artifact) -> list[dict[str, Any]]:
    """Return an evaluation's cases, with only the ends of long prompts, because a thousand whole
    ones would fill the memory. ValueError if a line is not JSON."""
    path = artifact.path / "cases.jsonl"
    if not path.is_file():
        return []
    cases = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                case = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{artifact.manifest['label']}: {path} cannot be read: {error}") from error
            if len(case.get("prompt", "")) > 2 * PROMPT_ENDS:
                case["prompt"] = f"{case['prompt'][:PROMPT_ENDS]} […] {case['prompt'][-PROMPT_ENDS:]}"
            cases.append(case)
    return cases


def _summary(kind: type[S], artifact: Artifact) -> S:
    """Read a summary's file; ValueError names the stage whose file cannot be read."""
    try:
        return kind.read(artifact.path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{artifact.manifest['label']}: {error}") from error


def about_rope(rope: dict[str, Any] | None) -> str:
    if rope is None:
        return "as trained"
    return f"not trained, {RopeRecipe.model_validate(rope).about()}"


def _about_lora(arm: ArmRecipe) -> str:
    """Return LoRA's rank, and the differences from plain LoRA."""
    parts = [f"LoRA r={arm.lora_rank}"]
    if arm.use_dora:
        parts.append("DoRA")
    if arm.use_rslora:
        parts.append("rsLoRA")
    if arm.init_lora_weights == "pissa":
        parts.append("PiSSA")
    if arm.lora_plus_ratio:
        parts.append(f"B at {arm.lora_plus_ratio:g} × A's rate")
    return ", ".join(parts)


def about_arm(facts: TrainingSummary) -> str:
    if facts.kind == "pretrain":
        sinks = {
            "none": "no sink",
            "zero": "a zero sink",
            "token": "a sink token",
            "logit": "a learned sink logit per head",
        }
        parts = ["from the base"]
        if facts.model:
            parts = ["from scratch"]
        parts.append(sinks[facts.sink])
        if facts.train == "sink":
            parts.append("only the sink is trained")
        parts.append(facts.attention.about())
        return ", ".join(filter(None, parts))
    arm = facts.arm
    words = {"all": "all weights", "lora": _about_lora(arm), "embed": "embeddings", "norm": "norms"}
    parts = [" + ".join(words[part] for part in arm.tune.split("+")), arm.attention.about()]
    if arm.positions:
        parts.append(arm.positions.about())
    for stage in arm.curriculum:
        parts.append(stage.about())
    losses = {"exact": "loss by effective context (EXACT)", "long_ce": "loss by gain from context (LongCE)"}
    parts.append(losses.get(arm.objective, ""))
    return ", ".join(filter(None, parts))
