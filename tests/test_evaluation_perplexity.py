import math

import numpy as np
import pytest
import torch
from evaluating import drawn, evaluate, names_of
from families import config_of
from tiny_models import byte_tokenizer, tiny_llama
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    ElectraConfig,
    ElectraForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaForCausalLM,
)

from longreach.evaluation.documents import Document, first_token_id, held_out
from longreach.evaluation.perplexity import Perplexity, position_rows
from longreach.evaluation.scores import mean_interval, paired


def document(name, tokens, domain="d", seed=0):
    return Document(name, domain, np.random.default_rng(seed).integers(0, 256, tokens))


def naive_nll(model, ids):
    """Log-softmax of the whole logits, one token at a time."""
    with torch.no_grad():
        logp = model(torch.tensor(ids)[None]).logits[0].double().log_softmax(-1)
    return np.array([-float(logp[t, ids[t + 1]]) for t in range(len(ids) - 1)])


def pick(scores, **where):
    found = [row for row in scores.rows if all(row.get(key) == value for key, value in where.items())]
    assert len(found) == 1, (where, found)
    return found[0]


def run(texts, model=None, tokenizer=None, **choices):
    choices = {"lengths": (64, 700), "last_tokens": 16} | choices
    return evaluate(Perplexity, model or tiny_llama(), tokenizer or byte_tokenizer(), texts, **choices)


def test_both_protocols_equal_the_naive_perplexity_of_each_window():
    """700 tokens: more than one chunk of the head, the last one ragged. fp32 bodies differ by summation order: 1e-5."""
    model, text = tiny_llama(), document("a", 1000)
    scores = run([text], model)
    for length in (64, 700):
        nll = naive_nll(model, text.ids_T[:length])
        row = pick(scores, kind="document", length=length, protocol="last_stride")
        assert row["nll"] == pytest.approx(nll[-16:].mean(), rel=1e-5)
        assert row["tokens"] == 16
        row = pick(scores, kind="document", length=length, protocol="whole_window")
        assert row["nll"] == pytest.approx(nll.mean(), rel=1e-5)
        assert row["tokens"] == length - 1
    assert scores.summary["ppl_700"] == pytest.approx(math.exp(nll[-16:].mean()), rel=1e-4)
    assert scores.summary["ppl_window_700"] == pytest.approx(math.exp(nll.mean()), rel=1e-4)
    assert scores.summary["tokens_per_s"] > 0


@pytest.mark.parametrize("length", [96, 97, 100])
def test_the_position_curve_covers_every_scored_token_once(length):
    model, text = tiny_llama(), document("a", length)
    curve = [row for row in run([text], model, lengths=(length,)).rows if row["kind"] == "position"]
    assert [(row["start"], row["end"]) for row in curve] == [(n, min(n + 16, length)) for n in range(0, length, 16)]
    nll = naive_nll(model, text.ids_T)
    for row in curve:  # token t's is nll[t - 1]; token 0 is not predicted
        assert row["nll"] == pytest.approx(nll[max(0, row["start"] - 1) : row["end"] - 1].mean(), rel=1e-5)


def test_a_short_document_counts_only_at_the_lengths_it_reaches():
    texts = [document("a", 100, "x", 1), document("b", 800, "y", 2), document("c", 800, "y", 3)]
    scores = run(texts)
    assert pick(scores, kind="pooled", length=64, protocol="last_stride", domain="*")["documents"] == 3
    pooled = pick(scores, kind="pooled", length=700, protocol="last_stride", domain="*")
    each = [pick(scores, kind="document", length=700, protocol="last_stride", document=n)["nll"] for n in "bc"]
    assert pooled["documents"] == 2
    assert pooled["tokens"] == 32
    assert pooled["nll"] == pytest.approx(np.mean(each))
    half = 12.706 * abs(each[0] - each[1]) / 2  # Student's t of one degree of freedom
    assert math.log(pooled["ppl_low"]) == pytest.approx(np.mean(each) - half, abs=1e-4)
    assert "ppl_low" not in pick(scores, kind="pooled", length=64, protocol="last_stride", domain="x")


def test_validation_documents_are_scored_only_if_they_are_named():
    splits = {"a": "test", "b": "test", "v": "validation"}
    texts = [Document(name, "d", document(name, 64).ids_T, split) for name, split in splits.items()]

    def read(texts, **choices):
        return run(texts, lengths=(64,), **choices).distinct("document", kind="document")

    assert read(texts) == ["a", "b"]
    assert read(texts, documents=("a", "v")) == ["a", "v"]
    assert read(texts[2:]) == ["v"], "there is nothing else"


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_first_document_without_a_token_to_score_is_passed_over(tokens):
    texts = [document("short", tokens), document("a", 100)]
    got, expected = (run(some, lengths=(100,), last_tokens=20) for some in (texts, texts[1:]))
    assert got.rows == expected.rows


