"""Gain from context: the same tokens at every length, paired by document, the base's best length by validation."""

import math

import numpy as np
import pytest
import torch
from evaluating import drawn, evaluate, names_of
from pydantic import ValidationError
from tiny_models import byte_tokenizer, tiny_llama

from longreach.evaluation.base import Background
from longreach.evaluation.documents import Document
from longreach.evaluation.figures import Style
from longreach.evaluation.gain import Gain, best_length, difference, window_ends
from longreach.evaluation.gain_page import mean_over_seeds
from longreach.evaluation.likelihood import token_nll
from longreach.evaluation.repeats import (
    nats_by_distance,
    over_yardstick,
    repeat_distances,
    repeat_rows,
    repeat_table,
    repeated,
)
from longreach.evaluation.scores import EvalScores

LENGTHS = (40, 64, 128)


def document(name, tokens, split="test", seed=0):
    return Document(name, "d", np.random.default_rng(seed).integers(0, 256, tokens), split)


def run(texts, model=None, tokenizer=None, **choices):
    choices = {"lengths": LENGTHS, "score_tokens": 16} | choices
    return evaluate(Gain, model or tiny_llama(), tokenizer or byte_tokenizer(), texts, **choices)


def naive(model, ids, scored):
    """Mean NLL of the last tokens by the whole logits, one token at a time."""
    with torch.no_grad():
        logp = model(torch.tensor(ids)[None]).logits[0].double().log_softmax(-1)
    return np.mean([-float(logp[t - 1, ids[t]]) for t in range(len(ids) - scored, len(ids))])


def pick(scores, **where):
    (row,) = scores.rows_with(**where)
    return row


def made_up(nll, split="test", documents=("a", "b", "c")):
    """Rows of documents whose NLL at a length is nll[length], and 0.1 more from document to document."""
    rows = []
    for n, name in enumerate(documents):
        for length, value in nll.items():
            place = {"document": name, "domain": "d", "split": split, "length": length, "tokens": 16}
            rows.append({"kind": "window", "end": 200, "nll": value + 0.1 * n} | place)
            rows.append({"kind": "document", "nll": value + 0.1 * n} | place)
    for length, value in nll.items():
        pooled = {"kind": "pooled", "split": split, "length": length, "documents": len(documents)}
        rows.append(pooled | {"nll": value + 0.1 * (len(documents) - 1) / 2})
    return rows


def test_every_length_scores_the_same_last_tokens_with_the_nearest_ones_before_them():
    """fp32 bodies differ by summation order: 1e-5."""
    model, text = tiny_llama(), document("a", 300)
    scores = run([text], model)
    for length in LENGTHS:
        row = pick(scores, kind="window", length=length)
        assert (row["end"], row["tokens"]) == (300, 16)
        assert row["nll"] == pytest.approx(naive(model, text.ids_T[300 - length :], 16), rel=1e-5)
        assert scores.summary[f"gain_nll_{length}"] == pytest.approx(row["nll"])
    gained = pick(scores, kind="window", length=40)["nll"] - pick(scores, kind="window", length=128)["nll"]
    assert scores.summary["own_gain_128"] == pytest.approx(gained)
    assert "own_gain_40" not in scores.summary


def test_only_the_scored_tokens_reach_the_head():
    model, text = tiny_llama(), document("a", 128)
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-2]))
    assert len(token_nll(model, text.ids_T, "a", last=16)) == 16
    assert seen == [16]
    whole = token_nll(model, text.ids_T, "a")
    assert token_nll(model, text.ids_T, "a", last=16) == pytest.approx(whole[-16:])


def test_the_models_own_first_token_stands_before_each_context():
    model, text = tiny_llama(), document("a", 200)
    scores = run([text], model, byte_tokenizer(first="<sink>"))
    row = pick(scores, kind="window", length=64)
    assert row["nll"] == pytest.approx(naive(model, [257, *text.ids_T[-64:]], 16), rel=1e-5)


def test_windows_are_spread_evenly_over_the_places_that_every_length_reaches():
    assert window_ends(1000, 400, 1, 16) == [1000]
    assert window_ends(1000, 400, 3, 16) == [400, 700, 1000]
    assert window_ends(430, 400, 3, 16) == [400, 430], "three windows would score some tokens twice"
    assert window_ends(400, 400, 3, 16) == [400]


