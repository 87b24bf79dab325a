import gzip
import itertools
import json
import re

import pytest
from evaluating import drawn, evaluate, names_of
from tiny_models import byte_tokenizer, tiny_llama

from longreach.evaluation.lost_in_the_middle import LostInTheMiddle, best_subspan_em, places, questions
from longreach.evaluation.reader import Reader
from longreach.evaluation.scores import wilson


@pytest.mark.parametrize(
    ("said", "answers", "score"),
    [
        ("The answer is Ada Arven.", ["Ada Arven"], 1.0),
        ("it was the  ADA-ARVEN!", ["adaarven"], 1.0),
        ("an apple a day", ["Apple day"], 1.0),  # articles leave
        ("Ada", ["Ada Arven"], 0.0),
        ("nobody", ["no one", "nobody"], 1.0),
        ("", ["x"], 0.0),
    ],
)
def test_best_subspan_em_by_hand(said, answers, score):
    assert best_subspan_em(said, answers) == score


def test_places_are_spread_from_first_to_last():
    assert places(75, 5) == [0, 18, 37, 56, 74]
    assert places(2, 5) == [0, 1]


def cases(task, size, **choices):
    sizes = {"kv": "pairs", "qa": "documents"}
    choices = LostInTheMiddle.Choices(**{sizes[task]: (size,)} | choices)
    cell = {"task": task, "size": size, "trial": 0}
    return LostInTheMiddle(tiny_llama(), byte_tokenizer(), choices).measure(cell)["cases"]


def test_a_pair_is_moved_and_the_others_keep_their_order():
    found = cases("kv", 5, positions=3)
    assert [case["place"] for case in found] == [0, 2, 4]
    orders = []
    for case in found:
        shown = json.loads(case["prompt"].split("JSON data:\n")[1].split("\n\nKey")[0])
        assert len(shown) == 5
        key = case["prompt"].split('Key: "')[1].split('"')[0]
        assert shown[key] == case["expected"]
        assert list(shown).index(key) == case["place"]
        orders.append([k for k in shown if k != key])
    assert orders[0] == orders[1] == orders[2]
    assert found[0]["prompt"].endswith("Corresponding value:")


def test_a_value_is_expected_in_quotes_as_the_pairs_are_written_and_there_is_room_to_close_them(monkeypatch):
    asked = []
    answer = Reader.answer

    def listening(self, prompt, expected, where, *, new_tokens):
        asked.append((byte_tokenizer().decode(expected), new_tokens))
        return answer(self, prompt, expected, where, new_tokens=new_tokens)

    monkeypatch.setattr(Reader, "answer", listening)
    (case, _) = cases("kv", 3, positions=2, new_tokens=2)
    (expected, new_tokens), _ = asked
    assert expected.strip() == f'"{case["expected"]}'
    assert new_tokens > len(f'{expected}"\n')


def test_one_document_answers_and_closed_book_and_oracle_frame_it():
    found = cases("qa", 4, positions=2, new_tokens=2)
    assert [case["place"] for case in found] == [0, 3, "closed book", "oracle"]
    for case in found[:2]:
        told = [line for line in case["prompt"].splitlines() if line.startswith("Document [")]
        assert len(told) == 4
        assert [case["expected"] in line for line in told].index(True) == case["place"]
        assert sum(case["expected"] in line for line in told) == 1
    assert found[0]["expected"] not in found[2]["prompt"]
    assert found[3]["prompt"].count("Document [") == 1
    assert {case["subspan"] for case in found} <= {0.0, 1.0}