def test_the_models_own_first_token_comes_first_and_is_not_scored():
    model, text, tokenizer = tiny_llama(), document("a", 64), byte_tokenizer(first="<sink>")
    assert first_token_id(tokenizer) == 257
    assert first_token_id(byte_tokenizer()) is None
    appends = byte_tokenizer()
    ends = processors.TemplateProcessing(single="$A <s>", special_tokens=[("<s>", 256)])
    appends.backend_tokenizer.post_processor = ends
    assert appends("a").input_ids[-1] == 256
    assert first_token_id(appends) is None, "what it appends is no first token"
    row = pick(run([text], model, tokenizer, lengths=(64,)), kind="document", protocol="whole_window")
    assert row["tokens"] == 63  # the same tokens as without: models with and without compare
    assert row["nll"] == pytest.approx(naive_nll(model, [257, *text.ids_T])[1:].mean(), rel=1e-5)


def test_lengths_that_change_the_rotary_frequencies_get_a_pass_of_their_own():
    """Dynamic NTK past its trained length: a longer pass gives other predictions for the same token."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    model, text = tiny_llama(rope_parameters=rope, max_position_embeddings=32), document("a", 256)
    scores = run([text], model, lengths=(64, 256))
    short = naive_nll(tiny_llama(rope_parameters=rope, max_position_embeddings=32), text.ids_T[:64])
    row = pick(scores, kind="document", length=64, protocol="whole_window")
    assert row["nll"] == pytest.approx(short.mean(), rel=1e-5)
    inside = naive_nll(model, text.ids_T)[:63]
    assert abs(inside.mean() - short.mean()) > 1e-3


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"lengths": (64, 5000)}, "length 5000.*a, has 800 tokens"),
        ({"lengths": (16, 64)}, "lengths .16, 64. .*last_tokens 16.*17"),
        ({"documents": ("hamlet*",)}, "hamlet.*there are: a"),
    ],
)
def test_a_length_or_name_that_fits_nothing_is_an_error_with_both_numbers(recipe, message):
    with pytest.raises(ValueError, match=message):
        run([document("a", 800)], **recipe)


def test_logits_that_are_not_finite_name_document_and_token():
    model, text = tiny_llama(), document("a", 100)

    def break_position_41(module, inputs, output):
        output[:, 41:42] = float("nan")

    model.model.norm.register_forward_hook(break_position_41)
    with pytest.raises(FloatingPointError, match=r"^a: .*token 42 "):
        run([text], model, lengths=(64,))


def test_a_text_of_another_vocabulary_is_an_error():
    text = document("a", 100)
    text.ids_T[60] = 999
    with pytest.raises(ValueError, match="a has token id 999, but the model has only 260 embeddings"):
        run([text], lengths=(64,))


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere", "hyperclovax"])
def test_a_family_that_changes_its_logits_is_scored_as_it_is(family):
    config = config_of(family)
    config.initializer_range = 0.3  # with weights near 0 it would make no difference
    torch.manual_seed(0)
    model, text = AutoModelForCausalLM.from_config(config).eval(), document("a", 60)
    row = pick(run([text], model, lengths=(50,)), kind="document", protocol="whole_window")
    assert row["nll"] == pytest.approx(naive_nll(model, text.ids_T[:50]).mean(), rel=1e-5)


def test_a_model_that_changes_its_logits_in_an_unknown_way_is_refused():
    class Louder(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 1.1 * output.logits
            return output

    with pytest.raises(ValueError, match="Louder changes its logits"):
        run([document("a", 100)], Louder(tiny_llama().config).eval(), lengths=(64,))


def test_a_model_whose_tokens_see_later_ones_is_refused():
    vocab = tiny_llama().config.vocab_size
    config = BertConfig(
        vocab_size=vocab, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config.initializer_range = 0.3  # with weights near 0 nothing depends on anything
    with pytest.raises(ValueError, match="BertLMHeadModel is no causal language model: other tokens at the end"):
        run([document("a", 100)], BertLMHeadModel(config).eval(), lengths=(64,))


def test_a_model_whose_logits_cannot_be_computed_in_chunks_is_refused():
    small = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 16}
    electra = ElectraForCausalLM(ElectraConfig(**small, embedding_size=16))
    with pytest.raises(ValueError, match="ElectraForCausalLM changes its hidden states between its body"):
        run([document("a", 100)], electra.eval(), lengths=(64,))
    llama4 = Llama4ForCausalLM(Llama4TextConfig(**small, num_local_experts=1))
    with pytest.raises(ValueError, match="Llama4ForCausalLM has no part without a head"):
        run([document("a", 100)], llama4.eval(), lengths=(64,))


def test_held_out_documents_come_from_a_folder_that_datasets_opens(tmp_path):
    import datasets

    rows = {"name": ["a", "b"], "domain": ["x", "y"], "split": ["test", "validation"], "input_ids": [[1, 2, 3], [4]]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "documents")
    read = held_out(tmp_path / "documents")
    assert [(d.name, d.domain, d.ids_T.tolist()) for d in read] == [("a", "x", [1, 2, 3]), ("b", "y", [4])]
    assert [d.split for d in read] == ["test", "validation"]


def test_the_figure_says_which_model_and_has_units():
    scores = run([document("a", 800), document("b", 800, "e", 1)]).named("base")
    chart = drawn(scores)["perplexity-by-document.png"]
    assert "base" in str(chart["title"]["text"])
    assert "tokens" in str(chart["layer"])
    assert set(names_of(chart)) == {"a", "b", "all documents"}
    assert "low" in str(chart), "the mean over documents has its interval"
    assert set(names_of(drawn(scores)["along.png"])) == {"a", "b"}


def test_two_models_are_compared_on_the_same_tokens_and_over_documents():
    texts = [document("a", 800), document("b", 800, seed=1)]
    ours, theirs = run(texts), run(texts, tiny_llama(seed=1))
    found = paired(ours.rows, theirs.rows, 700)
    bins = [[row["nll"] for row in scores.rows if row["kind"] == "position"] for scores in (ours, theirs)]
    assert found["documents"] == 2
    widths = [row["end"] - row["start"] for row in ours.rows if row["kind"] == "position"]
    assert {*widths} == {16, 12}, "the last of each text is shorter, and counts for less"
    assert found["nll"] == pytest.approx(np.average(np.subtract(*bins), weights=widths))
    assert found["low"] < found["nll"] < found["high"]
    by_document = np.subtract(*bins).reshape(2, -1) @ np.array(widths).reshape(2, -1)[0] / sum(widths) * 2
    assert (found["low"], found["high"]) == pytest.approx(mean_interval(by_document))
    assert paired(ours.rows, ours.rows, 700)["nll"] == 0
    with pytest.raises(ValueError, match="not measured on the same tokens"):
        paired(ours.rows, run(texts[:1]).rows, 700)


def test_a_text_s_last_bin_of_one_token_does_not_count_as_much_as_a_whole_one():
    def rows(last):
        nll = [1.0] * 4 + [last]
        return [
            {"kind": "position", "document": "a", "start": 256 * n, "end": min(256 * n + 256, 1025), "nll": nll[n]}
            for n in range(5)
        ]

    found = paired(rows(6.0), rows(1.0), 1025)
    assert found["nll"] == pytest.approx(5 / 1025), "not 1, a fifth of 5"
    assert found["high"] < 0.1
    assert paired(rows(6.0), rows(1.0), 1025, beyond=512)["nll"] == pytest.approx(5 / 513)
    assert paired(rows(6.0), rows(1.0), 1024)["nll"] == 0
    assert paired(rows(6.0), rows(1.0), 1000)["nll"] == 0
    assert paired(rows(6.0), rows(1.0), 1024 + 1)["nll"] > 0, "the bin in which a length ends counts"
    assert found["documents"] == 1, "so that its interval is over bins, and within this text"


def test_a_bin_counts_in_the_stretch_in_which_it_ends():
    """Up to 300 tokens of bins of 256, the second bin would bring 212 tokens from beyond."""

    def rows(late):
        return position_rows({"document": "a", "domain": "d"}, np.r_[np.ones(299), np.full(700, late)], 256)

    assert paired(rows(5.0), rows(1.0), 300)["nll"] == 0
    assert paired(rows(5.0), rows(1.0), 1000, beyond=300)["nll"] == pytest.approx(4 * 700 / (1000 - 256))
    with pytest.raises(ValueError, match="same tokens from 0 to 200"):
        paired(rows(5.0), rows(1.0), 200)


def test_a_model_whose_frequencies_change_with_the_length_is_compared_by_the_pass_of_that_length():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    model = tiny_llama(rope_parameters=rope, max_position_embeddings=32)
    texts = [document(f"t{seed}", 256, seed=seed) for seed in range(3)]
    dynamic = run(texts, model, lengths=(64, 256), last_tokens=16)
    short = run(texts, model, lengths=(64,), last_tokens=16)
    assert paired(dynamic.rows, short.rows, 64)["nll"] == pytest.approx(0, abs=1e-6)
    long_pass = [row for row in dynamic.rows if row["kind"] == "position"]
    assert paired(dynamic.rows[::-1], long_pass, 256)["nll"] == 0, "bins of the shorter pass stand in for the longest"
    assert abs(paired(long_pass, short.rows, 64)["nll"]) > 1e-4, "the frequencies do not change, so nothing is tested"
    assert {row["end"] for row in long_pass} == {*range(16, 257, 16)}, "curves are of the longest pass"


def test_bins_of_one_document_are_no_independent_documents():
    """What differs between documents decides the interval, however long each of them is."""
    drawn, held = np.random.default_rng(0), []
    for _ in range(400):
        ours, theirs = [], []
        for document in "abcdef":
            of_document = drawn.normal(0.0, 0.05)
            for start in range(0, 4096, 256):
                row = {"kind": "position", "document": document, "start": start, "end": start + 256}
                theirs.append(row | {"nll": 2.0})
                ours.append(row | {"nll": 2.0 + of_document + drawn.normal(0.0, 0.05)})
        found = paired(ours, theirs, 4096)
        held.append(found["low"] <= 0.0 <= found["high"])
    assert 0.92 < np.mean(held) < 0.98


def test_two_documents_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"1 names belong to several held-out documents \(a\)"):
        run([document("a", 800), document("a", 800, seed=1)])