def test_a_documents_windows_are_averaged_so_that_each_document_counts_once():
    texts = [document("a", 500), document("b", 130, seed=1)]
    scores = run(texts, windows=4)
    assert (pick(scores, kind="document", document="a", length=64)["windows"]) == 4
    assert (pick(scores, kind="document", document="b", length=64)["windows"]) == 1
    windows = [row["nll"] for row in scores.rows_with(kind="window", document="a", length=64)]
    each = [np.mean(windows), pick(scores, kind="window", document="b", length=64)["nll"]]
    pooled = pick(scores, kind="pooled", length=64, split="test")
    assert pooled["nll"] == pytest.approx(np.mean(each))
    assert pooled["documents"] == 2
    half = 12.706 * abs(each[0] - each[1]) / 2  # Student's t of one degree of freedom
    assert (pooled["nll_low"], pooled["nll_high"]) == pytest.approx(
        (np.mean(each) - half, np.mean(each) + half), abs=1e-4
    )


def test_short_documents_are_left_out_by_name_and_none_left_is_an_error_with_both_numbers():
    scores = run([document("a", 300), document("brief", 100)])
    assert pick(scores, kind="left_out")["tokens"] == 100
    assert {row["document"] for row in scores.rows_with(kind="document")} == {"a"}
    (text, *_) = Gain.section({"m": scores.named("m")}, Style.of(["m"]), Background()).blocks
    assert "left out: brief (100 tokens)" in text
    with pytest.raises(ValueError, match=r"length 128 is longer than every chosen test document.*brief, has 100"):
        run([document("brief", 100)])


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_first_document_without_a_token_to_score_is_left_out(tokens):
    scores = run([document("tiny", tokens), document("whole", 128)], lengths=(64, 128), score_tokens=16)
    left_out = pick(scores, kind="left_out")
    assert (left_out["document"], left_out["tokens"]) == ("tiny", tokens)


def test_validation_documents_choose_lengths_and_count_in_no_score():
    texts = [document("a", 300), document("v", 300, "validation", seed=1)]
    scores = run(texts)
    assert pick(scores, kind="pooled", split="test", length=64)["documents"] == 1
    assert pick(scores, kind="pooled", split="validation", length=64)["documents"] == 1
    assert scores.summary["gain_nll_64"] == pick(scores, kind="document", document="a", length=64)["nll"]
    assert best_length(scores.rows, 64).split == "validation"
    none = run(texts, choose_on=())
    assert not none.rows_with(split="validation")
    assert best_length(none.rows, 64).split == "test"
    assert not run(texts[:1]).rows_with(split="validation"), "a corpus without any is no mistake"
    with pytest.raises(ValueError, match=r"no held-out document matches.*othello.*there are: v"):
        run(texts, choose_on=("othello",))
    with pytest.raises(ValueError, match=r"every chosen validation document.*v, has 90.*set choose_on to \[\]"):
        run([texts[0], document("v", 90, "validation")])


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"lengths": (16, 64)}, "lengths: 16 has no room for score_tokens 16.*at least 17"),
        ({"base_lengths": (64,)}, "is one length, but a gain needs two"),
        ({"base_lengths": (16, 64)}, "base_lengths: 16 has no room for score_tokens 16"),
        (
            {"lengths": (32, 64), "base_lengths": (32, 128)},
            "base_lengths: 128 is more than the longest of `lengths`, 64",
        ),
    ],
)
def test_choices_that_leave_nothing_to_compare_are_refused_before_a_model_is_loaded(choices, message):
    with pytest.raises(ValidationError, match=message):
        Gain.Choices(**{"score_tokens": 16} | choices)


