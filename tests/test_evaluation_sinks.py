import numpy as np
import pytest
import torch
from evaluating import drawn, evaluate
from tiny_models import byte_tokenizer, tiny_llama

from longreach.evaluation.documents import Document
from longreach.evaluation.sinks import Sinks, pieces
from longreach.training.model import with_softmax_sinks

TEXTS = [Document(name, "d", np.random.default_rng(n).integers(0, 256, 100)) for n, name in enumerate("ab")]


def one_head_on_the_sink(head):
    """A model whose heads attend evenly, but for one of the second layer, which rests on the token <sink>."""
    model = tiny_llama()
    first, second = model.model.layers
    with torch.no_grad():
        for weight in (first.self_attn.o_proj.weight, first.mlp.down_proj.weight):
            weight.zero_()  # so that the second layer reads embeddings
        for attention in (first.self_attn, second.self_attn):
            attention.q_proj.weight.zero_()
        embedding = model.model.embed_tokens.weight
        embedding[:, :2] = torch.tensor([0.0, 50.0])  # all tokens are alike in channel 1,
        embedding[257, :2] = torch.tensor([50.0, 50.0])  # and the sink alone has channel 0
        slow = 3  # of 8 numbers: the slowest pair of RoPE, which turns by 0.001 a token
        second.self_attn.q_proj.weight[8 * head + slow, 1] = 10
        second.self_attn.k_proj.weight.zero_()
        second.self_attn.k_proj.weight[slow, 0] = 10  # of the first KV head, which heads 0 and 1 share
    return model


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
    assert list(drawn(scores.named("m"))) == [
        "sinks-16.png",
        "sinks-32.png",
        "sinks-values.png",
        "sinks-residual.png",
        "sinks-m.png",
        "sinks-m-layer-0.png",
    ]


def test_heads_that_rest_on_a_token_are_counted_beside_the_mean_mass():
    """One head of eight rests on the first token: the mean hardly tells, the count does."""
    model, tokenizer = one_head_on_the_sink(head=1), byte_tokenizer("<sink>")
    scores = evaluate(Sinks, model, tokenizer, TEXTS, lengths=(16, 80), texts=8, map_layers=())
    assert (scores.summary["sink_0.3_1"], scores.summary["sink_0.2_1"]) == (1 / 8, 1 / 8)
    assert scores.summary["sink_0.3_2"] == 0
    assert scores.summary["first_token_mass_80"] < 0.2
    assert "sink_0.3_softmax" not in scores.summary
    assert [row["heads_0.3"] for row in scores.rows_with(kind="layer", length=80)] == [0, 1 / 4]
    # of 16 tokens even an even head gives the first more than 0.2
    assert not any("heads_0.2" in row for row in scores.rows_with(kind="layer", length=16))


def test_an_own_sink_in_the_softmax_is_counted_apart():
    model = with_softmax_sinks(tiny_llama())
    with torch.no_grad():
        model.model.layers[0].self_attn.sinks.fill_(100.0)
    summary = run(model, map_layers=()).summary
    assert (summary["sink_0.3_softmax"], summary["sink_0.3_1"]) == (0.5, 0)


def test_the_first_token_s_norms_stand_beside_all_others():
    model = tiny_llama(num_hidden_layers=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[257] *= 1e3
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.layers[0].input_layernorm.weight.fill_(1)
    tokenizer = byte_tokenizer("<sink>")
    choices = {"lengths": (16,), "texts": 8, "map_layers": ()}
    (row,) = evaluate(Sinks, model, tokenizer, TEXTS, **choices).rows_with(kind="layer")
    lengths = model.model.embed_tokens.weight.detach().norm(dim=-1)
    assert row["residual_first"] == pytest.approx(float(lengths[257]), rel=1e-4)
    assert row["residual_others"] == pytest.approx(float(lengths[:256].mean()), rel=0.1)
    # a layer's norm takes the length away, so values stay of one size
    assert 0.5 < row["values_first"] / row["values_others"] < 2


def test_longer_texts_are_fewer_and_come_from_all_documents():
    recipe = Sinks.Choices(lengths=(16, 32), texts=8)
    assert [len(pieces(recipe, TEXTS, n)) for n in (16, 32)] == [8, 4]
    assert {tuple(p[:4]) for p in pieces(recipe, TEXTS, 32)} >= {tuple(d.ids_T[:4]) for d in TEXTS}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"lengths": (200,), "map_layers": ()}, "lengths 200: no held-out document"),
        ({"lengths": (80,)}, "shortest length is 80 tokens, but maps have at most 64"),
        ({"lengths": (4,)}, "lengths 4 must be more than first_tokens 4"),
        ({"map_layers": (2,)}, r"map_layers \[2\] do not exist: the model has layers 0 to 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(recipe, message):
    with pytest.raises(ValueError, match=message):
        run(**recipe)
