"""The positive control: on Bigram-Backcopy a sink forms, a window without it collapses, a zero sink spares both.

The recipe `sink-control` at reduced size, by its own corpus, packing, training and evaluations, without Ray.
"""

import math

import pytest
from evaluating import evaluate
from toy_models import train
from transformers import AutoModelForCausalLM, AutoTokenizer

from longreach.evaluation.documents import held_out
from longreach.evaluation.sinks import Sinks
from longreach.evaluation.streaming import Streaming
from longreach.pipelines.reader import load
from longreach.training.corpus import pack_corpus
from longreach.training.recipe import OptimRecipe, TrainJob
from longreach.training.train_tokenizer import train_tokenizer

pytestmark = pytest.mark.slow

STEPS = 500
ROWS = "corpus.sources.0.generated.documents=8000"


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    """The recipe, and its corpus in a folder."""
    folder = tmp_path_factory.mktemp("control")
    recipe = load("sink-control", [f"pretrain.steps={STEPS}", ROWS]).recipe
    train_tokenizer(recipe.corpus, recipe.pretrain.vocab_size, folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    (folder / "corpus").mkdir()
    pack_corpus(recipe.corpus, recipe.pretrain.pack, tokenizer, folder / "corpus")
    return recipe, folder


def scores_of(control, sink: str):
    """Train an arm; return the summaries of both evaluations of what plain transformers loads."""
    recipe, folder = control
    section = recipe.pretrain
    todo = TrainJob(
        kind="pretrain",
        model=section.model,
        sink=sink,
        optim=OptimRecipe(**section.model_dump(include={*OptimRecipe.model_fields})),
        seed=recipe.seed,
        resources=recipe.resources,
        corpus=str(folder / "corpus"),
        base=str(folder / "base"),
        out=str(folder / sink / "out"),
        work=str(folder / sink / "work"),
        superseded_file=str(folder / sink / "superseded"),
    )
    train(todo.model_dump(mode="json"))
    model = AutoModelForCausalLM.from_pretrained(todo.out).eval()
    tokenizer = AutoTokenizer.from_pretrained(todo.out)
    texts = held_out(folder / "corpus" / "documents")
    found = {}
    for kind in (Sinks, Streaming):
        choices = getattr(recipe.evaluate, kind.name)
        found |= evaluate(kind, model, tokenizer, texts, **dict(choices)).summary
    return found


def test_a_sink_forms_and_without_it_perplexity_rises_by_more_than_a_hundred_times(control):
    found = scores_of(control, "token")
    assert found["sink_0.3_1"] > 0.5
    assert found["streaming_ppl_window"] > 100 * found["streaming_ppl_1_sink"]
    assert math.isclose(found["streaming_ppl_4_sinks"], found["streaming_ppl_1_sink"], rel_tol=0.01)


@pytest.mark.parametrize("sink", ["zero", "logit"])
def test_with_a_zero_sink_in_the_softmax_a_window_alone_does(control, sink):
    found = scores_of(control, sink)
    assert found["streaming_ppl_window"] < 1.1 * found["streaming_ppl_1_sink"]
    assert found["streaming_ppl_window"] < 5  # it learned the task: 32 symbols, of which few are likely