def test_the_base_may_have_lengths_of_its_own_and_is_scored_on_the_same_tokens():
    texts = [document("a", 300), document("short", 100, seed=1)]
    choices = Gain.Choices(lengths=(40, 128), base_lengths=(40, 64), score_tokens=16, windows=2)
    arm = run(texts, **choices.of_model(is_base=False).model_dump())
    base = run(texts, **choices.of_model(is_base=True).model_dump())
    assert [row["length"] for row in base.rows_with(kind="pooled")] == [40, 64]
    assert [row["length"] for row in arm.rows_with(kind="pooled")] == [40, 128]
    assert pick(base, kind="left_out")["document"] == "short", "else it would be scored on another text than the arm"
    assert difference([arm.rows], 128, [base.rows], 64).nats == pytest.approx(
        base.summary["gain_nll_64"] - arm.summary["gain_nll_128"]
    )
    assert choices.of_model(is_base=True).longest_input() == 64, "memory is checked for what is read"
    assert choices.of_model(is_base=False).longest_input() == 128
    assert "base_lengths" not in choices.of_model(is_base=False).identity(), "no other model's scores depend on it"


def test_lengths_that_change_the_rotary_frequencies_are_read_from_a_clean_start():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    changes = {"rope_parameters": rope, "max_position_embeddings": 32}
    text = document("a", 160)
    scores = run([text], tiny_llama(**changes), lengths=(64, 128), windows=2)
    alone = naive(tiny_llama(**changes), text.ids_T[-64:], 16)
    after_a_long_one = pick(scores, kind="window", length=64, end=160)
    assert after_a_long_one["nll"] == pytest.approx(alone, rel=1e-5)


def test_the_difference_is_paired_by_document_and_needs_the_same_tokens():
    base, arm = made_up({64: 2.0, 128: 2.5}), made_up({64: 1.9, 128: 1.75})
    found = difference([arm], 128, [base], 64)
    assert (found.nats, found.documents) == (pytest.approx(0.25), 3)
    assert (found.low, found.high) == (pytest.approx(0.25), pytest.approx(0.25)), "documents differ, their gains do not"
    alone = difference([made_up({128: 1.0}, documents="a")], 128, [made_up({64: 2.0}, documents="a")], 64)
    assert math.isnan(alone.low)
    with pytest.raises(ValueError, match="the tokens scored at context lengths"):
        difference([arm], 128, [made_up({64: 2.0}, documents=("a", "b"))], 64)
    with pytest.raises(ValueError, match="the tokens scored at context lengths"):
        difference([arm], 256, [base], 64)


def test_the_base_is_taken_at_the_best_of_its_own_lengths_by_its_validation_documents():
    test = made_up({64: 2.0, 128: 1.0, 256: 0.5})
    assert best_length(test, 128)[:2] == (128, "test")
    both = test + made_up({64: 1.0, 128: 2.0, 256: 0.5}, "validation", ("v",))
    assert best_length(both, 128) == (64, "validation", 1)
    assert best_length(both, None).length == 256
    with pytest.raises(ValueError, match=r"no length of \[64, 128, 256\] is within the 32 tokens"):
        best_length(both, 32)
    for most in (None, 32):
        with pytest.raises(ValueError, match="no row of kind pooled"):
            best_length([row for row in test if row["kind"] != "pooled"], most)


def test_the_page_of_one_model_draws_its_own_gain_and_says_how_many_documents_there_are():
    scores = run([document("a", 300), document("b", 300, seed=1)]).named("base")
    chart = drawn(scores)["own-gain.png"]
    assert set(names_of(chart)) == {"a", "b", "mean over documents"}
    text, own, nll, by_document, *_ = Gain.section({"base": scores}, Style.of(["base"]), Background()).blocks
    assert "2 test documents. In small type: 95% intervals over the test documents." in text
    assert list(nll.columns) == ["model", "40", "64", "128"]
    assert own.columns == ["model", "64", "128"]
    assert len(by_document.rows) == 6


def seeded(nll_by_document, length=128, short=64):
    """Scores of one seed: each document's NLL at the length, and 2.0 at the shorter one."""
    rows = []
    for name, nll in nll_by_document.items():
        for at, value in ((short, 2.0), (length, nll)):
            place = {"document": name, "domain": "d", "split": "test", "length": at, "tokens": 16}
            rows.append({"kind": "window", "end": 200, "nll": value} | place)
            rows.append({"kind": "document", "nll": value, "own_gain": 2.0 - value} | place)
    for at in (short, length):
        values = [row["nll"] for row in rows if row["kind"] == "document" and row["length"] == at]
        mean = {"nll": float(np.mean(values)), "own_gain": 2.0 - float(np.mean(values)), "documents": len(values)}
        rows.append({"kind": "pooled", "document": "*", "split": "test", "length": at} | mean)
    return EvalScores("gain", "p", {}, rows, {})


