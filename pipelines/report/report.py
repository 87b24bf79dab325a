"""Stage `report`: a page with each arm's perplexity by length, wall clock, memory and trained
parameters.

Every number is read from the artifacts' files and manifests, never from MLflow. A section appears
if its inputs exist; a malformed file is an error. Speed-ups are ratios of tokens/s (of the median
step, without the first). The page shows them with the row length and model width of the
measurement, because S²-Attn saves more on longer rows.

    longreach run quickstart && longreach report quickstart --open
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from longreach.evaluation.blocks import Section, Table
from longreach.evaluation.passkey import Passkey
from longreach.evaluation.sections import finite, perplexity_text
from longreach.infra.artifact import Artifact
from longreach.infra.choices import Choices
from longreach.infra.tracking import metric_part
from longreach.pipelines.artifacts import Report
from longreach.pipelines.kind import StageRun, stage
from longreach.pipelines.recipe import PriceRecipe
from longreach.pipelines.report.claim import Claim, claim_of
from longreach.pipelines.report.costs import cost_by_length, costs_in_words
from longreach.pipelines.report.findings import NOT_RUN, PERPLEXITY, Findings, brief, gather
from longreach.pipelines.report.page import Page, markdown_table

MODELS_NAMED = 8  # in one sentence
TABLE_CHARACTERS = 4000  # maximum length of the table in a run's description in MLflow, next to the headline


class ReportRecipe(Choices):
    """Name, prices and failed stages for the report; everything else comes from its inputs."""

    name: str
    """Name of the recipe, for the heading."""
    prices: PriceRecipe = PriceRecipe()
    """Price and power of a rank."""
    failed: dict[str, str] = Field(default_factory=dict)
    """Failed stages: label -> reason, in stage order."""


@stage(makes=Report, revision=6, cpus=lambda resources: 1)
def report(artifacts: Mapping[str, Artifact], *, recipe: ReportRecipe, out: Path, run: StageRun) -> dict[str, Any]:
    """Write report.html, report.md, measures.json and figures; return {"headline", "metrics",
    "curves", "table": a short Markdown table}.

    Args:
        artifacts: By stage label.

    Raises:
        ValueError: An artifact has a malformed file.
    """
    found = gather(artifacts, recipe.prices, recipe.failed)
    sections = _sections(found, run.command)
    about = ""
    if found.base:
        about = f"{found.base['source']}, trained to {found.base['context_length']:,} tokens; "
    about += f"report {run.attempt.fingerprint[:8]}"
    words = headline(found)
    Page(f"longreach: {recipe.name}", about, words, sections).write(out, "report")
    measures = metrics(found)
    (out / Report.MEASURES).write_text(json.dumps(_by_model(measures), indent=1), encoding="utf-8")
    return {"headline": words, "metrics": measures, "curves": _gain_curves(found), "table": short_table(found)}


def _sections(found: Findings, command: str) -> list[Section]:
    """Return the page's sections in order. The drawing modules are imported here, because they are
    slow."""
    from longreach.pipelines.report import sections

    parts = [
        sections.failures(found),
        sections.results(found),
        *sections.evaluations(found),
        sections.documents(found),
        cost_by_length(found, sections.style_of(found)),
        sections.training(found),
        sections.pretraining(found),
        sections.packing(found),
        sections.how(found, command),
    ]
    return [part for part in parts if part]


def short_table(found: Findings) -> str:
    """Return a table of gain, perplexity at the greatest length and costs, shorter than
    TABLE_CHARACTERS; a last line counts the rows that do not fit."""
    from longreach.pipelines.report.sections import main_columns

    gains, perplexities, costs, speedups = [], [], [], []  # (heading, cells) of columns
    for column in main_columns(found):
        if column.group.startswith("nats"):
            gains.append((f"{column.group}, with {column.head} tokens", column.cells))
        elif column.group.startswith("perplexity"):
            perplexities.append((f"perplexity at {_first_line(column.head)}", column.cells))
        elif column.group.startswith("speed-up"):
            speedups.append((f"speed-up vs {_first_line(column.head)}", column.cells))
        elif column.head in ("wall clock", "peak GiB"):
            costs.append((column.head, column.cells))
    shown = [*gains[-1:], *perplexities[-1:], *costs, *speedups[:1]]
    heads = ["model", *(head for head, _ in shown)]
    rows = []
    for name, model in found.compared.items():
        shown_name = name
        if model.kind.startswith("failed"):
            shown_name += f" ({model.about})"
        rows.append([shown_name, *(_first_line(cells[name]) for _, cells in shown)])
    if not rows:
        return ""
    text, n_rows = markdown_table(Table("", heads, rows)), len(rows)
    while len(text) >= TABLE_CHARACTERS:
        n_rows -= 1
        text = markdown_table(Table("", heads, rows[:n_rows]))
        text += f"\n\n{len(rows) - n_rows} more models are in the report."
    return text


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def headline(found: Findings) -> str:
    """Return sentences on failures, on the gain at the greatest length, on its cost, and on pass
    keys."""
    claim = claim_of(found)
    gains = claim.sentences() if claim else _gain(found)
    gains += _price(found, claim)
    gains += _keys_found(found)
    if found.costs:
        gains += filter(None, [costs_in_words(found.costs)])
    if not gains:
        gains = _learned(found)
    if not gains:
        gains = [f"{len(found.artifacts)} stages are done; no perplexity of the base or of an arm was measured."]
    return " ".join([*_failures(found), *gains])


def _failures(found: Findings) -> list[str]:
    """Return a sentence on the stages that failed, and on how many could not run because of
    them."""
    if not found.failed:
        return []
    causes = []
    for label, why in found.failed.items():
        if not why.startswith(NOT_RUN):
            causes.append(f"{label} ({brief(why)})")
    text = f"{len(found.failed)} of {len(found.failed) + len(found.artifacts)} stages failed: {', '.join(causes[:5])}"
    if len(causes) > 5:
        text += " …"
    waiting = len(found.failed) - len(causes)
    if waiting:
        text += f", and {waiting} could not run without them"
    return [f"{text}."]


def _gain(found: Findings) -> list[str]:
    """Return a sentence that compares the best arm with all untrained models."""
    length, ppl = found.greatest()
    if not ppl:
        return []
    trained = found.of("finetune", "variant")
    arms = [name for name in ppl if name in trained]
    untrained = [name for name in ppl if name not in trained]
    listed = ", ".join(f"{name} {perplexity_text(ppl[name])}" for name in untrained)
    text = f"At {length:,} tokens"
    if found.base:
        text += f", {length / found.base['context_length']:.3g} times what the base was trained to"
    if not arms:
        return [f"{text}, perplexity without any training is {listed}."]
    best = arms[0]
    text += f", {best} is the best trained arm with perplexity {perplexity_text(ppl[best])}"
    if not untrained:
        return [f"{text}."]
    worse_than = [name for name in untrained if not ppl[best] < ppl[name]]
    verdict = "better than every untrained model"
    if worse_than:
        verdict = f"not better than {' and '.join(worse_than)} without any training"
    ours, theirs = _document_losses(found, best, length), _document_losses(found, untrained[0], length)
    wins = sum(ours[document] < theirs[document] for document in ours)
    return [f"{text}: {verdict} ({listed}), and lower than {untrained[0]} on {wins} of {len(ours)} documents."]


def _learned(found: Findings) -> list[str]:
    """Return a sentence for each finetuned arm whose loss on held-out rows was measured more than
    once."""
    sentences = []
    for name, model in found.of("finetune").items():
        losses = model.curve("validation_loss")
        if len(losses) > 1:
            (first, before), (last, after) = losses[0], losses[-1]
            sentences.append(
                f"{name}: the loss on held-out rows was {before:.3f} nats per token after step {first}, and "
                f"{after:.3f} after step {last} of {model.training.steps}."
            )
    return sentences


def _keys_found(found: Findings) -> list[str]:
    """Return a sentence on the pass keys at the greatest length if that is beyond what the base was
    trained to."""
    by_length: dict[int, list[str]] = {}
    for name, model in found.compared.items():
        for row in model.rows(Passkey.name, kind="length"):
            by_length.setdefault(row["length"], []).append(f"{name} {row['correct']} of {row['trials']}")
    length = max(by_length, default=0)
    if not found.base or length <= found.base["context_length"]:
        return []
    times = f"{length / found.base['context_length']:.3g} times what the base was trained to"
    shown = ", ".join(by_length[length][:MODELS_NAMED])
    if len(by_length[length]) > MODELS_NAMED:
        shown += " …"
    return [f"Pass keys found at {length:,} tokens, {times}: {shown}."]


def _document_losses(found: Findings, name: str, length: int) -> dict[str, float]:
    rows = found.models[name].rows(PERPLEXITY, kind="document", protocol="last_stride", length=length)
    return {row["document"]: row["nll"] for row in rows}


def _price(found: Findings, claim: Claim | None) -> list[str]:
    """Return a sentence on the cost of the best arm other than full fine-tuning (whatever the seed),
    compared with full fine-tuning and LoRA."""
    _, ppl = found.greatest()
    full, lora = found.yardstick("all"), found.yardstick("lora")
    ranked = claim.ranked() if claim else list(ppl)
    finetuned = found.of("finetune")
    if not full:
        return []
    others = [name for name in ranked if name in finetuned and finetuned[name].of != full.of]
    if not others:
        return []
    arm = finetuned[others[0]]
    text = f"{arm.name} trained at {found.speedup(arm, full).median:.2f} times the speed of full fine-tuning"
    if lora and lora.of != arm.of:
        text += f" and {found.speedup(arm, lora).median:.2f} times that of LoRA"
    text += f" ({found.where()}), with {arm.ratio(full, 'peak_gib'):.2f} times full fine-tuning's peak memory"
    if claim and full.name in ranked:
        text += f"; on the same tokens it is {claim.against(arm.name, full.name)} than full fine-tuning"
    elif finite(ppl.get(arm.name)) and finite(ppl.get(full.name)):
        change = ppl[arm.name] / ppl[full.name] - 1
        direction = "lower"
        if change > 0:
            direction = "higher"
        text += f" and {abs(change):.1%} {direction} perplexity"
    unlike = [other for other in (full, lora) if other and not found.trained_alike(arm, other)]
    if unlike:
        places = [f"{model.name} on {model.trained_on}" for model in (arm, *unlike)]
        text += f". They were not trained alike, so their speeds are not comparable: {'; '.join(places)}"
    return [f"{text}."]


def metrics(found: Findings) -> dict[str, float]:
    """Return the page's numbers by name (mostly MEASURE/MODEL), without NaN and infinity, which a
    manifest cannot store."""
    values: dict[str, float] = {}
    for label, pack in found.packs.items():
        values[f"pack/efficiency/{metric_part(label)}"] = pack.efficiency
    for name, model in found.models.items():
        tag = metric_part(name)
        for scores in model.scores.values():
            for key, value in scores.summary.items():
                values[f"eval/{key}/{tag}"] = value
        if model.summary:
            for cost in ("wall_s", "tokens_per_s", "peak_gib"):
                values[f"cost/{cost}/{tag}"] = getattr(model.summary, cost)
            values[f"cost/mfu/{tag}"] = model.mfu
        for against, tune in (("full", "all"), ("lora", "lora")):
            yardstick = found.yardstick(tune)
            if yardstick and model.kind == "finetune":
                values[f"compare/speedup_vs_{against}/{tag}"] = found.speedup(model, yardstick).median
                values[f"compare/peak_gib_vs_{against}/{tag}"] = model.ratio(yardstick, "peak_gib")
    claim = claim_of(found)
    if claim and claim.background.base:
        values[f"compare/best_length/{metric_part(claim.background.base)}"] = claim.best.length
    for curve, by_length in _gain_curves(found).items():
        measure, _, tag = curve.rpartition("/")
        values |= {f"{measure}_{length}/{tag}": gained for length, gained in by_length.items()}
    return {key: float(value) for key, value in values.items() if finite(value)}


def _gain_curves(found: Findings) -> dict[str, dict[int, float]]:
    """Return the gains of arms and stretches over the base at its best, in nats per token: curve
    name -> context length -> gain."""
    claim = claim_of(found)
    if claim is None:
        return {}
    curves = {}
    for name, by_length in claim.over_base.items():
        if name != claim.background.base:
            gains = {length: gained.nats for length, gained in by_length.items() if finite(gained.nats)}
            curves[f"compare/gain_over_base/{metric_part(name)}"] = gains
    return curves


def _by_model(measures: dict[str, float]) -> list[dict[str, Any]]:
    """Return a table with a row per measure and a column per model or packed corpus."""
    rows: dict[str, dict[str, Any]] = {}
    for name, value in measures.items():
        measure, _, model = name.rpartition("/")
        rows.setdefault(measure, {"measure": measure})[model] = value
    return list(rows.values())
