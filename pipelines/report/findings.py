"""What the report's inputs say: artifacts read once into models with their training, steps and scores.

gather({"convert": artifact, "evaluate[base,perplexity]": another}).ppl()[8192]["base"]["ppl"]
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from longreach.evaluation.base import Background
from longreach.evaluation.scores import EvalScores
from longreach.evaluation.sections import finite
from longreach.infra.artifact import Artifact
from longreach.pipelines.recipe import PriceRecipe
from longreach.training.summary import PackSummary, TrainingSummary

POINTS = 500
"""Steps of a run that are read for its curves."""
PERPLEXITY = "perplexity"
"""The evaluation by which models are compared: in the main table, the headline and the frontier."""
NOT_RUN = "not run, since "
"""How the reason of a stage begins that failed only because one before it did."""


@dataclass
class Model:
    """A baseline, a fine-tuned arm or a pretrained one, and what is known of it."""

    name: str
    kind: str
    """baseline, finetune or pretrain; `failed finetune` or `failed pretrain` where training did not end."""
    about: str
    """What was done to it, in a few words."""
    summary: TrainingSummary | None = None
    """What its training says of itself; None for a baseline and where training did not end."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """metrics.jsonl; of a long run about POINTS of its lines."""
    scores: dict[str, EvalScores] = field(default_factory=dict)
    """Scores without their cases, by evaluation."""

    def rows(self, evaluation: str, **where: Any) -> list[dict[str, Any]]:
        """Rows of an evaluation's scores whose columns have these values; none if it was not evaluated so."""
        return self.scores[evaluation].rows_with(**where) if evaluation in self.scores else []

    @property
    def training(self) -> TrainingSummary:
        """What its training says of itself, for models that were trained."""
        assert self.summary is not None, f"{self.name} was not trained"
        return self.summary

    def ratio(self, other: Model, cost: str) -> float:
        """This model's cost (a number of TrainingSummary) over another one's."""
        return getattr(self.training, cost) / getattr(other.training, cost)

    @property
    def rank_hours(self) -> float:
        """Wall clock of training times ranks."""
        return self.training.wall_s * self.training.ranks / 3600

    @property
    def mfu(self) -> float:
        """FLOPs that a step needs over what the ranks do in plain matrix products; NaN where they were not counted."""
        predicted, machine = self.training.predicted, self.training.machine
        if predicted is None or machine is None:
            return math.nan
        return predicted.flops / self.training.step_s_median / (machine.matmul * self.training.ranks)


@dataclass
class Found:
    """All that the inputs say."""

    artifacts: dict[str, Artifact]
    """By label, in the order of the graph."""
    base: dict[str, Any] = field(default_factory=dict)
    """Where the base comes from and what it is; empty if there is none."""
    packs: dict[str, PackSummary] = field(default_factory=dict)
    """How documents became rows, by label."""
    models: dict[str, Model] = field(default_factory=dict)
    prices: PriceRecipe = field(default_factory=PriceRecipe)
    failed: dict[str, str] = field(default_factory=dict)
    """Label -> why."""

    def of(self, *kinds: str) -> dict[str, Model]:
        """Models of these kinds."""
        return {name: model for name, model in self.models.items() if model.kind in kinds}

    def yardstick(self, tune: str) -> Model | None:
        """The first arm that trains `tune` under full attention: what others are measured against."""
        arms = (m for m in self.of("finetune").values() if m.training.arm.tune == tune)
        return next((m for m in arms if m.training.arm.attention.pattern == "causal"), None)

    @property
    def compared(self) -> dict[str, Model]:
        """The base's descendants, whose numbers compare."""
        return self.of("baseline", "finetune", "failed finetune")

    @property
    def trained(self) -> dict[str, Model]:
        """Those of them that training made, so that they have a cost."""
        return {name: model for name, model in self.compared.items() if model.summary}

    def ppl(self, protocol: str = "last_stride") -> dict[int, dict[str, dict[str, Any]]]:
        """Perplexity over all documents, by context length and model."""
        return by_length(self.models, PERPLEXITY, kind="pooled", protocol=protocol, domain="*")

    def scores_of(self, evaluation: str) -> dict[str, EvalScores]:
        """Return an evaluation's scores by the model's name."""
        return {name: model.scores[evaluation] for name, model in self.models.items() if evaluation in model.scores}

    def background(self) -> Background:
        """Return what the sections of evaluations should know beside scores."""
        return Background(self.base.get("context_length"), frozenset(self.compared))

    def greatest(self) -> tuple[int, dict[str, float]]:
        """The greatest length measured, and the compared models' perplexities there, best first; a NaN is last."""
        length = max(self.ppl(), default=0)
        ppl = {name: row["ppl"] for name, row in self.ppl().get(length, {}).items() if name in self.compared}
        return length, dict(sorted(ppl.items(), key=lambda item: item[1] if finite(item[1]) else math.inf))

    def last_tokens(self) -> str:
        """Which tokens the `last_stride` protocol scores."""
        counts = {scores.recipe["last_tokens"] for scores in self.scores_of(PERPLEXITY).values()}
        return f"last {' or '.join(str(count) for count in sorted(counts))} tokens"

    def where(self) -> str:
        """What ratios of speed depend on, as far as it is known."""
        rows = [f"rows of {pack.seq_len:,} tokens" for label, pack in self.packs.items() if label == "pack"]
        return ", ".join(rows + ([f"width {self.base['hidden']:,}"] if self.base else []))


