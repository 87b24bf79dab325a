"""The gate: rules that a model must satisfy to become champion. If it does not, no alias moves.

Perplexities are compared token by token: challenger, champion and base read the same held-out
texts, and the ratio's 95% confidence interval is over documents, or over pieces of the text if there
is only one (evaluation/scores.py). By default the whole interval must satisfy a rule, so a
challenger that is only possibly as good is refused. A refusal is a result: it is published, printed
to stderr and shown in MLflow, and the command exits with code 3.

    longreach run retrain && longreach rollback smollm2-retrained
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from longreach.evaluation import EVALS
from longreach.infra import registry
from longreach.infra.artifact import Artifact
from longreach.infra.choices import Choices, Location, New, nearest
from longreach.pipelines.artifacts import Decision, Release, verdict
from longreach.pipelines.kind import StageRun, stage

if TYPE_CHECKING:
    from longreach.evaluation.scores import Difference
    from longreach.pipelines.graph import Pipeline
    from longreach.pipelines.recipe import Recipe
    from longreach.pipelines.stage import Stage

Rows = list[dict[str, Any]]


class PromoteRecipe(Choices):
    """The gate: which arm may become champion of a registered model, and the rules it must
    satisfy."""

    model: str
    """Name of the arm that is the challenger."""
    name: str = Field(pattern=r"^[^/:@']+$")
    """Name of the registered model. Its alias `champion` moves to the challenger, and the former
    champion becomes `previous`."""
    start_from: Literal["base", "champion"] = "base"
    """What fine-tuning starts from: `base`, or the champion once there is one."""
    target_length: int | None = Field(default=None, ge=2)
    """Context length in tokens at which the challenger's perplexity is compared with the
    champion's, and its gain with the base's. Default: the maximum of evaluate.perplexity.lengths,
    or of evaluate.gain.lengths if perplexity is not measured."""
    perplexity_ratio: float | None = Field(default=1.01, gt=0)
    """Maximum ratio of its perplexity to the champion's, in each interval between measured lengths
    up to target_length."""
    base_ratio: float | None = Field(default=1.02, gt=0)
    """Maximum ratio of its perplexity to the base's, in each interval between measured lengths that
    the base was trained to."""
    gain_over_base: New[float | Literal["auto"] | None] = "auto"
    """Minimum gain in nats per token over the base at its best own length, on the same held-out
    tokens, with target_length tokens of context. A value below 0 is how much worse it may be. auto:
    0 if evaluate.gain measures both, else no rule."""
    gain_over_stretches: New[float | Literal["auto"] | None] = "auto"
    """Minimum gain over each untrained stretch of the base, at target_length too, because such an
    extension costs nothing. auto: 0 if evaluate.gain measures both, else no rule."""
    passkey: float | None = Field(default=None, ge=0, le=1)
    """Minimum share of keys that it must find, at every measured length up to target_length."""
    effective_length: int | None = Field(default=None, ge=1)
    """Minimum length in tokens up to which it must find the share `passkey` (default 0.9) of the
    keys."""
    certainty: Literal["interval", "estimate"] = "interval"
    """interval: the whole 95% confidence interval of a ratio or gain must satisfy its rule;
    estimate: only the point estimate."""

    def problems(self, recipe: Recipe) -> Iterator[tuple[Location, str]]:
        """Yield mistakes in relation to other sections, such as rules whose measure is not
        evaluated."""
        sections = {name: section for section, name in recipe.models()}
        arms = [name for name, section in sections.items() if section not in (("baselines",), ("variants",))]
        if self.model not in arms:
            hint = nearest(self.model, arms, "the recipe has")
            yield ("promote", "model"), f"no arm {self.model!r}{hint}"
            return
        finetuned = sections[self.model] == ("finetune", "arms")
        if self.start_from == "champion" and not finetuned:
            message = "'champion' is only for fine-tuned arms"
            advice = "set promote.start_from to base, or promote.model to such an arm"
            yield ("promote", "start_from"), f"{message}, but {self.model} is not one: {advice}"
        if self.start_from == "champion" and finetuned:
            yield from self._other_stretches(recipe)
        if self.base_ratio is not None and not finetuned:
            message = f"{self.model} was not made from the base: set promote.base_ratio to null"
            yield ("promote", "base_ratio"), message
        if not finetuned:
            for rule in self._gain_rules(recipe):
                message = f"{self.model} was not made from the base: set promote.{rule} to null"
                yield ("promote", rule), message
        if recipe.base.source.startswith(f"models:/{self.name}@"):
            advice = "give the first base here, and set promote.start_from to champion"
            yield ("base", "source"), f"each promotion would change it: {advice}"
        yield from self._unmeasured(recipe)
        yield from self._lengths_that_do_not_fit(recipe)

    def _other_stretches(self, recipe: Recipe) -> Iterator[tuple[Location, str]]:
        """Yield the arms that cannot start from the champion, because its stretch differs from
        theirs."""
        assert recipe.finetune is not None
        champions = recipe.finetune.rope_of(recipe.finetune.seeded_arms()[self.model].arm)
        for name, arm in recipe.finetune.every_arm().items():
            rope = recipe.finetune.rope_of(arm)
            if rope != champions:
                message = f"has the stretch {rope.about()}, but promote.start_from champion needs {self.model}'s"
                message += f" {champions.about()}: give it the same, or start from base"
                yield ("finetune", "arms", name), message

    def asks_for_gain(self, recipe: Recipe) -> bool:
        """Whether gain_over_base is a rule of this recipe."""
        if self.gain_over_base != "auto":
            return self.gain_over_base is not None
        models = self._measured(recipe, "gain_over_base")
        return self.model in models and recipe.plain_baseline() in models

    def stretches(self, recipe: Recipe) -> list[str]:
        """Return the untrained stretches for gain_over_stretches; empty if that rule does not
        apply."""
        models = self._measured(recipe, "gain_over_stretches")
        if self.gain_over_stretches is None or self.model not in models:
            return []
        return [name for name, rope in recipe.baselines.items() if rope.type != "none" and name in models]

    def _gain_rules(self, recipe: Recipe) -> list[str]:
        """Return which of the two gain rules apply to this recipe."""
        rules = []
        if self.asks_for_gain(recipe):
            rules.append("gain_over_base")
        if self.stretches(recipe):
            rules.append("gain_over_stretches")
        return rules

    def _measured(self, recipe: Recipe, rule: str) -> list[str]:
        """Return the models on which a recipe runs the evaluation of a rule."""
        section = recipe.evaluate.chosen().get(MEASURED_BY[rule])
        if section is None:
            return []
        return recipe.measured_by(section)

    def _unmeasured(self, recipe: Recipe) -> Iterator[tuple[Location, str]]:
        """Yield the rules whose evaluation the recipe does not run on the compared models."""
        rules = [rule for rule in MEASURED_BY if getattr(self, rule) not in (None, "auto")]
        if not rules and not self._gain_rules(recipe):
            advice = f"set one of {', '.join(MEASURED_BY)}"
            yield ("promote",), f"has no rule, so every model would pass: {advice}"
        for rule in rules:
            evaluation = MEASURED_BY[rule]
            measured = self._measured(recipe, rule)
            compared = self.model
            if rule == "gain_over_stretches" and not self.stretches(recipe):
                advice = "add a stretch to baselines and to its models, or set the rule to null"
                yield ("promote", rule), f"needs evaluate.{evaluation} of {self.model} and of a stretch: {advice}"
                continue
            if rule in ("base_ratio", "gain_over_base"):
                compared = recipe.plain_baseline() or ""
                if not compared:
                    advice = "add `base: {}` to baselines"
                    yield ("promote", rule), f"needs the untrained base to compare with: {advice}"
                if measured and self.model not in measured:
                    yield ("promote", rule), f"needs evaluate.{evaluation} of {self.model} too"
            if compared and compared not in measured:
                advice = f"add it, or set promote.{rule} to null"
                yield ("promote", rule), f"needs evaluate.{evaluation} of {compared}: {advice}"

    def _lengths_that_do_not_fit(self, recipe: Recipe) -> Iterator[tuple[Location, str]]:
        ratios, keys = MEASURED_BY["perplexity_ratio"], MEASURED_BY["effective_length"]
        lengths, key_lengths = lengths_of(recipe, ratios), lengths_of(recipe, keys)
        target = self.target_length or max(lengths, default=0)
        if self.passkey is not None and key_lengths and target and min(key_lengths) > target:
            message = f"no length of evaluate.{keys}.lengths {list(key_lengths)} is within target_length {target}"
            yield ("promote", "passkey"), f"{message}: add a shorter one, or set promote.passkey to null"
        if self.effective_length and key_lengths and self.effective_length > max(key_lengths):
            message = f"{self.effective_length} is more than the maximum of"
            message += f" evaluate.{keys}.lengths {list(key_lengths)}"
            yield ("promote", "effective_length"), f"{message}: add a greater length, or lower it"
        trained = recipe.trained_length()
        if self.base_ratio is not None and lengths and trained and min(lengths) > trained:
            yield ("promote", "base_ratio"), _beyond_base(lengths, trained)
        gains = MEASURED_BY["gain_over_base"]
        gain_lengths = lengths_of(recipe, gains)
        gain_rules = self._gain_rules(recipe)
        if gain_rules and gain_lengths and target and target not in gain_lengths:
            message = f"needs target_length {target} in evaluate.{gains}.lengths {list(gain_lengths)}"
            yield ("promote", gain_rules[0]), f"{message}: add it, change target_length, or set the rule to null"
        if self.target_length and lengths and self.target_length not in lengths:
            message = f"{self.target_length} is not in evaluate.{ratios}.lengths {list(lengths)}"
            yield ("promote", "target_length"), f"{message}: add it there, or choose one of these"


MEASURED_BY = {rule: name for name, evaluation in EVALS.items() for rule in evaluation.gate}
"""Rule -> the evaluation that it uses."""
STRETCH = "stretch:"
"""Prefix of an untrained stretch's role among the gate's inputs."""


class PromoteStageRecipe(Choices):
    """One decision of the gate."""

    rules: PromoteRecipe
    """The recipe's section `promote`."""
    champion: str | None
    """Version of the champion to compare with; None if there is none yet."""
    lengths: tuple[int, ...]
    """Context lengths in tokens at which perplexity was measured."""


