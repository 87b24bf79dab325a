import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
from evaluating import drawn, evaluate
from tiny_models import byte_tokenizer, tiny_llama
from transformers import LlamaConfig

from longreach.evaluation import reader
from longreach.evaluation.base import Background
from longreach.evaluation.documents import Document
from longreach.evaluation.figures import Style
from longreach.evaluation.ruler import Ruler, Text, effective_row, sentences
from longreach.evaluation.ruler_tasks import (
    LINKS,
    NAMES,
    NOISE,
    TASKS,
    Draw,
    found_by_words,
    stems,
    string_match_all,
    string_match_part,
)

TOKENIZER = byte_tokenizer()
HAY = "It rained. The cat slept on. Nobody came! "
DOCUMENT = Document("a", "d", np.array(TOKENIZER(HAY * 100).input_ids))
SMALL = {"haystack": "noise", "trials": 1, "new_tokens": 8}
MODEL = SimpleNamespace(config=LlamaConfig(max_position_embeddings=9000))


def sample(task, questions=1, seed=0, length=3000):
    draw = Draw(np.random.default_rng(seed), [NOISE] * 40, "\n", length, questions)
    return TASKS[task].draw(draw)


def text(task, length=3000, documents=(DOCUMENT,), **choices):
    evaluation = Ruler(MODEL, TOKENIZER, Ruler.Choices(**{"tasks": (task,), "lengths": (length,)} | choices), documents)
    return Text(evaluation, {"task": task, "length": length, "trial": 0})


def test_each_needle_question_is_answered_by_its_own_facts():
    several = sample("niah_multikey", questions=4)
    shown = several.context(30)
    for asked in several.asked:
        [key] = re.findall(r"number for (\S+) mentioned in the provided text\?", asked.question)
        assert f"One of the special magic numbers for {key} is: {asked.answers[0]}.\n" in shown + "\n"
        assert asked.expected == f" {asked.answers[0]}"
    assert len({asked.answers[0] for asked in several.asked}) == 4
    values = sample("niah_multivalue")
    [key] = re.findall(r"numbers for (\S+) mentioned", values.asked[0].question)
    stated = re.findall(rf"numbers for {key} is: (\d{{7}})\.", values.context(30))
    assert sorted(stated) == sorted(values.asked[0].answers)
    assert len(stated) == 4
    query = sample("niah_multiquery")
    stated = re.findall(r"numbers for (\S+) is: (\d{7})\.", query.context(30))
    assert sorted(number for _, number in stated) == sorted(query.asked[0].answers)
    assert all(key in query.asked[0].question for key, _ in stated)


def test_a_chain_can_be_followed_from_its_value_to_each_of_its_variables_and_is_shown_solved_before():
    chain = sample("vt")
    assert chain.head.count("Question:") == 1
    example = re.search(r"they are: (\w+ \w+ \w+ \w+ \w+)\n\n", chain.head).group(1).split()
    assert example == re.findall(r"VAR (\w+) =", chain.head)
    [value] = re.findall(r"assigned the value (\d+) in", chain.asked[0].question)
    known = [value]
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", chain.context(30)):
        assert source == known[-1], "each stands after the one that it is assigned from"
        known.append(name)
    assert known[1:] == chain.asked[0].answers


@pytest.mark.parametrize(("length", "often", "seldom"), [(3000, 6, 1), (5000, 30, 3)])
def test_common_words_are_those_that_a_count_finds(length, often, seldom):
    words = sample("cwe", length=length)
    listed = re.findall(r"\d+\. (\S+)", words.context(50))
    counts = {word: listed.count(word) for word in listed}
    assert {word for word, count in counts.items() if count == often} == set(words.asked[0].answers)
    assert [count for count in counts.values() if count != often] == [seldom] * 50
    assert words.context(50).startswith("1. ")


@pytest.mark.parametrize("pieces", [100, 400])
def test_frequent_words_are_the_three_that_a_count_finds(pieces):
    words = sample("fwe", length=4000)
    coded = words.context(pieces).split()
    ranks = sorted(set(coded), key=coded.count, reverse=True)
    assert ranks[0] == "..."
    assert ranks[1:4] == words.asked[0].answers
    counts = [coded.count(word) for word in ranks]
    assert counts[1] > counts[2] > counts[3] > counts[4]


