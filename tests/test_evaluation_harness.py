"""The glue to lm-evaluation-harness, offline: its own LongBench task on a local set in the same schema."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluating import drawn, evaluate
from tiny_models import byte_tokenizer, tiny_llama

from longreach.evaluation.base import Background
from longreach.evaluation.blocks import Table
from longreach.evaluation.harness import Harness, _answer, _harness_model, _in_folder, _task_manager, middle_cut
from longreach.evaluation.likelihood import token_nll
from longreach.evaluation.longbench import paper_tables
from longreach.evaluation.scores import EvalScores

CARD = """---
configs:
- config_name: qasper
  data_files: [{split: test, path: qasper.jsonl}]
- config_name: lcc
  data_files: [{split: test, path: lcc.jsonl}]
---
"""


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder with two documents of LongBench's qasper under its hub name, and a task of its own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "Xnhyacinth" / "LongBench"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    lines = [
        {
            "context": "the cat sat " * 40,
            "question": f"who {n}?",
            "answers": ["the cat"],
            "length": 5,
            "all_classes": None,
        }
        for n in range(3)
    ]
    (folder / "qasper.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lines = [line | {"context": f"x = {n}\ny = x\n", "answers": ["z = x + y"]} for n, line in enumerate(lines)]
    (folder / "lcc.jsonl").write_text("\n".join(map(json.dumps, lines)))
    folder = tmp_path / "recursal" / "longbench-v2"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(CARD.replace("qasper", "government_multi").replace("test", "train"))
    lines = []
    for n, (difficulty, length) in enumerate([("easy", "short"), ("hard", "short"), ("hard", "long")]):
        lines.append({"context": "the cat sat " * (80 if length == "long" else 5), "question": f"who {n}?",
                      "choices": ["the cat", "the dog", "a", "b"], "answer": "ABCD"[n], "_id": str(n),
                      "difficulty": difficulty, "length": length})  # fmt: skip
    (folder / "government_multi.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps({"text": f"ab{n}" * 9}) for n in range(2)))
    (tmp_path / "own.yaml").write_text(
        "task: own_perplexity\ndataset_path: json\ndataset_kwargs: {data_files: {test: own.jsonl}}\ntest_split: test\n"
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: word_perplexity}]\n"
    )
    return tmp_path


def expect(path, changes):
    """Change the first question of a data set."""
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | changes), *others]))


def run(mirror, **choices):
    return evaluate(Harness, tiny_llama(), byte_tokenizer(), **{"data": str(mirror), "max_length": 512} | choices)


@pytest.mark.long  # the harness reads all of its tasks
def test_longbench_runs_with_the_harness_own_metric_on_a_local_mirror(mirror):
    scores = run(mirror, tasks=("longbench_qasper",), limit=2)
    rows = {row["metric"]: row for row in scores.rows}
    assert rows["qa_f1_score"]["task"] == "longbench_qasper"
    assert rows["qa_f1_score"]["documents"] == 2
    assert 0 <= rows["qa_f1_score"]["value"] <= 1
    assert len(scores.cases) == 2
    assert "who 0?" in scores.cases[0]["prompt"]
    assert scores.cases[0]["expected"] == "['the cat']"
    assert "longbench_qasper_qa_f1_score" in scores.summary
    assert rows["score"]["decoding"] == "greedy"
    assert rows["score"]["max_length"] == 512
    assert rows["score"]["truncated"] == 2, "prompts of about 1,200 bytes, of which 384 fit beside the answer"
    assert scores.cases[0]["cut_tokens"] == len(scores.cases[0]["prompt"]) - 384
    assert "prompts of up to 512 tokens" in scores.protocol
    assert run(mirror, tasks=("longbench_qasper",), limit=1, max_length=4096).rows[0]["truncated"] == 0
    assert list(drawn(scores.named("m"))) == ["harness-m.png"]


@pytest.mark.long  # the harness reads all of its tasks
def test_three_long_tasks_score_as_the_harness_itself_scores_them_but_for_what_is_cut(mirror):
    """Answers that are compared by words, lines of code by edits, and the likeliest of four choices."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tasks = ("longbench_qasper", "longbench_lcc", "longbench2_govt_multi")
    model, tokenizer = tiny_llama(), byte_tokenizer()

    manager = _task_manager(str(mirror), json.dumps({"pretrained": model.name_or_path}))  # as ours: read once

    def theirs(max_length):
        plain = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1, max_length=max_length)
        with _in_folder(str(mirror)):
            return simple_evaluate(plain, tasks=list(tasks), task_manager=manager, bootstrap_iters=1000)

    samples = theirs(4096)["samples"]  # what the model answers to a first question is made the right answer
    for dataset in ("qasper", "lcc"):
        answer = samples[f"longbench_{dataset}"][0]["resps"][0][0]
        expect(mirror / "Xnhyacinth" / "LongBench" / f"{dataset}.jsonl", {"answers": [answer]})
    likelihoods = [response[0][0] for response in samples["longbench2_govt_multi"][0]["resps"]]
    likeliest = "ABCD"[likelihoods.index(max(likelihoods))]
    expect(mirror / "recursal" / "longbench-v2" / "government_multi.jsonl", {"answer": likeliest})
    for max_length in (4096, 512):
        harness, ours = theirs(max_length), run(mirror, tasks=tasks, max_length=max_length)
        cases = {task: [case for case in ours.cases if case["task"] == task] for task in tasks}
        assert {len(of_task) for of_task in cases.values()} == {3}
        for task, of_task in cases.items():
            samples = harness["samples"][task]
            assert [case["prompt"] for case in of_task] == [sample["arguments"][0][0] for sample in samples]
            same = [case["got"] == _answer(sample) for case, sample in zip(of_task, samples, strict=True)]
            # At 512 tokens the middle of a prompt is lost here, its beginning there.
            assert all(equal or case["cut_tokens"] for equal, case in zip(same, of_task, strict=True))
            if max_length == 4096:
                assert all(same)
                values = {row["metric"]: row["value"] for row in ours.rows_with(kind="task", task=task)}
                assert {metric: harness["results"][task][f"{metric},none"] for metric in values} == values
                score = values.get("score", values.get("acc"))
                assert 0 < score < 1, f"{task}: {score} would also come of no answer, or of any"
            elif task == "longbench_qasper":
                assert not any(same), "all three prompts are cut"


