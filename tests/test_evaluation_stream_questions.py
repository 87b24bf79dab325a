"""Questions in a stream: facts are found while the cache holds them, and the stream is read as one pass would."""

import re

import numpy as np
import pytest
import torch
from evaluating import drawn, evaluate, names_of
from tiny_models import byte_tokenizer, tiny_llama
from transformers import DynamicCache

from longreach.attention.sink_cache import SinkCache
from longreach.evaluation import small_cache
from longreach.evaluation.small_cache import answered_in_stream
from longreach.evaluation.stream_questions import ADJECTIVES, MOST_FACTS, NOUNS, StreamQuestions, _names

CHOICES = {"questions": 6, "every_lines": 2, "distances": (1, 3), "cache_tokens": (64, 200)}


def stream(**choices):
    """The pieces of a stream: (ids, the answer's ids, what is asked)."""
    choices = StreamQuestions.Choices(**CHOICES | choices)
    return list(StreamQuestions(tiny_llama(), byte_tokenizer(), choices)._pieces())


def test_a_question_asks_for_the_fact_so_many_lines_back_and_the_right_answer_stays_in_the_stream():
    pieces = stream()
    lines = []
    read = 0
    for number, (ids, answer_ids, about) in enumerate(pieces):
        text = byte_tokenizer().decode(ids)
        assert text.startswith("\nThe number" if number else "The number"), "an answer and the next fact share a line"
        text = text.lstrip("\n")
        facts, _, question = text.partition("Question: ")
        lines += facts.split("\n")[:-1]
        assert f"The number of the {about['name']} is {about['expected']}." == lines[-about["lines_back"]].strip()
        assert question.endswith(f"The number of the {about['name']} is {about['expected']}")
        assert byte_tokenizer().decode(answer_ids).strip() == about["expected"]
        read += len(ids)
    everything = [token for ids, _, _ in pieces for token in ids]
    ids, answer_ids, about = pieces[-1]
    fact = byte_tokenizer().decode(everything[read - len(answer_ids) - about["tokens_back"] :])
    assert fact.startswith(f"The number of the {about['name']} is {about['expected']}.")
    assert [about["distance"] for _, _, about in pieces] == [1, 3, 1, 3, 1, 3]
    assert stream(seed=1)[0][2]["expected"] != pieces[0][2]["expected"]


@pytest.mark.parametrize(("every_lines", "distances"), [(10, (5, 10, 20, 40)), (5, (5, 10, 20, 40)), (1, (1, 2))])
def test_an_answer_that_stays_in_the_stream_is_asked_for_by_no_later_question(every_lines, distances):
    """Lines 20 back are those that the question before had 10 back: the nearest that is not asked yet is taken."""
    text = ""
    for ids, answer_ids, about in stream(questions=60, every_lines=every_lines, distances=distances):
        text += byte_tokenizer().decode(ids[: -len(answer_ids)])
        assert text.count(f" {about['expected']}") == 1
        assert text.rpartition(f"is {about['expected']}.\n")[2].count(".\n") == about["lines_back"] - 1
        assert abs(about["lines_back"] - about["distance"]) <= 2
        text += byte_tokenizer().decode(answer_ids)


def test_facts_at_a_distance_that_questions_divide_do_not_all_stand_right_after_a_question():
    after = []
    text = ""
    for ids, _, about in stream(questions=60, every_lines=10, distances=(10, 20)):
        text += byte_tokenizer().decode(ids)
        before_fact = text.partition(f"is {about['expected']}.")[0].rpartition("Question: ")[2]
        after.append(before_fact.count(".\n"))
    assert len({*after}) > 5
    assert max(after) < 15


def test_no_name_comes_again_with_another_number():
    """The defaults have more lines than there are names of one adjective; the longest stream uses up all names."""
    for choices in ({"questions": 100, "every_lines": 10}, {"questions": 71, "every_lines": 100}):
        text = "".join(byte_tokenizer().decode(ids) for ids, _, _ in stream(**choices))
        names = re.findall(r"The number of the (\w+ \w+|\w+ \w+ \w+) is \d+\.\n", text)
        assert len(names) == len({*names}) > len(ADJECTIVES) * len(NOUNS)
    assert len({*_names(np.random.default_rng(0))}) == MOST_FACTS == 7200
    StreamQuestions.Choices(questions=716)