@dataclass(frozen=True)
class Finding:
    """Whether one rule was satisfied in one comparison."""

    rule: str  # the recipe's field, with the length and the model of the comparison
    measured: str
    required: str
    passed: bool


def add_gate(pipeline: Pipeline) -> None:
    """Add the champion's stages and the decision, unless the release is champion already or the
    pipeline is not gated."""
    from longreach.pipelines.stage import Stage

    gate, champion = pipeline.recipe.promote, pipeline.champion
    if gate is None or not pipeline.gated:
        return
    (release,) = (stage for stage in pipeline.stages if stage.label == f"release[{gate.model}]")
    if champion and _is_champion(pipeline, release):
        return
    ratios = MEASURED_BY["perplexity_ratio"]
    inputs = {"model": release}
    for evaluation, scores in pipeline.scores_of(gate.model).items():
        if evaluation in MEASURED_BY.values():
            inputs[f"challenger_{evaluation}"] = scores
    baseline = pipeline.scores_of(pipeline.recipe.plain_baseline() or "")
    if ratios in baseline:
        inputs[f"base_{ratios}"] = baseline[ratios]
    gains = MEASURED_BY["gain_over_base"]
    if gate.asks_for_gain(pipeline.recipe):
        inputs[f"base_{gains}"] = baseline[gains]
    for name in gate.stretches(pipeline.recipe):
        inputs[f"{STRETCH}{name}_{gains}"] = pipeline.scores_of(name)[gains]
    if gate.base_ratio or f"base_{gains}" in inputs:
        inputs["base"] = pipeline.base
    if champion and gate.perplexity_ratio is not None:
        inputs[f"champion_{ratios}"] = _champions_scores(pipeline, ratios, pipeline.documents_for(gate.model))
    choices = PromoteStageRecipe(
        rules=gate, champion=champion and str(champion.version), lengths=lengths_of(pipeline.recipe, ratios)
    )
    pipeline.stages.append(Stage("promote", "promote", choices, inputs))