@pytest.mark.long  # the harness reads all of its tasks
def test_rulers_own_tasks_on_noise_run_offline_at_the_length_that_is_asked_for(tmp_path, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk, "download", lambda name: False)  # as without a network; noise needs none of its data
    model, tokenizer = tiny_llama(), byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    model.name_or_path = str(tmp_path)
    scores = evaluate(Harness, model, tokenizer, tasks=("niah_single_1",), limit=1, max_length=2048,
                      task_arguments={"max_seq_lengths": (1024,)})  # fmt: skip
    (case,) = scores.cases
    assert 700 < len(case["prompt"]) <= 1024 - 128
    assert case["prompt"].startswith("A special magic number is hidden within the following text. ")
    assert [(row["metric"], row["documents"], row["value"]) for row in scores.rows] == [("1024", 1, 0.0)]


@pytest.mark.long  # the harness reads all of its tasks
def test_longbench_2_has_the_papers_columns_and_counts_what_was_cut(mirror):
    scores = run(mirror, tasks=("longbench2_govt_multi",)).named("m")
    (row,) = scores.rows_with(kind="task")
    assert (row["metric"], row["documents"], row["truncated"], row["decoding"]) == ("acc", 3, 1, "likelihood")
    columns = {row["column"]: (row["documents"], row["correct"]) for row in scores.rows_with(kind="longbench2")}
    asked = {column: n for column, (n, _) in columns.items()}
    assert asked == {"Overall": 3, "Easy": 1, "Hard": 2, "Short": 2, "Long": 1}
    assert columns["Overall"][1] == round(3 * row["value"])
    right = [case["got"] == case["expected"] for case in scores.cases]
    assert sum(right) == columns["Overall"][1]
    tables = [block for block in Harness.words_and_tables({"m": scores}, Background()) if isinstance(block, Table)]
    assert [list(table.columns) for table in tables] == [
        ["model", "Overall", "Easy", "Hard", "Short", "Long"],
        ["task", "m"],
        ["task", "prompt", "expected", "answer"],
    ]
    assert tables[1].rows[0][1].endswith("\nn 3, 1 cut")


def harness_scores(**values):
    """Scores of LongBench tasks by the harness' names, with made up values."""
    rows = [{"kind": "task", "task": f"longbench_{task}", "metric": "score", "value": value, "low": 0.0,
             "high": 1.0, "documents": 5, "truncated": 2} for task, value in values.items()]  # fmt: skip
    return EvalScores("harness", "made up", {}, rows, {})


