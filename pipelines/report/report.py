"""The report: was it worth it? Perplexity by length, wall clock, memory and trained parameters of each arm, on a page.

Every number is read from the artifacts' files and manifests, never from MLflow. A section appears when its inputs are
there; a file that is there and malformed is an error. Speed-ups are ratios of tokens/s (the median step, the first left
out) and stand beside the row length and model width that they were measured at, since S²-Attn gains with row length.

    longreach run quickstart && longreach report quickstart --open
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from longreach.evaluation.blocks import Section, Table
from longreach.evaluation.sections import finite, perplexity_text
from longreach.infra.artifact import Artifact
from longreach.infra.choices import Choices
from longreach.pipelines.artifacts import Report
from longreach.pipelines.kind import StageRun, stage
from longreach.pipelines.recipe import PriceRecipe
from longreach.pipelines.report.findings import NOT_RUN, PERPLEXITY, Found, brief, gather
from longreach.pipelines.report.page import Page, markdown_table

TABLE_CHARACTERS = 4000
"""What a run's description in MLflow takes beside the headline."""


class ReportRecipe(Choices):
    """What the report is called; all else comes from its inputs."""

    name: str
    """The recipe's name."""
    labels: dict[str, str]
    """The report's inputs: parameter name -> the stage's label."""
    prices: PriceRecipe = PriceRecipe()
    """What a rank costs."""
    failed: dict[str, str] = Field(default_factory=dict)
    """Stages that could not be done: label -> why, in the order of the graph."""


@stage(makes=Report, revision=2, cpus=lambda resources: 1)
def report(
    artifacts: Mapping[str, Artifact], *, recipe: ReportRecipe, resources: object, out: Path, run: StageRun
) -> dict[str, Any]:
    """Write report.html, report.md and figures into `out`; returns {"headline", "metrics": name -> finite number,
    "table": the main table in short, as Markdown}.

    Raises:
        ValueError: an artifact without a label, of an unknown stage, or with a file that is not what it should be.
    """
    if wrong := artifacts.keys() ^ recipe.labels.keys():
        raise ValueError(f"{len(artifacts)} artifacts, {len(recipe.labels)} labels; not in both: {sorted(wrong)}")
    labelled = {recipe.labels[key]: artifact for key, artifact in artifacts.items()}
    found = gather(labelled, recipe.prices, recipe.failed)
    sections = _sections(found, run.command)
    about = f"{found.base['source']}, trained to {found.base['context_length']:,} tokens; " if found.base else ""
    about += f"report {run.attempt.fingerprint[:8]}"
    Page(f"longreach: {recipe.name}", about, headline(found), sections).write(out, "report")
    return {"headline": headline(found), "metrics": metrics(found), "table": short_table(found)}


def _sections(found: Found, command: str) -> list[Section]:
    """Return the page, in order. What draws is imported here, since it is slow to import."""
    from longreach.pipelines.report import sections

    of_models = [sections.failures(found), sections.results(found)]
    of_training = [sections.training(found), sections.pretraining(found), sections.packing(found)]
    whole = [*of_models, *sections.evaluations(found), sections.documents(found), *of_training]
    return [section for section in whole if section] + [sections.how(found, command)]


def short_table(found: Found) -> str:
    """Perplexity at the greatest length and costs, below TABLE_CHARACTERS: rows that do not fit are counted."""
    from longreach.pipelines.report.sections import columns_of

    columns = columns_of(found)
    short = [column for column in columns if column[0].startswith("perplexity")][-1:]
    short += [column for column in columns if column[1] in ("wall clock", "peak GiB")]
    short += [column for column in columns if column[0].startswith("speed-up")][:1]
    words = {"perplexity": "perplexity at ", "speed-up": "speed-up vs "}
    heads = ["model", *(words.get(group.split()[0], "") + head.partition("\n")[0] for group, head, _ in short)]
    names = {name: name + f" ({m.about})" * m.kind.startswith("failed") for name, m in found.compared.items()}
    rows = [[shown, *(cells[name].partition("\n")[0] for *_, cells in short)] for name, shown in names.items()]
    text, many = markdown_table(Table("", heads, rows)), len(rows)
    while len(text) >= TABLE_CHARACTERS:
        many -= 1
        text = markdown_table(Table("", heads, rows[:many])) + f"\n\n{len(rows) - many} more models are in the report."
    return text if rows else ""


