"""A vocabulary of the corpus' own."""

import pytest
from transformers import AutoTokenizer

from longreach.training.corpus_recipe import CorpusRecipe, SourceRecipe
from longreach.training.train_tokenizer import train_tokenizer


def corpus(folder):
    for name, text in (("a", "the cat sat on the mat " * 50), ("held", "zebra " * 500)):
        (folder / f"{name}.txt").write_text(text)
    return CorpusRecipe(sources=(SourceRecipe(files=str(folder / "*.txt")),), test=("held*",))


def test_merges_are_learned_from_training_documents_alone_and_any_text_can_be_written(tmp_path):
    assert train_tokenizer(corpus(tmp_path), 269, tmp_path / "out") == {"vocab_size": 269}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == 269
    assert len(tokenizer(" the").input_ids) == 1
    assert len(tokenizer("zebra").input_ids) == 5
    for text in ("the cat\n", "Ünïcode 漢字 🙂"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_too_little_text_for_a_vocabulary_is_said_with_both_numbers(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size is 5000, but the training documents give only \d+ tokens"):
        train_tokenizer(corpus(tmp_path), 5000, tmp_path / "out")
