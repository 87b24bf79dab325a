"""A model whose positions stand in a table is asked for no more of them than there are, and a sentence says so."""

import re

import numpy as np
import pytest
import torch
import transformers
from evaluating import evaluate
from tiny_models import VOCAB, byte_tokenizer, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from longreach.evaluation import EVALS
from longreach.evaluation.documents import Document
from longreach.evaluation.likelihood import position_table
from longreach.evaluation.reader import Reader

TABLE = 256
TEXTS = [Document(name, "d", np.random.default_rng(0).integers(0, 200, 900)) for name in "ab"]
BEYOND = {
    "perplexity": {"lengths": (100, 257), "last_tokens": 64},
    "gain": {"lengths": (200, 500), "score_tokens": 64},
    "passkey": {"lengths": (250, 400)},
    "needle": {"lengths": (400,), "depth_points": 2},
    "lost_in_the_middle": {"pairs": (4,), "trials": 1},
    "ruler": {"tasks": ("niah_single",), "lengths": (1400,), "haystack": "noise"},
    "streaming": {"document": "a", "tokens": 600, "cache_tokens": 64, "ways": ("dense", "recompute")},
    "stream_questions": {"questions": 2, "cache_tokens": (64,), "ways": ("dense",)},
    "sinks": {"lengths": (300,), "map_layers": ()},
}


def learned(positions=TABLE):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_positions": positions, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=256, eos_token_id=256)).eval()


def cells(name, model, tokenizer=None, **choices):
    kind = EVALS[name]
    return kind(model, tokenizer or byte_tokenizer(), kind.Choices(**choices), TEXTS).cells()


@pytest.mark.parametrize("name", sorted(EVALS.keys() - {"harness"}))  # which cuts prompts to the model's length itself
def test_every_evaluation_refuses_before_its_first_cell_with_both_numbers(name):
    with pytest.raises(
        ValueError, match=rf"^{name} reads \d+ tokens at once.* table of {TABLE} positions.*: use shorter texts"
    ):
        cells(name, learned(), **BEYOND[name])
    assert cells(name, tiny_llama(max_position_embeddings=4096), **BEYOND[name])


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("perplexity", {"lengths": (TABLE,), "last_tokens": 64}),
        ("gain", {"lengths": (100, TABLE), "score_tokens": 64}),
        ("sinks", {"lengths": (TABLE,), "map_layers": ()}),
        ("streaming", {"document": "a", "tokens": TABLE - 1, "cache_tokens": 64, "ways": ("dense",)}),
        ("streaming", {"document": "a", "tokens": 600, "cache_tokens": TABLE - 1, "ways": ("recompute",)}),
    ],
)
def test_all_of_the_table_can_be_read(name, choices):
    assert evaluate(EVALS[name], learned(), byte_tokenizer(), TEXTS, **choices).summary


@pytest.mark.parametrize("choices", [{}, {"new_tokens": 20}], ids=str)
def test_a_prompt_and_its_answer_may_fill_the_table(choices):
    choices = {"lengths": (600,), "depth_points": 2, "trials": 1, **choices}
    reads = []
    with pytest.raises(ValueError, match="reads") as refused:
        cells("needle", learned(256), **choices)
    reads.append(int(re.search(r"reads (\d+)", str(refused.value))[1]))
    assert evaluate(EVALS["needle"], learned(reads[0]), byte_tokenizer(), TEXTS, **choices).summary
    with pytest.raises(ValueError, match=f"reads {reads[0]} tokens at once"):
        cells("needle", learned(reads[0] - 1), **choices)


def test_the_models_own_first_token_counts():
    choices = {"lengths": (TABLE,), "last_tokens": 64}
    with pytest.raises(ValueError, match=f"perplexity reads {TABLE + 1} tokens"):
        cells("perplexity", learned(), byte_tokenizer(first="<sink>"), **choices)


@pytest.mark.parametrize("new_tokens", [0, 3])
def test_a_reader_says_so_too(new_tokens):
    reader = Reader(learned(32), byte_tokenizer())
    reader.answer([*range(30)], [1, 2, 3], "here", new_tokens=new_tokens)
    with pytest.raises(ValueError, match=r"^here reads 33 tokens at once.* 32 positions"):
        reader.answer([*range(31)], [1, 2, 3], "here", new_tokens=new_tokens)


@pytest.mark.parametrize("family", ["GPT2", "OPT", "BioGpt", "GPTJ", "CTRL", "Llama", "Bloom", "XGLM", "Mamba"])
def test_a_table_is_found_where_reading_beyond_it_fails(family):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "rotary_dim": 4}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**sizes, **ids, intermediate_size=48, max_position_embeddings=32)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model(torch.arange(2, 34)[None], use_cache=False)
        try:
            model(torch.arange(2, 35)[None], use_cache=False)
        except (IndexError, RuntimeError):
            assert position_table(model) == 32
        else:
            assert position_table(model) is None