def headline(found: Found) -> str:
    """What was gained at the greatest length, and at what cost: a sentence each, where there is something to say."""
    nothing = f"{len(found.artifacts)} stages are done; no perplexity of the base or of an arm was measured."
    return " ".join(_lost(found) + ([*_gained(found), *_paid(found)] or [nothing]))


def _lost(found: Found) -> list[str]:
    """What failed, by its own fault first."""
    causes = {label: brief(why) for label, why in found.failed.items() if not why.startswith(NOT_RUN)}
    if not found.failed:
        return []
    listed = ", ".join(f"{label} ({why})" for label, why in list(causes.items())[:5]) + " …" * (len(causes) > 5)
    said = f"{len(found.failed)} of {len(found.failed) + len(found.artifacts)} stages failed: {listed}"
    waiting = len(found.failed) - len(causes)
    return [f"{said}, and {waiting} that could not run without them." if waiting else f"{said}."]


def _gained(found: Found) -> list[str]:
    """The best arm against everything that needed no training."""
    length, ppl = found.greatest()
    arms = [name for name in ppl if name in found.of("finetune")]
    untrained = [name for name in ppl if name not in arms]
    listed = ", ".join(f"{name} {perplexity_text(ppl[name])}" for name in untrained)
    said = f"At {length:,} tokens"
    if found.base:
        said += f", {length / found.base['context_length']:.3g} times what the base was trained to"
    if not arms:
        return [f"{said}, perplexity without any training is: {listed}."] if ppl else []
    said += f", {arms[0]} is the best trained arm with perplexity {perplexity_text(ppl[arms[0]])}"
    if not untrained:
        return [f"{said}."]
    place = {"kind": "document", "protocol": "last_stride", "length": length}
    rows = [found.models[name].rows(PERPLEXITY, **place) for name in (arms[0], untrained[0])]
    mine, best = ({row["document"]: row["nll"] for row in each} for each in rows)
    wins = sum(mine[document] < best[document] for document in mine)
    worse = [name for name in untrained if not ppl[arms[0]] < ppl[name]]
    verdict = f"worse than {' and '.join(worse)} without any training" if worse else "better than anything untrained"
    said += f": {verdict} ({listed}), and lower than {untrained[0]}"
    return [f"{said} on {wins} of {len(mine)} documents."]


def _paid(found: Found) -> list[str]:
    """What the best other arm cost against full fine-tuning."""
    (_, ppl), full, lora = found.greatest(), found.yardstick("all"), found.yardstick("lora")
    arm = next((m for name in ppl if (m := found.models[name]).kind == "finetune" and m is not full), None)
    if not full or not arm:
        return []
    said = f"{arm.name} trained at {arm.ratio(full, 'tokens_per_s'):.2f} times the speed of full fine-tuning"
    if lora and lora is not arm:
        said += f" and {arm.ratio(lora, 'tokens_per_s'):.2f} times that of LoRA"
    said += f" ({found.where()}), with {arm.ratio(full, 'peak_gib'):.2f} times full fine-tuning's peak memory"
    if finite(ppl[arm.name]) and finite(ppl.get(full.name)):
        change = ppl[arm.name] / ppl[full.name] - 1
        said += f" and {abs(change):.1%} {'higher' if change > 0 else 'lower'} perplexity"
    return [f"{said}."]


def metrics(found: Found) -> dict[str, float]:
    """The page's numbers for MLflow, by name; not those that are not finite, which no manifest can hold."""

    def plain(name: str) -> str:  # MLflow's names allow neither plus nor brackets, ours no space
        return re.sub(r"[^a-z0-9._-]+", " ", name).strip()

    values: dict[str, float] = {f"pack/efficiency/{plain(n)}": pack.efficiency for n, pack in found.packs.items()}
    for name, model in found.models.items():
        tag = plain(name)
        values |= {f"eval/{key}/{tag}": value for s in model.scores.values() for key, value in s.summary.items()}
        if model.summary:
            values[f"cost/wall_s/{tag}"] = model.summary.wall_s
            values[f"cost/tokens_per_s/{tag}"] = model.summary.tokens_per_s
            values[f"cost/peak_gib/{tag}"] = model.summary.peak_gib
            values[f"cost/mfu/{tag}"] = model.mfu
        for against, tune in (("full", "all"), ("lora", "lora")):
            if model.kind == "finetune" and (other := found.yardstick(tune)):
                values[f"compare/speedup_vs_{against}/{tag}"] = model.ratio(other, "tokens_per_s")
                values[f"compare/peak_gib_vs_{against}/{tag}"] = model.ratio(other, "peak_gib")
    return {key: float(value) for key, value in values.items() if finite(value)}
