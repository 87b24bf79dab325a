"""Key tokens: the base chooses them within its trained length, and all models are scored on the same ones."""

import numpy as np
import pytest
from evaluating import evaluate
from tiny_models import byte_tokenizer, tiny_llama

from longreach.evaluation import key_tokens
from longreach.evaluation.base import Background
from longreach.evaluation.documents import Document
from longreach.evaluation.gain import Gain
from longreach.evaluation.key_tokens import key_nll, key_positions, key_table
from longreach.evaluation.scores import EvalScores
from longreach.evaluation.sections import DASH

BACKGROUND = Background(base="base", trained_length=64, arms={"lora": ("lora", "lora.s1")})


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch):
    monkeypatch.setattr(key_tokens, "MIN_KEY_TOKENS", 2)


def scores_of(nll_by_document):
    """Scores whose documents have one window with these tokens' NLL by length."""
    lengths = next(iter(nll_by_document.values()))
    cases = []
    for name, nll in nll_by_document.items():
        cases.append({"document": name, "domain": "d", "end": 200, "nll": nll})
    rows = [{"kind": "pooled", "document": "*", "split": "test", "length": int(length)} for length in lengths]
    return EvalScores("gain", "p", {}, rows, {}, cases=cases, model="m")


BASE = scores_of(
    {
        #        key, gain of exactly 2, NLL of exactly 2, key
        "a": {"32": [4, 3, 6, 3.5], "64": [1, 1, 2, 0.5], "128": [9, 9, 9, 9]},
        "b": {"32": [3, 0, 0, 0], "64": [0.5, 0, 0, 0], "128": [9, 9, 9, 9]},
        "none of them": {"32": [1, 1, 1, 1], "64": [1, 1, 1, 1], "128": [9, 9, 9, 9]},
    }
)


def test_a_key_token_gains_more_than_two_nats_and_then_costs_less_than_two():
    assert key_positions(BASE.cases[0]["nll"], 32, 64) == [0, 3]
    assert key_positions(BASE.cases[1]["nll"], 32, 64) == [0]


def test_all_models_are_scored_on_the_tokens_that_the_base_chose_within_its_trained_length():
    # the base at 128 tokens, past its trained length, must not choose
    arm = {name: {"64": [0.25, 7, 7, 0.25], "128": [0, 7, 7, 0.5]} for name in ("a", "b", "none of them")}
    worse = {name: {"64": [0.75, 7, 7, 0.75], "128": [0, 7, 7, 0.5]} for name in ("a", "b", "none of them")}
    (table,) = key_table({"base": [BASE], "lora": [scores_of(arm), scores_of(worse)]}, BACKGROUND)
    assert table.caption.startswith("Key tokens: the 3 of 12 that the base predicts more than 2 nats better")
    assert "with 64 tokens of context than with 32" in table.caption
    assert table.columns == ["model", "32", "64", "128"]
    base, lora = table.rows
    assert base == ["base", f"{(4 + 3.5 + 3) / 3:.3f}", f"{(1 + 0.5 + 0.5) / 3:.3f}", "9.000"]
    assert lora == ["lora", DASH, "0.500", f"{0.5 / 3:.3f}"]


def test_the_tokens_of_an_earlier_version_are_the_last_ones_of_todays():
    old = scores_of({"a": {"32": [4, 3, 3.5], "64": [1, 1, 0.5]}})
    new = scores_of({"a": {"32": [9, 9, 1, 9, 2], "64": [9, 9, 3, 9, 4]}})
    (table,) = key_table({"base": [old], "new": [new]}, BACKGROUND)
    assert table.rows[1] == ["new", "1.500", "3.500"]
    assert "Left out" not in table.legend


def test_a_model_that_lacks_these_tokens_is_named_and_left_out():
    other = scores_of({"a": {"64": [1, 1]}})
    (table,) = key_table({"base": [BASE], "old": [other]}, BACKGROUND)
    assert [row[0] for row in table.rows] == ["base"]
    assert table.legend.endswith("Left out, because their scores do not have these tokens: old.")
    assert key_nll(other, {("a", 200): [-3]}, 64) is None
    assert key_nll(other, {("a", 200): [-2]}, 64) == 1


@pytest.mark.parametrize("background", [Background(), Background(base="base", trained_length=32)])
def test_without_a_base_that_was_measured_at_two_lengths_there_is_no_table(background):
    assert key_table({"base": [BASE]}, background) == []


def test_too_few_key_tokens_make_no_table(monkeypatch):
    monkeypatch.setattr(key_tokens, "MIN_KEY_TOKENS", 4)
    assert key_table({"base": [BASE]}, BACKGROUND) == []


def test_gain_keeps_the_nll_of_every_scored_token_of_every_test_window_at_every_length():
    tokenizer = byte_tokenizer()
    texts = [
        Document(name, "d", np.array(tokenizer(name * 300).input_ids), split)
        for name, split in (("a", "test"), ("b", "test"), ("v", "validation"))
    ]
    scores = evaluate(Gain, tiny_llama(), tokenizer, texts, lengths=(40, 64, 128), score_tokens=16, windows=2)
    kept = {(case["document"], case["end"]): case["nll"] for case in scores.cases}
    assert sorted(kept) == [("a", 128), ("a", 300), ("b", 128), ("b", 300)]
    for row in scores.rows_with(kind="window", split="test"):
        nll = kept[row["document"], row["end"]][str(row["length"])]
        assert len(nll) == 16
        assert np.mean(nll) == pytest.approx(row["nll"], abs=1e-3)