def test_one_document_alone_answers_a_question_and_the_others_share_words_with_it():
    several = sample("qa", questions=4)
    shown = several.shown(60)
    assert several.context(60).startswith("Document 1:\n")
    for asked in several.asked:
        [building] = re.findall(r"who designed the (.*)\?", asked.question)
        gold = [document for document in shown if building in document]
        assert len(gold) == 1
        assert [document for document in shown if asked.answers[0] in document] == gold
        work, place = building.split(" ", 1)[-1].split(" of ")
        assert sum(work in document or place in document for document in shown) > 5


def test_question_and_fact_share_no_word_and_a_search_by_words_finds_nothing():
    for fact, question in LINKS:
        assert not stems(fact) & stems(question), question
    assert len({question for _, question in LINKS}) == len(LINKS) == len(dict(LINKS))
    scores = dict.fromkeys(TASKS, 0.0)
    for task in ("niah_single", "niah_multikey", "qa", "no_shared_words"):
        for seed in range(20):
            for asked in (drawn_text := sample(task, questions=4, seed=seed)).asked:
                found = found_by_words(drawn_text.shown(30), asked)
                scores[task] += TASKS[task].score(found, asked.answers) / 20 / len(drawn_text.asked)
    assert scores["no_shared_words"] == 0
    assert min(scores["niah_single"], scores["niah_multikey"], scores["qa"]) > 0.99


def test_the_right_person_stands_beside_three_others():
    people = sample("no_shared_words", questions=4)
    shown = people.context(30)
    assert sum(name in shown for name in NAMES) == 4
    for asked in people.asked:
        [fact] = [fact for fact, question in LINKS if question == asked.question.strip()]
        assert f"{asked.answers[0]} {fact}." in shown


@pytest.mark.parametrize(
    ("said", "every", "one"),
    [
        ("1234567 and 7654321.", 1, 1), ("It is 1234567", 0.5, 1), ("1234 567", 0, 0), ("", 0, 0),
        ("7654312, 1234576", 0, 0),
    ],
)  # fmt: skip
def test_answers_score_by_rulers_rules(said, every, one):
    assert string_match_all(said, ["1234567", "7654321"]) == every
    assert string_match_part(said, ["1234567", "7654321"]) == one
    assert string_match_all("ABCDE", ["abcde"]) == 1, "whatever the case"


class Parrot:
    """A reader that says what it is told."""

    said = ""

    def __init__(self, model, tokenizer):
        pass

    def answer(self, ids, expected, where, new_tokens):
        return reader.Answer(1.0, 0.0, False, self.said, 10)


def test_a_zero_at_every_length_is_told_with_a_sample_and_the_likely_reason(monkeypatch):
    monkeypatch.setattr(reader, "Reader", Parrot)
    monkeypatch.setattr(Parrot, "said", "I like cats.")
    tokenizer = byte_tokenizer()
    choices = SMALL | {"tasks": ("niah_single", "fwe"), "lengths": (2000, 2500)}

    def paragraphs(**changes):
        scores = {"m": evaluate(Ruler, tiny_llama(), tokenizer, **choices | changes).named("m")}
        return [
            block for block in Ruler.section(scores, Style.of(scores), Background()).blocks if isinstance(block, str)
        ]

    [_, needle, words] = paragraphs()
    assert needle.startswith("m, niah_single: score 0 in all 2 answers, at every length. Expected: '")
    assert "The model wrote: 'I like cats.'" in needle
    assert "a base model, which continues text" in needle
    assert words.startswith("m, fwe: score 0")
    tokenizer.chat_template = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}<a>"
    assert "asked without it: set chat_template 'auto'" in paragraphs(chat_template="never")[1]
    assert "too hard" in paragraphs()[1]
    monkeypatch.setattr(Parrot, "said", "".join(map(str, range(10))))
    told = text("niah_single", haystack="noise", length=2000).sample.asked[0].answers[0]
    monkeypatch.setattr(Parrot, "said", told)
    assert len(paragraphs(tasks=("niah_single",))) == 1, "one right answer is no zero"


def test_effective_length_keeps_a_share_of_the_short_score_within_what_the_intervals_leave():
    rows = []
    for length, score, low, high in ((1000, 0.8, 0.6, 0.9), (2000, 0.7, 0.5, 0.9), (4000, 0.5, 0.3, 0.7)):
        row = {"task": "vt", "length": length, "score": score, "score_low": low, "score_high": high}
        rows.append(row)
    row = effective_row(rows, 0.85)  # the bar is 0.68
    assert [row[f"effective_length{end}"] for end in ("", "_low", "_high")] == [2000, 1000, 4000]
    nothing = effective_row([row | {"score": 0.0} for row in rows], 0.85)
    assert [nothing[f"effective_length{end}"] for end in ("", "_low", "_high")] == [0, 0, 0]


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_fills_its_length_and_leaves_room_for_the_answer(task):
    asked = text(task, questions=4, trials=1)
    pieces = asked.fit()
    new_tokens = TASKS[task].new_tokens
    longest = max(len(asked.prompt(one, pieces)) for one in asked.sample.asked)  # a token a byte
    longer = max(len(asked.prompt(one, pieces + 1)) for one in asked.sample.asked)
    assert longest + new_tokens <= 3000 < longer + new_tokens


