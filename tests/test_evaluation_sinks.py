import numpy as np
import pytest
import torch
from evaluating import drawn, evaluate
from tiny_models import byte_tokenizer, tiny_llama

from longreach.evaluation.documents import Document
from longreach.evaluation.sinks import Sinks, pieces

TEXTS = [Document(name, "d", np.random.default_rng(n).integers(0, 256, 100)) for n, name in enumerate("ab")]


def run(model=None, **choices):
    choices = {"lengths": (16, 32), "texts": 8, "map_layers": (0,)} | choices
    return evaluate(Sinks, model or tiny_llama(), byte_tokenizer(), TEXTS, **choices)


def test_even_attention_is_its_own_yardstick():
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.zero_()
    scores = run(model)
    for row in scores.rows:
        if row["kind"] in ("layer", "head"):
            assert row["first_token"] == pytest.approx(row["uniform"], rel=1e-5)
            assert row["token_3"] == pytest.approx(row["uniform"], rel=1e-5)
    by_query = {}
    for row in scores.rows:
        if row["kind"] == "map":
            by_query.setdefault(row["query"], []).append(row["mass"])
    assert all(masses == pytest.approx([1 / (q + 1)] * (q + 1), rel=1e-5) for q, masses in by_query.items())
    assert len(by_query) == 16
    assert scores.summary["first_token_mass_16"] == pytest.approx(sum(1 / (t + 1) for t in range(8, 16)) / 8, rel=1e-5)


def test_a_row_a_layer_and_a_head_and_the_figure_has_all_parts():
    scores = run()
    kinds = [row["kind"] for row in scores.rows]
    assert (kinds.count("layer"), kinds.count("head"), kinds.count("map")) == (4, 16, 136)
    assert list(drawn(scores.named("m"))) == ["sinks-16.png", "sinks-32.png", "sinks-m.png", "sinks-m-layer-0.png"]


def test_longer_texts_are_fewer_and_come_from_all_documents():
    recipe = Sinks.Choices(lengths=(16, 32), texts=8)
    assert [len(pieces(recipe, TEXTS, n)) for n in (16, 32)] == [8, 4]
    assert {tuple(p[:4]) for p in pieces(recipe, TEXTS, 32)} >= {tuple(d.ids_T[:4]) for d in TEXTS}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"lengths": (200,), "map_layers": ()}, "lengths 200: no held-out document"),
        ({"lengths": (80,)}, "map_layers at 80 tokens: maps are drawn up to 64"),
        ({"lengths": (4,)}, "lengths 4 is not above first_tokens 4"),
        ({"map_layers": (2,)}, r"map_layers \[2\]: the model has layers 0 to 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(recipe, message):
    with pytest.raises(ValueError, match=message):
        run(**recipe)
