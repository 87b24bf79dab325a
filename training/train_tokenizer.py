"""Train a byte-level BPE tokenizer on the corpus, small enough for a small model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from longreach.training.corpus_recipe import CorpusRecipe
from longreach.training.documents import Document, read_documents, split_of

EOS = "<|endoftext|>"


def train_tokenizer(corpus: CorpusRecipe, vocab_size: int, out: Path, *, base_dir: Path | str = ".") -> dict[str, Any]:
    """Train on the training documents, save a Hugging Face tokenizer, and return its vocab_size.

    Raises:
        ValueError: there is too little text for `vocab_size` tokens.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )

    def texts() -> Iterator[str]:
        for document in read_documents(corpus, base_dir):
            if isinstance(document, Document) and split_of(document.key, corpus) == "train":
                yield from document.blocks()

    core.train_from_iterator(texts(), trainer)
    if (got := core.get_vocab_size()) != vocab_size:
        raise ValueError(f"vocab_size is {vocab_size}, but the training documents give only {got} tokens: lower it")
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, pad_token=EOS).save_pretrained(out)
    return {"vocab_size": got}
