import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from evaluating import drawn, evaluate
from tiny_models import byte_tokenizer, tiny_llama
from transformers import AutoTokenizer, LlamaConfig

from longreach.evaluation import reader
from longreach.evaluation.documents import Document
from longreach.evaluation.needle import Needle, Prompt, claimed_length, sentence_end, sentence_ends
from longreach.evaluation.scores import RULER_THRESHOLD, effective_length, wilson

TOKENIZER = byte_tokenizer()
HAY = "It rained. The cat slept on. Nobody came! "
DOCUMENT = Document("a", "d", np.array(TOKENIZER(HAY * 60).input_ids))


def texts(**choices):
    """The prompts of each depth, as text."""
    choices = Needle.Choices(**{"lengths": (600,), "chat_template": "never"} | choices)
    evaluation = Needle(tiny_llama(), TOKENIZER, choices, [DOCUMENT])
    found = evaluation.measure({"length": choices.lengths[0], "trial": 0})
    return [case["prompt"] for case in found["cases"]], found


def test_a_prompt_is_exactly_as_long_as_asked_and_the_needle_stands_at_its_depth_between_sentences():
    prompts, found = texts(depths=(0.0, 0.5, 1.0))
    places = []
    for prompt, case in zip(prompts, found["cases"], strict=True):
        assert case["prompt_tokens"] == len(prompt) == 600  # a token a byte
        fact = f" is {case['expected']}."
        before, after = prompt.split(fact)
        before = before[before.index("\n\n") + 2 :]
        places.append(len(before[: before.index(" The magic")]) / 400)
        if case["depth"] < 1:  # 1 is the very end
            assert before[: before.index(" The magic")][-1:] in ("", ".", "!")
        assert after.endswith("is ")  # the blank, a token of its own, is no part of the answer
        assert after.count(case["expected"]) == 0
    assert places[0] == 0
    assert places == sorted(places)
    assert 0.35 < places[1] < 0.6
    assert len({p[p.index("\n\n") :].replace(" ", "")[:5] for p in prompts[1:]}) == 1  # one haystack


def test_all_needles_are_asked_for_and_distractors_are_not():
    prompts, found = texts(lengths=(1200,), needles=3, distractors=4, depths=(0.25,))
    expected = found["cases"][0]["expected"].split(", ")
    assert prompts[0].count("The magic number of") == 7
    question = prompts[0][prompts[0].rindex("\n\n") :]
    asked = question[question.index("of ") + 3 : question.index("?")].replace(" and ", ", ").split(", ")
    assert len(asked) == len(expected) == 3
    for town, number in zip(asked, expected, strict=True):
        assert f"The magic number of {town} is {number}." in prompts[0]
    ends = [prompts[0].index(f"is {number}.") / 1200 for number in expected]
    assert ends == sorted(ends)


@pytest.mark.parametrize(
    ("rope", "tokens"),
    [
        ({"rope_type": "dynamic", "factor": 4.0}, 4096),
        ({"rope_type": "yarn", "factor": 4.0}, 1024),
        ({"rope_type": "longrope", "factor": 4.0}, 1024),
        (None, 1024),
    ],
)
def test_only_a_dynamic_stretch_reaches_further_than_its_config_says(rope, tokens):
    """Phi-3's longrope has its 131,072 tokens in the config, and may name the factor 32 beside them."""
    config = LlamaConfig(max_position_embeddings=1024)
    config.rope_parameters = rope
    assert claimed_length(SimpleNamespace(config=config)) == tokens


def test_where_sentences_end():
    ends = sentence_ends(TOKENIZER)
    assert {TOKENIZER.decode([n]) for n in ends} == {".", "!", "?"}
    hay = TOKENIZER("ab. cd. ef").input_ids
    assert [sentence_end(hay, depth, ends) for depth in (0, 0.2, 0.3, 0.6, 0.7, 0.9, 1)] == [0, 0, 3, 3, 7, 7, 10]
    assert sentence_end(list(range(900, 910)), 0.5, ends) == 5, "no sentence ends: the depth that was asked for"
    assert sentence_end(hay[::-1][1:], 0.1, ends) == 0, "none before: at the beginning"


def test_a_chinese_sentence_ends_in_a_byte_level_vocabulary_too(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer("今天天气很好。我们去公园").input_ids
    cut = sentence_end(ids, 0.9, sentence_ends(tokenizer))
    assert tokenizer.decode(ids[:cut]).endswith("。")


def test_a_chat_template_frames_the_question_and_the_answer_is_begun():
    chat = byte_tokenizer()
    chat.chat_template = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}<a>"
    prompt = Prompt.draw(chat, Needle.Choices(lengths=(600,)), 600, 0.5, 0)
    before, after = (chat.decode(ids) for ids in (prompt.before, prompt.after))
    assert before.startswith("<u>Read the text below.")
    assert "?</u><a>The magic number of" in after
    plain = Prompt.draw(chat, Needle.Choices(lengths=(600,), chat_template="never"), 600, 0.5, 0)
    assert chat.decode(plain.before).startswith("Read")
    with pytest.raises(ValueError, match="no chat template"):
        evaluate(Needle, tiny_llama(), TOKENIZER, [DOCUMENT], lengths=(600,), chat_template="always")


CONFIG = SimpleNamespace(config=LlamaConfig(max_position_embeddings=99))


class Parrot:
    """A reader that says what it is told."""

    said = ""

    def __init__(self, model, tokenizer):
        pass

    def answer(self, ids, expected, where, new_tokens):
        return reader.Answer(1.0, 0.0, False, self.said, 10)