def _is_champion(pipeline: Pipeline, release: Stage) -> bool:
    """True if the champion has the release's fingerprint and, if `published` is known, is that very
    artifact: one that was remade, after --force or in another store, has other bytes."""
    tags = pipeline.champion.tags
    if tags.get(registry.FINGERPRINT) != release.fingerprint:
        return False
    if pipeline.published is None:
        return True
    published = pipeline.published(release)
    return published is not None and published.summary["tags"][registry.MODEL] == tags.get(registry.MODEL)


def _champions_scores(pipeline: Pipeline, evaluation: str, documents: Stage) -> Stage:
    """Add the champion and its evaluation on the challenger's documents, and return the evaluation."""
    from longreach.pipelines.evaluate import EvaluateStageRecipe
    from longreach.pipelines.stage import Stage
    from longreach.training.recipe import BaseRecipe

    champion = pipeline.champion
    source = BaseRecipe(source=f"models:/{champion.name}/{champion.version}")
    model = pipeline.add(pipeline.converted("convert[champion]", source))  # it is there if training started from it
    section = pipeline.recipe.evaluate.chosen()[evaluation].model_copy(update={"models": None})
    choices = EvaluateStageRecipe(eval=evaluation, model="champion", choices=section)
    inputs = {"model": model, "corpus": documents}
    scores = Stage("evaluate", f"evaluate[champion,{evaluation}]", choices, inputs)
    pipeline.stages.append(scores)
    return scores


