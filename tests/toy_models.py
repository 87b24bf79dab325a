"""Tiny models, tokenizers and packed rows for tests: made in milliseconds, offline, the same in every run."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from training.model import tiny_model
from training.recipe import TinyModelRecipe

VOCAB = 64
TINY = TinyModelRecipe(hidden=32, layers=2, heads=4, kv_heads=2, context_length=64)


def tiny_tokenizer(vocab: int = VOCAB) -> PreTrainedTokenizerFast:
    """Words w0, w1, ... split at spaces; the first two ids are EOS and unknown."""
    words = {"<eos>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, vocab)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")


def tiny_folder(folder: Path, seed: int = 0, vocab: int = VOCAB, tied: bool = True) -> Path:
    """A Hugging Face folder: tiny Llama (context 64) and tokenizer."""
    model = tiny_model(TINY, vocab, seed)
    if not tied:
        head = torch.nn.Parameter(
            torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(seed))
        )
        model.config.tie_word_embeddings = False
        model.lm_head.weight = head
    model.save_pretrained(folder)
    tiny_tokenizer(vocab).save_pretrained(folder)
    return folder


def read_json(path: Path) -> dict:
    return json.loads(Path(path).read_text())