@pytest.mark.parametrize("room", [None, 10_000, 64])
def test_a_stream_in_pieces_is_predicted_as_in_one_pass_over_what_the_cache_holds(room):
    """A cache with room for everything is a dense one; a small one gives what its one-pass form gives: 1e-4 nats."""
    model = tiny_llama()
    pieces = [(ids, answer_ids) for ids, answer_ids, _ in stream()]
    cache = DynamicCache(config=model.config) if room is None else SinkCache(model.config, 4, room - 4)
    found = [nll for nll, _ in answered_in_stream(model, cache, pieces)]
    ids_T = np.array([token for ids, _ in pieces for token in ids])
    nll_T = small_cache.streamed_nll(model, ids_T, 4, (room or len(ids_T)) - 4, "cache", "stream")
    ends = np.cumsum([len(ids) for ids, _ in pieces])
    expected = [nll_T[end - 1 - len(answer) : end - 1].mean() for end, (_, answer) in zip(ends, pieces, strict=True)]
    assert found == pytest.approx(expected, abs=1e-4)


def test_accuracy_falls_where_the_fact_has_left_the_cache(monkeypatch):
    """A reader that knows what its cache holds and nothing else; a wrong answer scores 0."""

    def remembering(model, cache, pieces):
        seen = []
        for ids, answer_ids in pieces:
            seen += ids
            held = seen[-len(answer_ids) - 200 : -len(answer_ids)] if cache.layers[0].W > 100 else []
            asked = byte_tokenizer().decode(ids).rpartition("Answer: ")[2].strip()
            known = f"{asked}." in byte_tokenizer().decode(held)
            yield 0.5, answer_ids if known else [answer_ids[0], *[ord("x")] * (len(answer_ids) - 1)]

    monkeypatch.setattr(small_cache, "answered_in_stream", remembering)
    scores = evaluate(StreamQuestions, tiny_llama(), byte_tokenizer(), **CHOICES).named("m")
    found = {(row["cache_tokens"], row["distance"]): (row["correct"], row["trials"]) for row in scores.rows}
    assert found == {(64, 1): (0, 3), (64, 3): (0, 3), (200, 1): (3, 3), (200, 3): (0, 3)}
    assert scores.summary["stream_sinks_200_at_1"] == 1.0
    assert {case["got"] == case["expected"] for case in scores.cases if case["correct"]} == {True}
    ((file, chart),) = drawn(scores).items()
    assert file == "stream_questions-m.png"
    assert names_of(chart) == ["sinks, 64 tokens", "sinks, 200 tokens"]


def test_every_way_is_measured_in_every_cache_and_dense_once():
    scores = evaluate(StreamQuestions, tiny_llama(), byte_tokenizer(), **CHOICES, ways=("dense", "window", "sinks"))
    streams = list(dict.fromkeys((row["way"], row["cache_tokens"]) for row in scores.rows))
    assert streams == [("dense", 0), ("window", 64), ("window", 200), ("sinks", 64), ("sinks", 200)]
    assert all(np.isfinite(row["nll"]) for row in scores.rows)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"distances": (5, 5)}, r"distances \[5, 5\] lists a value twice"),
        ({"distances": (0,)}, r"distances\.0\n.*greater than or equal to 1"),
        ({"questions": 718}, "questions 718, one after every 10 lines, need 7215 lines, but there are only 7200 names"),
        ({"cache_tokens": (4,)}, "sink_tokens 4 leave no room in cache_tokens 4"),
        ({"cache_tokens": (4096,)}, "cache_tokens 4096 and the token after them are more than the 4096 tokens"),
    ],
)
def test_choices_that_cannot_be_measured_are_errors_with_both_numbers(choices, message):
    with pytest.raises(ValueError, match=message):
        evaluate(StreamQuestions, tiny_llama(), byte_tokenizer(), **choices)


def test_logits_that_are_not_finite_are_named_by_their_place():
    model = tiny_llama()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="piece 0 of the stream"):
        evaluate(StreamQuestions, model, byte_tokenizer(), **CHOICES)


def test_a_cache_that_keeps_everything_has_no_size_to_be_too_large():
    choices = StreamQuestions.Choices(ways=("dense",), questions=1, every_lines=1, distances=(1,))
    model = tiny_llama(max_position_embeddings=512)
    assert StreamQuestions(model, byte_tokenizer(), choices).cells() == [{"way": "dense", "cache_tokens": 0}]
    with pytest.raises(ValueError, match="cache_tokens 1024"):
        StreamQuestions(model, byte_tokenizer(), choices.model_copy(update={"ways": ("dense", "sinks")})).cells()