@pytest.mark.parametrize(
    ("said", "recall"), [("{0}", 1), ("It is {0}, I think.", 1), ("1{0}", 0), ("{0}7", 0), ("", 0)]
)
def test_a_number_counts_only_as_a_whole(monkeypatch, said, recall):
    monkeypatch.setattr(reader, "Reader", Parrot)
    choices = Needle.Choices(lengths=(600,), depths=(0.5,), chat_template="never", new_tokens=5)
    number = Prompt.draw(TOKENIZER, choices, 600, 0.5, 0).numbers[0]
    monkeypatch.setattr(Parrot, "said", said.format(number))
    [case] = Needle(CONFIG, TOKENIZER, choices, [DOCUMENT]).measure({"length": 600, "trial": 0})["cases"]
    assert case["recall"] == recall


def test_a_grid_can_grow_and_its_scores_say_what_was_found():
    choices = {"depth_points": 3, "chat_template": "never", "new_tokens": 3}
    scores = evaluate(Needle, tiny_llama(), TOKENIZER, [DOCUMENT], lengths=(500, 600), trials=2, **choices)
    assert [(r["kind"], r["length"], r["depth"], r["trials"]) for r in scores.rows][:4] == [
        ("length", 500, None, 6), ("length", 600, None, 6), ("cell", 500, 0.0, 2), ("cell", 500, 0.5, 2),
    ]  # fmt: skip
    assert {"needle_500", "needle_nll_600", "needle_recall_500", "needle_effective_length"} < scores.summary.keys()
    assert scores.summary["needle_tokens_read"] < 0.8
    one = evaluate(Needle, tiny_llama(), TOKENIZER, [DOCUMENT], lengths=(600,), trials=1, **choices)
    twin = [c for c in scores.cases if (c["length"], c["trial"]) == (600, 0)]
    assert [c["prompt"] for c in one.cases] == [c["prompt"] for c in twin]
    assert [c["nll"] for c in one.cases] == [c["nll"] for c in twin]
    assert list(drawn(scores.named("m"))) == ["needle.png", "needle-m.png"]


def test_seeds_and_lengths_have_haystacks_of_their_own_and_all_depths_of_a_trial_one(monkeypatch):
    """Of 3 seeds x 2 trials x 2 lengths no two begin at one place of the text, or at one share of it."""
    text = Document("long", "d", np.arange(256, 100_256), "test")
    read = []

    class Listening(Parrot):
        def answer(self, ids, expected, where, new_tokens):
            read.append(np.array([n for n in ids if n >= 256]))
            return super().answer(ids, expected, where, new_tokens)

    monkeypatch.setattr(reader, "Reader", Listening)
    monkeypatch.setattr(type(TOKENIZER), "decode", lambda *args, **kwargs: "")
    monkeypatch.setattr("longreach.evaluation.needle.sentence_ends", lambda tokenizer: set())
    begins = {}
    for seed, length, trial in itertools.product(range(3), (500, 1000), range(2)):
        read.clear()
        choices = Needle.Choices(lengths=(length,), depths=(0.0, 0.5), seed=seed, chat_template="never")
        Needle(CONFIG, TOKENIZER, choices, [text]).measure({"length": length, "trial": trial})
        assert len(read) == 2
        assert (read[0] == read[1]).all(), "the needle alone moves"
        begins[seed, length, trial] = read[0][0] / (100_000 - length)
    assert len({round(share, 3) for share in begins.values()}) == 12


def test_depths_of_one_haystack_are_asked_for_one_fact_and_so_are_one_trial_of_the_interval():
    choices = Needle.Choices(lengths=(512,), trials=2, new_tokens=5)
    cases = []
    for trial, depth in itertools.product(range(2), choices.every_depth()):
        found = trial == 0 or depth == 0
        case = {"length": 512, "depth": depth, "trial": trial, "correct": found, "recall": float(found)}
        cases.append(case | {"token_accuracy": 1.0, "nll": 0.1})
    result = {"cases": cases, "claimed": None, "read_tokens": 1, "prompt_tokens": 1}
    whole, first, *_ = Needle.scores(choices, [({}, result)]).rows
    assert (whole["correct"], whole["trials"]) == (6, 10)
    for name in ("accuracy", "complete"):
        assert (whole[f"{name}_low"], whole[f"{name}_high"]) == pytest.approx(wilson(1.2, 2)), "one whole, one a fifth"
        assert (first[f"{name}_low"], first[f"{name}_high"]) == wilson(2, 2), "at one depth, each haystack once"


@pytest.mark.parametrize(
    ("lengths", "message"),
    [((5000,), r"length 5000 needs \d+ tokens of text.*have 2520"), ((60,), "length 60: .*alone")],
)
def test_lengths_that_cannot_be_are_refused(lengths, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Needle, tiny_llama(), TOKENIZER, [DOCUMENT], lengths=lengths, chat_template="never")


def test_the_effective_length_ends_where_accuracy_first_falls_below_the_bar():
    def rows(*accuracies):
        return [{"length": 1000 * n, "accuracy": a} for n, a in enumerate(accuracies, 1)]

    assert effective_length(rows(1.0, 0.856, 0.85, 1.0), RULER_THRESHOLD) == 2000
    assert effective_length(rows(0.5, 1.0), RULER_THRESHOLD) == 0
    assert effective_length(list(reversed(rows(1.0, 0.9))), RULER_THRESHOLD) == 2000


def test_depths_are_even_or_dense_at_both_ends():
    assert Needle.Choices(lengths=(9,), depth_points=3).every_depth() == [0.0, 0.5, 1.0]
    sigmoid = Needle.Choices(lengths=(9,), depth_points=5, depth_curve="sigmoid").every_depth()
    assert sigmoid[2] == 0.5
    assert sigmoid[1] - sigmoid[0] < sigmoid[2] - sigmoid[1]
    assert Needle.Choices(lengths=(9,), depths=(0.7, 0.1)).every_depth() == [0.1, 0.7]
