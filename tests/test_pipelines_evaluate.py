import html
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tiny_models import byte_tokenizer, tiny_llama

from longreach.evaluation import EVALS
from longreach.evaluation.lost_in_the_middle import LostInTheMiddle
from longreach.evaluation.needle import Needle
from longreach.evaluation.passkey import Passkey
from longreach.evaluation.perplexity import Perplexity
from longreach.evaluation.ruler import Ruler
from longreach.evaluation.scores import EvalScores
from longreach.evaluation.sinks import Sinks
from longreach.evaluation.streaming import Streaming
from longreach.infra.artifact import Artifact
from longreach.infra.resources import Resources
from longreach.infra.tracking import Spool, read_events
from longreach.pipelines import evaluate as stage
from longreach.pipelines.evaluate import EvaluateStageRecipe, evaluate
from longreach.training.recipe import RopeRecipe


@pytest.fixture
def folders(tmp_path):
    """(model, corpus, out, run): a tiny model and two held-out documents, as stages leave them."""
    model, corpus, out = tmp_path / "model", tmp_path / "corpus", tmp_path / "out"
    tiny_llama().save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    byte_tokenizer().save_pretrained(corpus / "tokenizer")
    ids = [np.random.default_rng(n).integers(0, 256, 200).tolist() for n in range(2)]
    rows = {"name": ["a", "b"], "domain": ["d", "d"], "split": ["test", "test"], "input_ids": ids}
    datasets.Dataset.from_dict(rows).save_to_disk(corpus / "documents")
    spool = Spool.open(tmp_path / "e.jsonl", run="r", parent=None, experiment="x", name="e", kind="attempt")
    attempt = SimpleNamespace(work=tmp_path / "work")
    return (
        Artifact(model, {}),
        Artifact(corpus, {}),
        out,
        SimpleNamespace(spool=spool, attempt=attempt, earlier=[], share=None, memory_gib=0),
    )