def test_tables_average_an_arms_seeds_and_their_intervals_run_over_documents_and_seeds():
    """By hand: seeds 1.0, 1.2 and 1.4, 1.6 over documents a and b; their mean is 1.3."""
    first, second = seeded({"a": 1.0, "b": 1.2}), seeded({"a": 1.4, "b": 1.6})
    mean = mean_over_seeds([first, second], 128, "nll")
    assert mean["nll"] == pytest.approx(1.3)
    # variances of the mean: 0.01 of documents, 0.04 of seeds; 1.47 degrees of freedom
    assert (mean["nll_low"], mean["nll_high"]) == (
        pytest.approx(1.3 - 1.3837, abs=1e-4),
        pytest.approx(1.3 + 1.3837, abs=1e-4),
    )
    assert mean_over_seeds([first, second], 128, "own_gain")["own_gain"] == pytest.approx(0.7)

    models = {"base": seeded({"a": 1.5, "b": 1.7}), "lora": first, "lora.s1": second}
    background = Background(arms={"lora": ("lora", "lora.s1")})
    text, own, nll, by_document, *_ = Gain.section(models, Style.of(list(models)), background).blocks
    assert "its intervals are over documents and seeds" in text
    assert [line[0] for line in nll.rows] == ["base", "lora\n2 seeds"]
    assert nll.rows[1][2] == "1.300\n-0.084 to 2.684"
    assert own.rows[1][1] == "+0.700\n-0.684 to +2.084"
    assert by_document.columns == ["document", "base", "lora"]
    assert by_document.rows[1] == ["a\nat 128 tokens", "1.500", "1.200"]


def test_seeds_that_did_not_score_the_same_tokens_stay_apart():
    models = {"lora": seeded({"a": 1.0, "b": 1.2}), "lora.s1": seeded({"a": 1.4})}
    background = Background(arms={"lora": ("lora", "lora.s1")})
    _, _, nll, *_ = Gain.section(models, Style.of(list(models)), background).blocks
    assert [line[0] for line in nll.rows] == ["lora", "lora.s1"]


def test_a_token_is_repeated_from_where_its_run_of_four_last_stood():
    run_of_four = [1, 2, 3, 4]
    ids = [*run_of_four, 9, *run_of_four, 8, 8, *run_of_four, 5]
    assert repeat_distances(ids, last=len(ids)).tolist() == [0] * 8 + [5] + [0] * 5 + [6] + [0]
    assert repeat_distances(ids, last=2).tolist() == [6, 0]
    assert repeat_distances([1, 1, 1, 1, 1, 1], last=6).tolist() == [0, 0, 0, 0, 1, 1]  # runs may overlap


def test_nats_are_summed_by_bands_of_distances():
    nll, distances = np.array([1.0, 2.0, 4.0, 8.0, 16.0]), np.array([1, 1024, 0, 1025, 2049])
    bands = nats_by_distance(nll, distances)
    assert bands == {"1024": [2, 3.0], "2048": [1, 8.0], "4096": [1, 16.0]}
    rows = repeat_rows({"document": "a"}, bands)
    assert [(row["up_to"], row["tokens"], row["nll"]) for row in rows] == [
        (1024, 2, 1.5),
        (2048, 1, 8.0),
        (4096, 1, 16.0),
    ]


def test_repeats_are_compared_token_by_token_with_an_interval_over_documents():
    ours = [{"document": "a", "tokens": 3, "nll": 1.0}, {"document": "b", "tokens": 1, "nll": 2.0}]
    theirs = [{"document": "b", "tokens": 1, "nll": 2.0}, {"document": "a", "tokens": 3, "nll": 2.0}]
    found = repeated([ours], theirs)
    assert (found.tokens, found.nll) == (4, 1.25)
    half = 12.706 * 0.375  # the weights 1.5 and 0.5 times what the documents are off the mean, 0.25 and 0.75
    assert found.better == pytest.approx((0.75, 0.75 - half, 0.75 + half, 2, 1), abs=1e-4)
    assert repeated([ours], theirs[:1]) is None
    assert repeated([ours], [theirs[0], {"document": "a", "tokens": 2, "nll": 2.0}]) is None