def test_a_fact_moves_while_all_else_stays():
    choices = SMALL | {"tasks": ("niah_multikey",), "lengths": (2000,), "depths": (0, 0.5, 1)}
    scores = evaluate(Ruler, tiny_llama(), TOKENIZER, **choices)
    places, rests = [], set()
    for case in scores.cases:
        fact = re.search(rf"[^\n]*is: {case['expected']}\.\n", case["prompt"]).group()
        places.append(case["prompt"].index(fact) / 2000)
        rests.add(case["prompt"].replace(fact, ""))
    assert len(rests) == 1
    assert places[0] < 0.1 < 0.4 < places[1] < 0.6 < 0.8 < places[2]
    assert [row["depth"] for row in scores.rows_with(kind="depth")] == [0, 0.5, 1]
    assert list(drawn(scores.named("m"))) == ["ruler-m.png", "ruler-depth-niah_multikey.png"]


def test_questions_about_one_text_read_it_once_and_score_as_read_alone(monkeypatch):
    choices = SMALL | {"tasks": ("niah_multikey", "qa", "no_shared_words"), "lengths": (3000,), "questions": 4}
    shared = evaluate(Ruler, tiny_llama(), TOKENIZER, **choices)
    assert len(shared.cases) == 12
    assert shared.summary["ruler_tokens_read"] < 0.32  # of 4 readings; the questions of qa are long
    alone = reader.Reader
    monkeypatch.setattr(reader, "Reader", lambda model, tokenizer: alone(model, tokenizer, reuse=False))
    fresh = evaluate(Ruler, tiny_llama(), TOKENIZER, **choices)
    assert fresh.summary["ruler_tokens_read"] > 1  # an answer is scored in the same pass
    assert [case["got"] for case in shared.cases] == [case["got"] for case in fresh.cases]
    assert [case["nll"] for case in shared.cases] == pytest.approx([case["nll"] for case in fresh.cases], rel=1e-5)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"lengths": (5000,)}, "length 5000: the model reads at most 4096 tokens"),
        ({"lengths": (4000,), "haystack": "documents"}, r"must have 3872 tokens, but the whole haystack .* 34\d\d"),
        ({"lengths": (300,)}, r"the shortest prompt has \d+ tokens and the answer 128: use a length of at least \d+"),
        ({"tasks": ("fwe",), "lengths": (600,)}, r"the shortest prompt has \d+ tokens and the answer 50"),
        ({"chat_template": "always"}, "no chat template"),
        ({"tasks": ("niah_single", "vt"), "depths": (0.5,)}, "depths need tasks .* but vt ask for several"),
        ({"depths": (0.5,), "questions": 2}, "questions is 2, but must be 1 with depths"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_read(choices, message):
    short = Document("a", "d", np.array(TOKENIZER(HAY * 75).input_ids))
    choices = {"tasks": ("niah_single",), "lengths": (2000,), "haystack": "noise"} | choices
    with pytest.raises(ValueError, match=message):
        Ruler(tiny_llama(), TOKENIZER, Ruler.Choices(**choices), [short]).cells()


def test_an_answer_that_stands_in_the_haystack_is_refused():
    answer = text("niah_single").sample.asked[0].answers[0]
    found = Document("b", "d", np.array(TOKENIZER(f"{HAY * 100} They sold {answer} tickets.").input_ids))
    with pytest.raises(ValueError, match=f"the answer '{answer}' already occurs in the haystack"):
        text("niah_single", documents=(found,)).evaluation.cells()
    people = Document("b", "d", np.array(TOKENIZER(HAY * 100 + ", ".join(NAMES[3:]) + ".").input_ids))
    with pytest.raises(ValueError, match="21 of 24 names already occur in the haystack, but at most 20 may"):
        text("no_shared_words", documents=(people,)).evaluation.cells()
    one = Document("b", "d", np.array(TOKENIZER(HAY * 100 + ", ".join(NAMES[4:]) + ".").input_ids))
    assert text("no_shared_words", documents=(one,)).evaluation.cells(), "the four other names are drawn"
    others = ", ".join(NAMES[4:]).replace("Wanda", "Rwanda")
    part = Document("b", "d", np.array(TOKENIZER(HAY * 100 + others + ".").input_ids))
    assert text("no_shared_words", documents=(part,), trials=5).evaluation.cells(), "part of a word: not drawn either"


def test_an_answer_that_the_tokenizer_cannot_spell_is_refused(monkeypatch):
    def spelled(tokenizer, prompt, answer, where):
        ids, answer_ids = original(tokenizer, prompt, answer, where)
        return ids, answer_ids[:-1]  # as a vocabulary without the last digit would

    original = reader.spelled
    monkeypatch.setattr(reader, "spelled", spelled)
    with pytest.raises(ValueError, match=r"the tokenizer spells the answer '(\d{6})\d' as '\1'"):
        text("niah_single").evaluation.cells()


def test_sentences_are_parted_where_none_ends():
    assert sentences("It rained.  The cat\nslept on! No end") == ["It rained.", "The cat slept on!", "No end"]
    assert [len(piece.split()) for piece in sentences("word " * 120)] == [50, 50, 20]


@pytest.mark.long  # lm-eval's imports
def test_prompts_are_those_of_lm_evaluation_harness(monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "find", lambda name: name)  # lm-eval fetches it where it is missing
    from lm_eval.tasks.ruler import common_utils, cwe_utils, fwe_utils, niah_utils, prepare_niah, qa_utils, vt_utils

    counts = {"niah_single": (1, 1, 1), "niah_multikey": (4, 1, 1), "niah_multivalue": (1, 4, 1)}
    for task, (keys, values, queries) in (counts | {"niah_multiquery": (4, 1, 4)}).items():
        ours = sample(task)
        drawn_values = iter(re.findall(r"numbers for (\S+) is: (\d+)\.", ours.context(0)))
        by_key: dict[str, list[str]] = {}
        for key, value in drawn_values:
            by_key.setdefault(key, []).append(value)
        asked = ours.asked[0]
        order = sorted(by_key, key=lambda key: asked.question.find(key) % 10_000)
        said = iter([word for key in order for word in (key, *by_key[key])])
        monkeypatch.setattr(prepare_niah, "generate_random", lambda kind, said=said: next(said))
        monkeypatch.setattr(random, "sample", lambda things, count: sorted(things)[:count])
        theirs, answers, _ = prepare_niah.generate_input_output(
            20, NOISE, type_haystack="repeat", num_needle_k=keys, type_needle_k="words", num_needle_v=values,
            type_needle_v="numbers", template=niah_utils.TEMPLATE, num_needle_q=queries,
        )  # fmt: skip
        assert sorted(answers) == sorted(asked.answers)
        prompt = f"{ours.head}{ours.context(20)}{asked.question}"
        assert sorted(prompt.splitlines()) == sorted(theirs.splitlines()), task
        monkeypatch.undo()
        monkeypatch.setattr(nltk.data, "find", lambda name: name)

    ours = sample("vt")
    asked = ours.asked[0]
    value = re.search(r"value (\d+)", asked.question).group(1)
    theirs = vt_utils.TEMPLATE.format(context="CONTEXT", query=value, num_v=5)
    assert theirs.strip() == f"{_last_head(ours)}CONTEXT{asked.question} {asked.opening}"
    for task, template in (("cwe", cwe_utils.TEMPLATE), ("fwe", fwe_utils.TEMPLATE)):
        ours = sample(task)
        asked = ours.asked[0]
        theirs = template.format(context="CONTEXT", query="")
        assert theirs == f"{_last_head(ours)}CONTEXT{asked.question} {asked.opening}"
    ours = sample("qa")
    asked = ours.asked[0]
    question = re.search(r"Question: (.*)", asked.question).group(1)
    theirs = qa_utils.TEMPLATE.format(context="CONTEXT", query=question)
    assert f"{theirs} {qa_utils.CONFIG['answer_prefix']}" == f"{ours.head}CONTEXT{asked.question} {asked.opening}"
    for said in ("1234567 and 89", "", "89"):
        assert common_utils.string_match_all([said], [["1234567", "89"]]) == string_match_all(said, ["1234567", "89"])


def _last_head(ours):
    """The head without the solved example before it."""
    begin = ours.head[:20]
    return ours.head[ours.head.rindex(begin) :]