CHOICES = {
    "perplexity": Perplexity.Choices(lengths=(64, 128), last_tokens=16),
    "passkey": Passkey.Choices(lengths=(320,), depths=(0.5,)),
    "streaming": Streaming.Choices(
        document="a", tokens=100, cache_tokens=24, recompute_every=8, newlines=True, latency_tokens=4,
        positions=("cache", "text"), endurance_tokens=300,
    ),
    "needle": Needle.Choices(lengths=(260, 300), depth_points=2, chat_template="never", new_tokens=3),
    "lost_in_the_middle": LostInTheMiddle.Choices(pairs=(3,), documents=(3,), positions=2, trials=1),
    "ruler": Ruler.Choices(tasks=("niah_single", "vt"), lengths=(2000,), haystack="noise", trials=1, new_tokens=3),
    "sinks": Sinks.Choices(lengths=(16, 32), texts=4, map_layers=(0, -1)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_each_evaluation_leaves_scores_a_figure_and_metrics(folders, name):
    model, corpus, out, run = folders
    recipe = EvaluateStageRecipe(eval=name, model="base", choices=CHOICES[name])
    summary = evaluate(model, corpus, recipe=recipe, resources=Resources(), out=out, run=run)
    scores = EvalScores.read(out)
    assert summary == {"eval": name, "model": "base", "rows": len(scores.rows)} | scores.summary
    assert scores.rows[0]["model"] == "base"
    assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    page = (out / f"{name}.html").read_text()
    assert "vega" in page
    assert page.count(html.escape(scores.protocol, quote=False)) <= 1, "the protocol is said once"
    assert (out / "scores.parquet").exists()
    events, _ = read_events(run.spool.path)
    metrics = [event["values"] for event in events if event["event"] == "metrics"]
    assert metrics == [{f"eval/{key}": value for key, value in scores.summary.items()}]
    progress = [(e["done"], e["total"]) for e in events if e["event"] == "progress"]
    total = progress[0][1]
    assert total > 0
    assert progress == [(done, total) for done in range(total + 1)]


def test_a_stretch_of_the_rotary_positions_is_applied_while_loading(folders):
    model, corpus, out, run = folders
    found = []
    for n, rope in enumerate((None, RopeRecipe(type="linear", factor=4.0))):
        run.attempt.work = out.parent / f"work-{n}"
        recipe = EvaluateStageRecipe(eval="perplexity", model="base", rope=rope, choices=CHOICES["perplexity"])
        summary = evaluate(model, corpus, recipe=recipe, resources=Resources(), out=out, run=run)
        found.append(summary["ppl_128"])
    assert abs(found[0] / found[1] - 1) > 1e-3


def test_a_sink_token_more_is_no_other_tokenizer_but_other_ids_are(folders):
    model, corpus, out, run = folders
    recipe = EvaluateStageRecipe(eval="passkey", model="base", choices=CHOICES["passkey"])
    more = byte_tokenizer()
    more.add_tokens(["<more>"])
    more.save_pretrained(corpus.path / "tokenizer")
    evaluate(model, corpus, recipe=recipe, resources=Resources(), out=out, run=run)
    text = (corpus.path / "tokenizer" / "tokenizer.json").read_text()
    swapped = text.replace('"a": ', '"aside": ', 1).replace('"b": ', '"a": ', 1).replace('"aside": ', '"b": ', 1)
    assert swapped != text
    (corpus.path / "tokenizer" / "tokenizer.json").write_text(swapped)
    with pytest.raises(ValueError, match="2 tokens have another id in the corpus' tokenizer than in the model"):
        evaluate(model, corpus, recipe=recipe, resources=Resources(), out=out, run=run)


GRID = Passkey.Choices(lengths=(320, 400, 480), depths=(0.0, 0.5), trials=2)


def test_an_interrupted_grid_goes_on_and_ends_with_the_same_scores(folders, monkeypatch):
    model, corpus, out, run = folders
    recipe = EvaluateStageRecipe(eval="passkey", model="base", choices=GRID)
    measure, measured = Passkey.measure, []

    def dies(evaluation, cell):
        measured.append(cell)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return measure(evaluation, cell)

    monkeypatch.setattr(Passkey, "measure", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, corpus, recipe=recipe, resources=Resources(), out=out, run=run)
    (run.attempt.work / "cells" / ".00003.json").write_text("{half")  # what a kill leaves
    later = SimpleNamespace(
        spool=run.spool,
        attempt=SimpleNamespace(work=out.parent / "again"),
        earlier=[run.attempt.work.parent],
        share=None,
        memory_gib=0,
    )
    evaluate(model, corpus, recipe=recipe, resources=Resources(), out=out, run=later)
    assert [(c["length"], c["trial"]) for c in measured[4:]] == [(400, 1), (480, 0), (480, 1)]
    resumed = EvalScores.read(out)
    run.attempt.work = out.parent / "fresh"
    evaluate(model, corpus, recipe=recipe, resources=Resources(), out=out, run=run)
    assert EvalScores.read(out) == resumed


def test_two_tasks_share_the_cells_and_the_scores_are_the_same(folders, cluster, monkeypatch):
    model, corpus, out, run = folders
    recipe = EvaluateStageRecipe(eval="passkey", model="base", choices=GRID)
    found = []
    spread = []
    monkeypatch.setattr(stage, "_spread", lambda *of, real=stage._spread: spread.append(1) or real(*of))
    for workers in (1, 2):
        run.attempt.work = out.parent / f"workers-{workers}"
        evaluate(model, corpus, recipe=recipe, resources=Resources(eval_workers=workers), out=out, run=run)
        found.append(EvalScores.read(out))
        assert len(list((run.attempt.work / "cells").glob("*.json"))) == 6
    assert found[0] == found[1]
    assert len(spread) == 1


def test_cells_of_another_type_are_not_taken_up(folders):
    model, corpus, out, run = folders
    recipe = EvaluateStageRecipe(eval="passkey", model="base", choices=CHOICES["passkey"])
    nll = []
    for dtype in ("float32", "bfloat16", "bfloat16"):
        evaluate(model, corpus, recipe=recipe, resources=Resources(dtype=dtype), out=out, run=run)
        nll.append(EvalScores.read(out).summary["passkey_nll_320"])
    assert nll[0] != nll[1]
    assert nll[1] == nll[2]


def test_a_task_that_fails_says_why(folders, cluster):
    model, corpus, out, run = folders
    weights = load_file(model.path / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] * float("nan")
    save_file(weights, model.path / "model.safetensors", metadata={"format": "pt"})
    recipe = EvaluateStageRecipe(eval="passkey", model="base", choices=GRID)
    with pytest.raises(FloatingPointError, match=r"passkey.*'length': .*not finite"):
        evaluate(model, corpus, recipe=recipe, resources=Resources(eval_workers=2), out=out, run=run)


def test_a_length_that_memory_cannot_hold_is_refused_with_both_numbers(folders):
    model, corpus, out, run = folders
    choices = Passkey.Choices(lengths=(1 << 40,))
    recipe = EvaluateStageRecipe(eval="passkey", model="base", choices=choices)
    with pytest.raises(ValueError, match=r"passkey at 1,099,511,627,776 tokens needs about .* TiB .* is free"):
        evaluate(model, corpus, recipe=recipe, resources=Resources(), out=out, run=run)


def test_an_evaluation_whose_scores_would_differ_now_is_measured_again_and_no_other(monkeypatch):
    recipe = EvaluateStageRecipe(eval="passkey", model="base", choices=CHOICES["passkey"])
    before = recipe.identity()
    assert "revision" not in before
    monkeypatch.setattr(EVALS["passkey"], "revision", 2)
    assert recipe.identity() == before | {"revision": 2}