def test_the_same_tokens_are_repeated_at_every_length_and_the_page_says_how_well_each_model_does():
    passage = np.random.default_rng(3).integers(0, 256, 40)
    filler = np.random.default_rng(4).integers(0, 256, 1100)
    text = Document("a", "d", np.concatenate([passage, filler, passage]), "test")
    scores = run([text], tiny_llama(max_position_embeddings=2048), lengths=(64, 1180), score_tokens=40)
    repeats = scores.rows_with(kind="repeat")
    assert {(row["length"], row["up_to"], row["tokens"]) for row in repeats} == {(64, 2048, 37), (1180, 2048, 37)}
    assert repeat_table({"m": [scores]}, None, None)[0].columns[1] == "1,025 to 2,048\n37 tokens"
    (window,) = scores.rows_with(kind="window", length=64)
    assert repeats[0]["nll"] != window["nll"]
    few = run([Document("a", "d", text.ids_T[:1180][-1160:], "test")], lengths=(64, 128), score_tokens=40)
    assert repeat_table({"m": [few]}, None, None) == []


def test_without_the_bases_repeats_each_model_is_still_shown_and_nothing_is_promised():
    arm, base = scored_repeats({1024: 2.0}, {1024: 2.0}), EvalScores("gain", "", {}, [], {})
    (table,) = repeat_table({"arm": [arm], "base": [base]}, "base", 1024)
    assert table.rows == [["arm\nat 1,024 tokens", "2.000"]]
    assert "In small type" not in table.legend


def test_repeats_of_an_arm_are_the_mean_of_its_seeds():
    theirs = [{"document": "a", "tokens": 3, "nll": 2.0}, {"document": "b", "tokens": 1, "nll": 2.0}]
    first = [{"document": "a", "tokens": 3, "nll": 1.0}, {"document": "b", "tokens": 1, "nll": 2.0}]
    second = [{"document": "a", "tokens": 3, "nll": 2.0}, {"document": "b", "tokens": 1, "nll": 0.0}]
    found = repeated([first, second], theirs)
    assert found.nll == pytest.approx((1.25 + 1.5) / 2)
    assert found.better.nats == pytest.approx((0.75 + 0.5) / 2)
    assert (found.better.documents, found.better.seeds) == (2, 2)
    # variances of the mean: 0.0352 of documents, 0.0156 of seeds; 1.74 degrees of freedom
    assert (found.better.low, found.better.high) == (
        pytest.approx(0.625 - 1.1209, abs=1e-4),
        pytest.approx(0.625 + 1.1209, abs=1e-4),
    )


def scored_repeats(by_length, pooled):
    """Scores with one band of 40 tokens in each of two documents: NLL by length, and that of all tokens."""
    rows = []
    for length, nll in by_length.items():
        rows.append({"kind": "pooled", "split": "test", "length": length, "nll": pooled[length]})
        for document in "ab":
            place = {"document": document, "split": "test", "length": length, "up_to": 2048}
            rows.append({"kind": "repeat", "tokens": 40, "nll": nll} | place)
    return EvalScores("gain", "", {}, rows, {})


def test_a_model_is_drawn_at_the_longest_length_that_it_can_read():
    base = scored_repeats({1024: 2.0, 2048: 1.5, 4096: 9.0}, {1024: 2.0, 2048: 1.9, 4096: 4.0})
    longer = scored_repeats({2048: 1.4, 4096: 1.0}, {2048: 1.9, 4096: 2.0})
    lost = scored_repeats({2048: 1.3, 4096: 8.0}, {2048: 1.8, 4096: 3.5})
    found = over_yardstick({"base": [base], "longer": [longer], "lost": [lost]}, "base", 2048)
    assert found["longer"][2048].nats == pytest.approx(0.5)
    assert found["lost"][2048].nats == pytest.approx(0.2)
    assert found["base"][2048].nats == 0.0
