from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from tiny_models import byte_tokenizer, tiny_llama

from evaluation.recipe import (
    LostInTheMiddleRecipe,
    NeedleRecipe,
    PasskeyRecipe,
    PerplexityRecipe,
    SinksRecipe,
    StreamingRecipe,
)
from evaluation.scores import EvalScores
from infra.artifact import Artifact
from infra.resources import Resources
from infra.tracking import Spool, read_events
from pipelines.evaluate import evaluate
from pipelines.graph import EvaluateStageRecipe
from training.recipe import RopeRecipe


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
    return Artifact(model, {}), Artifact(corpus, {}), out, SimpleNamespace(spool=spool, attempt=attempt, earlier=[])


CHOICES = {
    "perplexity": PerplexityRecipe(lengths=(64, 128), last_tokens=16),
    "passkey": PasskeyRecipe(lengths=(320,), depths=(0.5,)),
    "streaming": StreamingRecipe(
        document="a", tokens=100, cache_tokens=24, recompute_every=8, newlines=True, latency_tokens=4,
        positions=("cache", "text"), endurance_tokens=300,
    ),
    "needle": NeedleRecipe(lengths=(260, 300), depth_points=2, chat_template="never", new_tokens=3),
    "lost_in_the_middle": LostInTheMiddleRecipe(pairs=(3,), documents=(3,), positions=2, trials=1),
    "sinks": SinksRecipe(lengths=(16, 32), texts=4, map_layers=(0, -1)),
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
    assert "vega" in (out / f"{name}.html").read_text()
    assert (out / "scores.parquet").exists()
    events, _ = read_events(run.spool.path)
    metrics = [event["values"] for event in events if event["event"] == "metrics"]
    assert metrics == [{f"eval/{key}": value for key, value in scores.summary.items()}]
    progress = [(e["done"], e["total"]) for e in events if e["event"] == "progress"]
    assert progress[0][0] == 0
    assert progress[-1][0] == progress[-1][1] > 0


def test_a_stretch_of_the_rotary_positions_is_applied_while_loading(folders):
    model, corpus, out, run = folders
    found = []
    for rope in (None, RopeRecipe(type="linear", factor=4.0)):
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
    with pytest.raises(ValueError, match="2 of the common ones have other ids"):
        evaluate(model, corpus, recipe=recipe, resources=Resources(), out=out, run=run)