def test_the_papers_own_files_are_read(tmp_path):
    kv, qa = tmp_path / "kv.jsonl.gz", tmp_path / "qa.jsonl"
    pairs = [[f"k{n}", f"v{n}"] for n in range(4)]
    with gzip.open(kv, "wt") as f:
        f.write(json.dumps({"ordered_kv_records": pairs, "key": "k2", "value": "v2"}) + "\n")
    contexts = [{"title": "T", "text": "gold text", "isgold": True}]
    contexts += [{"title": f"o{n}", "text": f"other {n}", "isgold": False, "hasanswer": n == 1} for n in range(3)]
    qa.write_text(json.dumps({"question": "who", "answers": ["gold", "g"], "ctxs": contexts}) + "\n")
    found = cases("kv", 4, positions=2, trials=1, kv_data=str(kv))
    assert [case["expected"] for case in found] == ["v2", "v2"]
    assert found[1]["prompt"].index('"k2"') > found[1]["prompt"].index('"k3"')
    found = cases("qa", 3, positions=2, trials=1, qa_data=str(qa))
    assert "Document [3](Title: T) gold text" in found[1]["prompt"]
    assert "other 1" not in found[0]["prompt"]  # it holds the answer too
    with pytest.raises(ValueError, match="1 gold and 2 other documents, but `documents` asks for 4"):
        cases("qa", 4, trials=1, qa_data=str(qa))
    for choices, message in (
        ({"qa_data": str(qa), "documents": (3,), "trials": 2}, "has 1 questions, but trials asks for 2"),
        ({"kv_data": str(qa), "pairs": (3,), "trials": 1}, "line 1: ordered_kv_records: Field required"),
        ({"kv_data": str(tmp_path / "no"), "pairs": (3,), "trials": 1}, "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(LostInTheMiddle, tiny_llama(), byte_tokenizer(), **choices)


QA = {"question": "who", "answers": ["x"], "ctxs": [{"title": "t", "text": "x", "isgold": True}] * 2}
KV = {"ordered_kv_records": [["a", "b"], ["c", "d"]], "key": "a", "value": "b"}


@pytest.mark.parametrize(
    ("field", "second", "said"),
    [
        ("qa_data", QA | {"answers": []}, "line 2: answers: List should have at least 1 item"),
        ("qa_data", [QA], "line 2: Input should be an object"),
        ("qa_data", QA | {"ctxs": [{"title": "t"}]}, r"line 2: ctxs\.0\.text: Field required"),
        ("qa_data", b"hello", "line 2: Invalid JSON"),
        ("qa_data", b"\xff\xfe\x00", "line .*: 'utf-8' codec can't decode"),
        ("kv_data", KV | {"ordered_kv_records": [["a", "b", "c"]]}, r"line 2: ordered_kv_records\.0"),
        ("kv_data", KV | {"value": "d"}, "line 2: key 'a' with its value is not among"),
        ("kv_data", KV | {"ordered_kv_records": [["a", "b"]]}, "line 2 has 1 pairs, but `pairs` asks for 2"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_bad_line_of_a_data_file_is_one_sentence_with_file_and_line(tmp_path, field, second, said, suffix):
    path = tmp_path / f"data.{suffix}"
    good = QA if field == "qa_data" else KV
    good = good if field == "kv_data" else QA | {"ctxs": [*QA["ctxs"], {"title": "o", "text": "other"}]}
    lines = json.dumps(good).encode() + b"\n" + (second if isinstance(second, bytes) else json.dumps(second).encode())
    path.write_bytes(gzip.compress(lines) if suffix.endswith("gz") else lines)
    size = {"documents": (2,)} if field == "qa_data" else {"pairs": (2,)}
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}, {said}"):
        evaluate(LostInTheMiddle, tiny_llama(), byte_tokenizer(), **size, trials=2, **{field: str(path)})


@pytest.mark.parametrize(
    "damage", [lambda data: b"no gzip", lambda data: data[:-9], lambda data: data[:20] + b"?" * 20]
)
def test_a_damaged_archive_is_named_with_the_line_where_it_breaks(tmp_path, damage):
    path = tmp_path / "kv.jsonl.gz"
    path.write_bytes(damage(gzip.compress((json.dumps(KV) + "\n").encode() * 3)))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}, line \d: \w"):
        evaluate(LostInTheMiddle, tiny_llama(), byte_tokenizer(), pairs=(2,), trials=4, kv_data=str(path))


def test_scores_have_a_row_a_place_and_the_figure_a_line_a_size():
    choices = {"pairs": (3,), "documents": (3,), "positions": 2, "trials": 2}
    scores = evaluate(LostInTheMiddle, tiny_llama(), byte_tokenizer(), **choices)
    assert [(r["task"], r["place"], r["kind"], r["trials"]) for r in scores.rows] == [
        ("kv", "0", "cell", 2), ("kv", "2", "cell", 2), ("kv", "all", "size", 4),
        ("qa", "0", "cell", 2), ("qa", "2", "cell", 2), ("qa", "closed book", "baseline", 2),
        ("qa", "oracle", "baseline", 2), ("qa", "all", "size", 4),
    ]  # fmt: skip
    assert scores.summary.keys() == {"kv_3", "kv_nll_3", "qa_3", "qa_nll_3"}
    written = evaluate(LostInTheMiddle, tiny_llama(), byte_tokenizer(), **choices | {"new_tokens": 2})
    assert written.summary.keys() - scores.summary.keys() == {"kv_subspan_3", "qa_subspan_3"}
    titles = {file: "".join(chart["title"]["text"]) for file, chart in drawn(scores.named("m")).items()}
    assert titles == {
        "lost-in-the-middle-kv-3.png": "By place of the answer: 3 JSON pairs",
        "lost-in-the-middle-qa-3.png": "By place of the answer: 3 documents",
    }


def test_places_of_one_answer_are_one_trial_of_the_interval():
    choices = LostInTheMiddle.Choices(pairs=(4,), positions=4, trials=2, new_tokens=5)
    cases = []
    for trial, place in itertools.product(range(2), range(4)):
        found = trial == 0 or place == 0
        case = {"task": "kv", "size": 4, "trial": trial, "place": place, "correct": found, "subspan": float(found)}
        cases.append(case | {"token_accuracy": 1.0, "nll": 0.1, "prompt_tokens": 100})
    first, *_, whole = LostInTheMiddle.scores(choices, [({}, {"cases": cases})]).rows
    assert (whole["kind"], whole["correct"], whole["trials"], whole["subspan"]) == ("size", 5, 8, 5 / 8)
    for name in ("accuracy", "subspan"):
        assert (whole[f"{name}_low"], whole[f"{name}_high"]) == pytest.approx(wilson(1.25, 2)), "1 and 1 in 4"
        assert (first[f"{name}_low"], first[f"{name}_high"]) == wilson(2, 2), "at one place, each question once"


def test_nothing_to_search_or_no_middle_is_refused():
    with pytest.raises(ValueError, match="both empty"):
        LostInTheMiddle.Choices()
    with pytest.raises(ValueError, match="pairs and documents have a size of 1, but must be at least 2"):
        LostInTheMiddle.Choices(pairs=(1,))
    with pytest.raises(ValueError, match="documents is 200, but at most 128"):
        evaluate(LostInTheMiddle, tiny_llama(), byte_tokenizer(), documents=(200,))


@pytest.mark.parametrize(("kind", "most"), [("hard", 23), ("random", 106)])
def test_hard_distractors_share_place_or_building_with_the_question_and_random_ones_neither(kind, most):
    choices = {"positions": 2, "trials": 1, "distractors": kind}
    for size in (4, most):
        chosen = LostInTheMiddle.Choices(documents=(size,), **choices)
        first = next(questions(chosen, {"task": "qa", "size": size, "trial": 0}))
        told = [line for line in first.prompt.splitlines() if line.startswith("Document [")]
        buildings = [re.search(r"The ([\w ]+) of ([\w ]+) was", line).groups() for line in told]
        (work, place), *others = buildings
        assert len({*buildings}) == size
        assert {work == one or place == other for one, other in others} == {kind == "hard"}
    with pytest.raises(ValueError, match=f"documents is {most + 1}, but at most {most} can be invented with {kind}"):
        evaluate(LostInTheMiddle, tiny_llama(), byte_tokenizer(), documents=(most + 1,), **choices)
    with pytest.raises(ValueError, match="qa_data own has its own documents"):
        LostInTheMiddle.Choices(documents=(3,), qa_data="own", distractors=kind)


def test_several_kinds_of_distractors_are_curves_of_one_figure():
    choices = {"pairs": (3,), "documents": (3,), "positions": 2, "trials": 1, "distractors": ("hard", "random")}
    scores = evaluate(LostInTheMiddle, tiny_llama(), byte_tokenizer(), **choices).named("m")
    assert scores.summary.keys() == {
        *("kv_3", "kv_nll_3", "qa_hard_3", "qa_hard_nll_3", "qa_random_3", "qa_random_nll_3")
    }
    prompts = {case.get("distractors"): case["prompt"] for case in scores.cases if case["place"] == 2}
    assert prompts["hard"] != prompts["random"]
    assert [row["distractors"] for row in scores.rows_with(kind="size", task="qa")] == ["hard", "random"]
    assert "distractors" not in scores.rows_with(task="kv")[0]
    (figure,) = [chart for file, chart in drawn(scores).items() if "qa" in file]
    assert names_of(figure) == ["m, hard distractors", "m, random distractors"]
    for wrong, message in (((), "at least one"), (("hard", "hard"), "lists a value twice")):
        with pytest.raises(ValueError, match=message):
            LostInTheMiddle.Choices(documents=(3,), distractors=wrong)


def test_distractors_left_alone_are_no_part_of_identity():
    assert "distractors" not in LostInTheMiddle.Choices(documents=(3,)).identity()
    assert LostInTheMiddle.Choices(documents=(3,), distractors="hard").identity()["distractors"] == "hard"
