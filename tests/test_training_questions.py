"""Questions on long documents: answers stand in the excerpt, a seed makes the same ones, none is on held-out texts."""

import re

import pytest

from longreach.training.corpus_recipe import CorpusRecipe, QuestionsRecipe, SourceRecipe
from longreach.training.documents import known_names, read_documents, source_digest, split_of
from longreach.training.questions import conversations

ASKED = re.compile(r'Which sentence of the text comes right after "(.*)"\?$')


def write(folder, count=60):
    sentences = [f"This is the sentence of number {n}, which is long enough to be asked for." for n in range(count)]
    (folder / "one.txt").write_text("A heading.\n\n" + "\n".join(sentences))
    (folder / "two.txt").write_text("Too short. To ask. About it.")
    return sentences, [(name, folder / f"{name}.txt") for name in ("one", "two")]


def test_each_answer_is_the_sentence_after_the_one_that_is_quoted(tmp_path):
    sentences, files = write(tmp_path)
    recipe = QuestionsRecipe(about="sotu", chats=8, questions=3, chars=2000)
    chats = list(conversations(recipe, files))
    assert [name for name, _ in chats] == ["one"] * 4, "of the other text there is nothing to ask"
    firsts = set()
    for _, chat in chats:
        assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 3
        excerpt = chat.messages[0]["content"].split("\n\n")[1]
        assert 1900 < len(excerpt) < 2200
        asked = set()
        for question, answer in zip(chat.messages[::2], chat.messages[1::2], strict=True):
            quoted = ASKED.search(question["content"])[1]
            assert sentences.index(answer["content"]) == sentences.index(quoted) + 1
            assert f"{quoted} {answer['content']}" in excerpt
            asked.add(quoted)
        assert len(asked) == 3
        firsts.add(excerpt[:80])
    assert len(firsts) > 1
    assert list(conversations(recipe, files)) == chats
    assert list(conversations(recipe.model_copy(update={"seed": 1}), files)) != chats


def test_a_text_shorter_than_the_excerpt_is_shown_whole(tmp_path):
    sentences, files = write(tmp_path, 5)
    ((_, chat),) = conversations(QuestionsRecipe(about="sotu", chats=1), files)
    assert chat.messages[0]["content"].split("\n\n")[1] == " ".join(["A heading.", *sentences])


def test_chats_about_a_held_out_text_are_held_out():
    source = SourceRecipe(questions=QuestionsRecipe(about="shakespeare", chats=50, chars=1000))
    corpus = CorpusRecipe(sources=(source,), test=("hamlet",))
    found = {document.name: split_of(document.key, corpus) for document in read_documents(corpus)}
    assert {name for name, split in found.items() if split == "test"} == {n for n in found if ":hamlet:" in n} != set()
    assert known_names(corpus) is None


def test_the_seed_and_the_texts_are_identity():
    digests = set()
    for choices in ({"seed": 0}, {"seed": 1}, {"questions": 2}, {"about": "sotu"}):
        recipe = QuestionsRecipe(**{"about": "shakespeare", "chats": 5} | choices)
        digests.add(source_digest(CorpusRecipe(sources=(SourceRecipe(questions=recipe),))))
    assert len(digests) == 4
    with pytest.raises(ValueError, match="exactly one of package, files, dataset, repositories, generated, questions"):
        SourceRecipe(package="sotu", questions=recipe)