def lengths_of(recipe: Recipe, evaluation: str) -> tuple[int, ...]:
    """Return the lengths in tokens at which a recipe runs an evaluation; empty if it does not."""
    return tuple(getattr(recipe.evaluate.chosen().get(evaluation), "lengths", ()))


@stage(makes=Decision, revision=1, cpus=lambda resources: 1)
def promote(
    model: Release, inputs: Mapping[str, Artifact], *, recipe: PromoteStageRecipe, out: Path, run: StageRun
) -> dict[str, Any]:
    """Decide, write gate.json and gate.md, and move the alias if all rules are satisfied.

    Args:
        inputs: Scores named ROLE_EVALUATION, and the model `base`, whose context length base_ratio
            and gain_over_base need. An untrained stretch's role is STRETCH plus its name.

    Raises:
        ValueError: The rules do not fit the measurements, or the registry does not answer.
        AliasMoved: Another model became champion in the meantime.
    """
    rows, context = {}, 0
    for name, artifact in inputs.items():
        if name == "base":
            context = artifact.summary["context_length"]
        else:
            rows[name] = _rows(artifact)
    findings = decide(recipe.rules, recipe.lengths, context, **rows)
    if taken_back := registry.rolled_back(recipe.rules.name, model.fingerprint):
        required = f"a release that nobody rolled back (tag {registry.ROLLED_BACK})"
        findings.append(Finding("rollback", f"version {taken_back} was rolled back", required, False))
    refusals = []
    for finding in findings:
        if not finding.passed:
            refusals.append(f"{finding.rule}: {finding.measured}, required: {finding.required}")
    decision = {"passed": not refusals, "refusals": refusals, "name": recipe.rules.name, "champion": recipe.champion}
    if not refusals:
        decision["version"] = _move(recipe, model, run)
    record = {**decision, "findings": [asdict(finding) for finding in findings]}
    (out / "gate.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (out / "gate.md").write_text(_page(recipe, decision, findings), encoding="utf-8")
    tags = model.tags  # MLflow lists a refused model too, but without its files
    run.spool.model(recipe.rules.name, tags[registry.MODEL], model.metrics, tags=tags)
    run.spool.artifact(out / "gate.md")
    run.spool.tag("gate", verdict(refusals))
    return decision


def decide(rules: PromoteRecipe, lengths: tuple[int, ...], base_context: int, **rows: Rows) -> list[Finding]:
    """Apply each rule; ValueError if all perplexity lengths exceed the length that the base was
    trained to.

    Args:
        lengths: Context lengths in tokens at which perplexity was measured.
        base_context: The length that the base was trained to.
        rows: Rows of scores by ROLE_EVALUATION; without the champion's, there is no champion yet.
    """
    ratio, keys = MEASURED_BY["perplexity_ratio"], MEASURED_BY["effective_length"]
    ours = rows.get(f"challenger_{ratio}", [])
    target = rules.target_length or max(lengths, default=0)
    findings = []
    if rules.perplexity_ratio is not None:
        if (champion := rows.get(f"champion_{ratio}")) is None:
            measured, required = "there is no champion yet", "nothing to compare with"
            findings.append(Finding("perplexity_ratio", measured, required, True))
        else:
            reached = {length for length in lengths if length < target} | {target}
            findings += _ratios("perplexity_ratio", ours, champion, reached, rules.perplexity_ratio, rules)
    if rules.base_ratio is not None and (base := rows.get(f"base_{ratio}")) is not None:
        trained = [length for length in lengths if length <= base_context]
        if not trained:  # not known before the base was converted
            raise ValueError(f"promote.base_ratio: {_beyond_base(lengths, base_context)}")
        findings += _ratios("base_ratio", ours, base, {*trained}, rules.base_ratio, rules)
    gains = MEASURED_BY["gain_over_base"]
    if (base := rows.get(f"base_{gains}")) is not None:
        findings.append(_gain(rows[f"challenger_{gains}"], base, target, base_context, rules))
    for role, stretch in rows.items():
        if role.startswith(STRETCH):
            name = role.removeprefix(STRETCH).removesuffix(f"_{gains}")
            findings.append(_gain_over_stretch(rows[f"challenger_{gains}"], stretch, name, target, rules))
    return findings + _retrieval(rules, target, rows.get(f"challenger_{keys}", []))


def _beyond_base(lengths: Sequence[int], trained: int) -> str:
    """Return what is wrong if all measured lengths are beyond those that the base was trained to."""
    field = f"evaluate.{MEASURED_BY['base_ratio']}.lengths"
    return (
        f"no length of {field} {list(lengths)} is within the {trained:,} tokens that the base was trained to: add one, "
        "or set promote.base_ratio to null"
    )


def _retrieval(rules: PromoteRecipe, target: int, rows: Rows) -> list[Finding]:
    from longreach.evaluation.scores import PASSKEY_BAR, effective_length

    findings = []
    totals = [row for row in rows if row["kind"] == "length"]
    if rules.passkey is not None:
        for row in totals:
            if row["length"] <= target or not target:
                measured = f"{row['accuracy']:.2f} ({row['correct']} of {row['trials']})"
                place, required = f"passkey at {row['length']:,} tokens", f"at least {rules.passkey:g}"
                findings.append(Finding(place, measured, required, row["accuracy"] >= rules.passkey))
    if rules.effective_length is not None:
        bar = PASSKEY_BAR if rules.passkey is None else rules.passkey
        reached = effective_length(totals, bar)
        required, passed = f"at least {rules.effective_length:,}", reached >= rules.effective_length
        findings.append(Finding("effective_length", f"{reached:,}", required, passed))
    return findings


def _ratios(
    rule: str, ours: Rows, theirs: Rows, lengths: set[int], most: float, rules: PromoteRecipe
) -> Iterator[Finding]:
    """Compare the challenger with another model in each interval from one length to the next. A
    mean over all tokens would hide a difference at the end."""
    ends = [row["end"] for row in ours if row["kind"] == "position"]
    beyond = 0
    for length in sorted(lengths):
        if any(beyond < end <= length for end in ends):  # else the interval is narrower than a bin
            yield _ratio(f"{rule}, tokens {beyond:,} to {length:,}", ours, theirs, (beyond, length), most, rules)
            beyond = length


def _ratio(
    place: str, ours: Rows, theirs: Rows, stretch: tuple[int, int], most: float, rules: PromoteRecipe
) -> Finding:
    from longreach.evaluation.scores import paired

    beyond, length = stretch
    difference = paired(ours, theirs, length, beyond)  # in nats per token
    nll, low, high = difference["nll"], difference["low"], difference["high"]
    if rules.certainty == "estimate":
        measured, deciding = _times(nll), nll
    elif math.isnan(high):  # NaN satisfies no rule
        reason = "one stretch of text: measure greater lengths or more documents"
        measured, deciding = f"{_times(nll)} without an interval ({reason})", high
    else:
        over = f"over {difference['documents']} documents"
        if difference["documents"] == 1:
            over = "within the one document that is held out"
        measured, deciding = f"{_times(nll)}, 95% interval {_times(low)} to {_times(high)} {over}", high
    return Finding(place, measured, f"at most {most:g}", deciding <= math.log(most))


def _gain(ours: Rows, base: Rows, target: int, base_context: int, rules: PromoteRecipe) -> Finding:
    """Compare the challenger at the target length (0: its greatest one) with the base at its best
    length."""
    from longreach.evaluation.gain import best_length, difference

    length = target or _greatest_length(ours)
    try:
        best = best_length(base, base_context)
    except ValueError as error:
        raise ValueError(f"promote.gain_over_base: {error}: add one, or set the rule to null") from None
    place = f"gain_over_base at {length:,} tokens, to the base at its best ({best.length:,})"
    return _finding(place, difference([ours], length, [base], best.length), rules.gain_over_base, rules)


def _gain_over_stretch(ours: Rows, stretch: Rows, name: str, target: int, rules: PromoteRecipe) -> Finding:
    """Compare the challenger with an untrained stretch, both at the target length."""
    from longreach.evaluation.gain import difference

    length = target or _greatest_length(ours)
    place = f"gain_over_stretches at {length:,} tokens, to {name}"
    return _finding(place, difference([ours], length, [stretch], length), rules.gain_over_stretches, rules)


def _greatest_length(rows: Rows) -> int:
    return max(row["length"] for row in rows if row["kind"] == "pooled")


def _finding(place: str, found: Difference, required: float | str | None, rules: PromoteRecipe) -> Finding:
    """Return whether a difference in nats per token is at least the required one (auto: 0)."""
    measured, deciding = f"{found.nats:+.3f} nats per token", found.nats
    if rules.certainty == "interval":
        deciding = found.low  # NaN satisfies no rule
        measured += f", 95% interval {found.low:+.3f} to {found.high:+.3f} over {found.documents} documents"
        if math.isnan(found.low):
            measured = f"{found.nats:+.3f} nats per token without an interval (one document: hold out more)"
    least = 0.0
    if isinstance(required, float):
        least = required
    return Finding(place, measured, f"at least {least:+g}", deciding >= least)


def _times(nll: float) -> str:
    """Format a difference in nats per token as a ratio of perplexities."""
    return "more than 100" if nll >= math.log(100) else f"{math.exp(nll):.4f}"


def _move(recipe: PromoteStageRecipe, model: Release, run: StageRun) -> str:
    """Register the challenger, make it champion and return its version."""
    client = registry.connect()
    name, tags = recipe.rules.name, model.tags
    experiment = registry.experiment_id(client, run.experiment)
    mlflow_run = registry.run_of(client, experiment, run.id)
    logged = registry.log_model(client, experiment, mlflow_run, name, tags, model.path)
    version = registry.register(client, name, logged, mlflow_run, tags, model.about)
    registry.move(client, name, str(version.version), recipe.champion)
    return str(version.version)


def _rows(artifact: Artifact) -> Rows:
    return json.loads((artifact.path / "scores.json").read_text(encoding="utf-8"))["rows"]


def _page(recipe: PromoteStageRecipe, decision: dict[str, Any], findings: list[Finding]) -> str:
    against = f"version {recipe.champion}" if recipe.champion else "nobody: there was no champion"
    outcome = "refused: nothing was moved"
    if decision["passed"]:
        outcome = f"passed: version {decision['version']} is champion"
    table = ["| rule | measured | required | passed |", "|---|---|---|---|"]
    for finding in findings:
        passed = "yes" if finding.passed else "**no**"
        table.append(f"| {finding.rule} | {finding.measured} | {finding.required} | {passed} |")
    title = f"# {recipe.rules.name}: {outcome}"
    challenger = f"Challenger: arm {recipe.rules.model}. Measured against {against}."
    return "\n\n".join([title, challenger, "\n".join(table)]) + "\n"