def by_length(models: dict[str, Model], evaluation: str, **where: Any) -> dict[int, dict[str, dict[str, Any]]]:
    """Rows of an evaluation by length and model; `where` picks one for each."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for name, model in models.items():
        for row in model.rows(evaluation, **where):
            found.setdefault(row["length"], {})[name] = row
    return dict(sorted(found.items()))


def gather(
    artifacts: dict[str, Artifact], prices: PriceRecipe | None = None, failed: Mapping[str, str] | None = None
) -> Found:
    """Read what the artifacts hold, by label; any of them may be missing.

    Raises:
        ValueError: a file is not what it should be.
    """
    found, arms = Found(artifacts, prices=prices or PriceRecipe(), failed=dict(failed or {})), {}
    for label, artifact in artifacts.items():
        match artifact.stage:
            case "convert":
                # the first; another one is where a retraining starts
                found.base = found.base or artifact.summary["origin"] | artifact.summary
            case "pack":
                found.packs[label] = _pack_summary(artifact)
            case "finetune" | "pretrain" as kind:
                name = label.partition("[")[2].removesuffix("]")
                facts = TrainingSummary.model_validate(artifact.summary)
                steps = thinned((artifact.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
                arms[name] = Model(name, kind, about_arm(facts), facts, [json.loads(line) for line in steps])
            case "evaluate":
                choices = artifact.manifest["identity"]["recipe"]
                name = choices["model"]
                baseline = Model(name, "baseline", about_rope(choices["rope"]))
                model = arms.get(name) or found.models.setdefault(name, baseline)
                content = read(artifact, "scores.json", "rows", "summary", "protocol", "recipe")
                model.scores[choices["eval"]] = EvalScores(**content)
            case _:
                pass  # a stage without a section of its own is listed in "how it was run"
    found.models |= arms  # after the baselines
    for label, reason in found.failed.items():
        stage, _, rest = label.removesuffix("]").partition("[")
        name, _, evaluation = rest.partition(",")
        if stage in ("finetune", "pretrain"):
            found.models[name] = Model(name, f"failed {stage}", f"failed: {brief(reason)}")
        elif name in found.models and not reason.startswith(NOT_RUN):
            found.models[name].about += f"; {evaluation or stage} failed: {brief(reason)}"
    return found


def brief(reason: str) -> str:
    """Why a stage failed, in a table's cell: lack of memory by that name, else the first line, shortened."""
    if re.search(r"out ?of ?memory|low on memory|oom.?kill", reason, re.IGNORECASE):
        return "out of memory"
    return textwrap.shorten(next(iter(reason.splitlines()), "no reason given"), 100, placeholder=" …")


def thinned(lines: list[str]) -> list[str]:
    """Of a long run's steps about POINTS, evenly spread with the last; and as many of those that were measured more."""
    kept: set[int] = set()
    for needle in ("", '"validation_loss"', '"sink_mass"'):
        those = [n for n, line in enumerate(lines) if needle in line]
        kept.update(those[:: max(1, -(-len(those) // POINTS))], those[-1:])
    return [lines[n] for n in sorted(kept)]


def frontier(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points (x, y) that no other undercuts in one and equals in the other, by x: Pareto's frontier."""
    names, least = [], math.inf
    for name, (_, y) in sorted(points.items(), key=lambda item: item[1]):
        if y < least:
            names.append(name)
            least = y
    return names


def read(artifact: Artifact, name: str, *needed: str) -> dict[str, Any]:
    """A JSON object with at least the keys `needed`; ValueError says what it is instead."""
    path = artifact.path / name
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{artifact.manifest['label']}: {path} cannot be read: {error}") from error
    if missing := [key for key in needed if not isinstance(value, dict) or key not in value]:
        raise ValueError(f"{artifact.manifest['label']}: {path} has no {', '.join(missing)}")
    return value


def _pack_summary(artifact: Artifact) -> PackSummary:
    try:
        return PackSummary.read(artifact.path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{artifact.manifest['label']}: {error}") from error


def about_rope(rope: dict[str, Any] | None) -> str:
    """What was done to a baseline."""
    if rope is None:
        return "as trained"
    detail = f"{rope['theta']:,.0f}" if rope["type"] == "theta" else f"× {rope['factor']:g}"
    return f"not trained, RoPE {rope['type']} {detail}"


def about_arm(facts: TrainingSummary) -> str:
    """What was trained, and how."""
    if facts.kind == "pretrain":
        sinks = {
            "none": "no sink",
            "zero": "a zero sink",
            "token": "a sink token",
            "logit": "a learned sink logit a head",
        }
        return ("from scratch, " if facts.model else "from the base, ") + sinks[facts.sink]
    arm = facts.arm
    words = {"all": "all weights", "lora": f"LoRA r={arm.lora_rank}", "embed": "embeddings", "norm": "norms"}
    trained = " + ".join(words[part] for part in arm.tune.split("+"))
    return ", ".join(filter(None, [trained, arm.attention.about()]))
