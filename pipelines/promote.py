"""Stage `promote`: the gate. A challenger that keeps every rule becomes champion; otherwise nothing moves.

Perplexities are compared token by token: challenger, champion and base read the same held-out texts, and the ratio's
95% interval resamples stretches of text (evaluation/scores.py). By default the whole interval has to keep a rule, so a
challenger that is only perhaps as good is refused. A refusal is a result: it is published, said on stderr and in
MLflow, and the command ends with 3.

    longreach run retrain && longreach rollback smollm2-retrained
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longreach.evaluation.scores import EFFECTIVE, effective_length, paired
from longreach.infra import registry
from longreach.infra.artifact import Artifact
from longreach.pipelines.graph import PromoteStageRecipe
from longreach.pipelines.recipe import PromoteRecipe
from longreach.pipelines.stage import StageRun

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Finding:
    """What one rule found at one place."""

    rule: str
    """The recipe's field, and where it was looked at."""
    measured: str
    asked: str
    kept: bool


def promote(
    model: Artifact, *, recipe: PromoteStageRecipe, resources: object, out: Path, run: StageRun, **inputs: Artifact
) -> dict[str, Any]:
    """Decide, write gate.json and gate.md, and move the alias if all rules are kept; returns {"passed", "refusals"...}.

    Raises:
        ValueError: the rules cannot be applied to what was measured, or the registry cannot be asked.
        AliasMoved: another model became champion in the meantime.
    """
    rows = {name: _rows(artifact) for name, artifact in inputs.items() if name != "base"}
    context = inputs["base"].summary["context_length"] if "base" in inputs else 0
    findings = decide(recipe.rules, recipe.lengths, context, **rows)
    if taken_back := registry.rolled_back(recipe.rules.name, model.fingerprint):
        advice = f"none that people took back (its tag {registry.ROLLED_BACK})"
        findings.append(Finding("rollback", f"it is version {taken_back}", advice, False))
    refusals = [f"{f.rule}: {f.measured}, asked for {f.asked}" for f in findings if not f.kept]
    said = {"passed": not refusals, "refusals": refusals, "name": recipe.rules.name, "champion": recipe.champion}
    if not refusals:
        said |= {"version": _move(recipe, model, run)}
    (out / "gate.json").write_text(json.dumps(said | {"findings": [asdict(f) for f in findings]}, indent=1) + "\n")
    (out / "gate.md").write_text(_page(recipe, said, findings), encoding="utf-8")
    tags = model.summary["tags"]  # refused or not, it is listed; the files of a refused one stay in the store
    run.spool.model(recipe.rules.name, tags[registry.MODEL], model.summary["metrics"], tags=tags)
    run.spool.artifact(out / "gate.md")
    run.spool.tag("gate", "passed" if not refusals else "refused: " + "; ".join(refusals))
    return said


def decide(
    rules: PromoteRecipe,
    lengths: tuple[int, ...],
    base_context: int,
    *,
    challenger_perplexity: Rows = (),  # type: ignore[assignment]
    challenger_passkey: Rows = (),  # type: ignore[assignment]
    champion_perplexity: Rows | None = None,
    base_perplexity: Rows | None = None,
) -> list[Finding]:
    """What each rule finds.

    Args:
        lengths: at which perplexity was measured.
        base_context: the length that the base was trained to.
        the others: rows of evaluations' scores; no champion's: there is none yet.

    Raises:
        ValueError: no measured length is one that the base was trained to.
    """
    target = rules.target_length or max(lengths, default=0)
    found = []
    if rules.perplexity_ratio is not None and champion_perplexity is None:
        found.append(Finding("perplexity_ratio", "there is no champion yet", "nothing to compare with", True))
    elif rules.perplexity_ratio is not None and champion_perplexity is not None:
        place = f"perplexity_ratio at {target:,} tokens, to the champion"
        found.append(_ratio(place, challenger_perplexity, champion_perplexity, target, rules.perplexity_ratio, rules))
    if rules.base_ratio is not None and base_perplexity is not None:
        own = [length for length in lengths if length <= base_context]
        if not own:
            raise ValueError(
                f"promote.base_ratio: no length of evaluate.perplexity.lengths {list(lengths)} is within the "
                f"{base_context:,} tokens that the base was trained to: add one, or set promote.base_ratio to null"
            )
        for length in own:
            place = f"base_ratio at {length:,} tokens, to the base"
            found.append(_ratio(place, challenger_perplexity, base_perplexity, length, rules.base_ratio, rules))
    totals = [row for row in challenger_passkey if row["kind"] == "length"]
    if rules.passkey is not None:
        for row in totals:
            if row["length"] <= target or not target:
                measured = f"{row['accuracy']:.2f} ({row['correct']} of {row['trials']})"
                kept = row["accuracy"] >= rules.passkey
                place = f"passkey at {row['length']:,} tokens"
                found.append(Finding(place, measured, f"at least {rules.passkey:g}", kept))
    if rules.effective_length is not None:
        reached = effective_length(totals, EFFECTIVE if rules.passkey is None else rules.passkey)
        kept = reached >= rules.effective_length
        found.append(Finding("effective_length", f"{reached:,}", f"at least {rules.effective_length:,}", kept))
    return found


def _ratio(place: str, ours: Rows, theirs: Rows, length: int, most: float, rules: PromoteRecipe) -> Finding:
    """Perplexity of `ours` over that of `theirs` on the same tokens."""
    nll, low, high = (paired(ours, theirs, length)[key] for key in ("nll", "low", "high"))
    measured, deciding = f"{_times(nll)}, 95% interval {_times(low)} to {_times(high)}", high
    if rules.certainty == "estimate":
        measured, deciding = _times(nll), nll
    elif math.isnan(high):
        measured = f"{_times(nll)} without an interval (one stretch of text: measure greater lengths or more documents)"
    return Finding(place, measured, f"at most {most:g}", deciding <= math.log(most))


def _times(nll: float) -> str:
    """A difference in nats per token as a ratio of perplexities."""
    return f"{math.exp(nll):.4f}" if nll < math.log(100) or math.isnan(nll) else "more than 100"


def _move(recipe: PromoteStageRecipe, model: Artifact, run: StageRun) -> str:
    """Register the challenger and make it champion; returns its version."""
    client, tags, name = registry.connect(), model.summary["tags"], recipe.rules.name
    experiment = registry.experiment_id(client, run.experiment)
    own_run = registry.run_of(client, experiment, run.id)
    logged = registry.log_model(client, experiment, own_run, name, tags, model.path)
    version = registry.register(client, name, logged, own_run, tags, model.summary["about"])
    registry.move(client, name, str(version.version), recipe.champion)
    return str(version.version)


def _rows(artifact: Artifact) -> Rows:
    return json.loads((artifact.path / "scores.json").read_text(encoding="utf-8"))["rows"]


def _page(recipe: PromoteStageRecipe, said: dict[str, Any], findings: list[Finding]) -> str:
    """gate.md."""
    against = f"version {recipe.champion}" if recipe.champion else "nobody: there was no champion"
    verdict = f"passed: version {said['version']} is champion" if said["passed"] else "refused: nothing was moved"
    lines = [
        f"# {recipe.rules.name}: {verdict}",
        f"Challenger: arm {recipe.rules.model}. Measured against {against}.",
        "| rule | measured | asked for | kept |\n|---|---|---|---|\n"
        + "\n".join(f"| {f.rule} | {f.measured} | {f.asked} | {'yes' if f.kept else '**no**'} |" for f in findings),
    ]
    return "\n\n".join(lines) + "\n"