def test_longbench_stands_in_the_papers_columns_by_kind_of_task_in_per_cent():
    models = {"a": harness_scores(trec=0.5, hotpotqa=0.25, qasper=0.75), "b": harness_scores(qasper=0.1)}
    (table,) = paper_tables(models)
    assert list(table.columns) == ["model", "Qasper", "HotpotQA", "TREC", "Avg"]
    kinds = [("", 1), ("Single-Document QA", 1), ("Multi-Document QA", 1), ("Few-shot Learning", 1), ("", 1)]
    assert list(table.groups) == kinds
    assert [cell.split("\n")[0] for cell in table.rows[0]] == ["a", "75.0", "25.0", "50.0", "50.0"]
    assert [cell.split("\n")[0] for cell in table.rows[1]] == ["b", "10.0", "–", "–", "–"]
    assert table.rows[0][1] == "75.0\n0.0 to 100.0\nn 5"


def test_a_task_that_is_listed_beside_its_group_counts_once():
    def result(*tasks):
        cases = [{"task": task, "score": 1.0, "difficulty": "easy", "length": "short"} for task in tasks]
        rows = harness_scores(**dict.fromkeys(tasks, 0.5)).rows
        rows = [row | {"task": row["task"].removeprefix("longbench_")} for row in rows]
        return {"rows": rows, "cases": cases}

    group = ("longbench2", "longbench2_govt_single", "longbench2_govt_multi")
    results = [({"task": group[0]}, result(*group)), ({"task": group[1]}, result(group[1]))]
    scores = Harness.scores(Harness.Choices(tasks=group[:2]), results)
    assert [row["task"] for row in scores.rows_with(kind="task")] == [*group]
    assert {row["documents"] for row in scores.rows_with(kind="longbench2")} == {2}


def test_a_page_shows_ten_questions_of_all_tasks_with_both_ends_of_their_prompts():
    cases = [{"task": f"t{n // 15}", "prompt": "a" * 400 + "b" * 400, "expected": "x", "got": f"y{n}"}
             for n in range(30)]  # fmt: skip
    scores = replace(harness_scores(trec=0.5), cases=cases)
    *_, table = Harness.words_and_tables({"m": scores}, Background())
    assert [row[0] for row in table.rows] == ["t0"] * 5 + ["t1"] * 5
    assert table.rows[0][1:] == ["a" * 300 + " […] " + "b" * 300, "x", "y0"]
    *_, last = Harness.words_and_tables({"m": scores, "n": scores}, Background())
    assert "answer" not in last.columns, "a page that compares models has no cases"


@pytest.mark.long  # the harness reads all of its tasks
def test_a_folders_own_tasks_are_known_by_name(mirror):
    (row,) = (row for row in run(mirror, tasks=("own_perplexity",)).rows if row["metric"] == "word_perplexity")
    assert row["value"] > 1


def test_perplexity_agrees_with_the_harness_rolling_likelihood():
    """One text that fits the context, after the same first token: 1e-4 relative."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer, text = tiny_llama(), byte_tokenizer(), "What is said twice is true. " * 12
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1, max_length=1024)
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    (expected,) = theirs.loglikelihood_rolling([request])
    ids = np.array([theirs.prefix_token_id, *tokenizer(text).input_ids])
    assert -token_nll(model, ids, "text").sum() == pytest.approx(expected, rel=1e-4)
    assert math.isfinite(expected)


def test_the_middle_is_cut_and_both_ends_stay():
    assert middle_cut(list(range(10)), 5) == [0, 1, 7, 8, 9]
    assert middle_cut(list(range(4)), 5) == [0, 1, 2, 3]
    assert middle_cut(torch.arange(10)[None], 4).tolist() == [[0, 1, 8, 9]]
    assert middle_cut(torch.arange(10)[None], None).shape == (1, 10)


def test_long_prompts_keep_their_beginning_and_end(mirror):
    model = _harness_model(tiny_llama(), byte_tokenizer(), 64)
    ids, mask = model.tok_batch_encode(["a" * 50 + "b" * 50], left_truncate_len=20)
    assert byte_tokenizer().decode(ids[0]) == "a" * 10 + "b" * 10
    assert mask.shape == (1, 20)
    before, after = model._encode_pair("a" * 50 + "b" * 50, " c")
    assert len(before) + len(after) == 64
    assert byte_tokenizer().decode(before).startswith("aaa")


@pytest.mark.long  # the harness reads all of its tasks
def test_unknown_tasks_and_data_that_is_not_there_are_named(mirror, tmp_path):
    with pytest.raises(ValueError, match=r"'longbench_qaspr': .*no such task; similar names: longbench_qasper"):
        run(mirror, tasks=("longbench_qaspr",))
    with pytest.raises(ValueError, match=r"harness\.data .*: no such folder"):
        run(tmp_path / "no", tasks=("longbench_qasper",))
    with pytest.raises(ValueError, match=r"longbench_multifieldqa_en.*cannot be loaded.*harness\.data"):
        run(tmp_path / "Xnhyacinth", tasks=("longbench_multifieldqa_en",))
