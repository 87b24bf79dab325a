"""LongBench's tables in the format of its papers, from the harness' rows.

Version 1 (arXiv:2308.14508, tables 1 and 2) has a column for each dataset, grouped by kind of task,
in per cent. Version 2 (arXiv:2412.15204, table 2) has the share of right answers over all questions,
by difficulty, and by the length of the text.

    python -c "from longreach.evaluation.longbench import DATASETS; print(DATASETS['longbench_qasper'])"
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from longreach.evaluation.blocks import Table
from longreach.evaluation.scores import EvalScores, Row, wilson
from longreach.evaluation.sections import DASH, value_cell


class Dataset(NamedTuple):
    """The paper's name and kind of a task of the harness."""

    name: str
    kind: str


SINGLE, MULTI, SUMMARY = "Single-Document QA", "Multi-Document QA", "Summarization"
FEW_SHOT, SYNTHETIC, CODE = "Few-shot Learning", "Synthetic Task", "Code Completion"
DATASETS = {
    "longbench_narrativeqa": Dataset("NarrativeQA", SINGLE),
    "longbench_qasper": Dataset("Qasper", SINGLE),
    "longbench_multifieldqa_en": Dataset("MultiFieldQA-en", SINGLE),
    "longbench_multifieldqa_zh": Dataset("MultiFieldQA-zh", SINGLE),
    "longbench_hotpotqa": Dataset("HotpotQA", MULTI),
    "longbench_2wikimqa": Dataset("2WikiMultihopQA", MULTI),
    "longbench_musique": Dataset("MuSiQue", MULTI),
    "longbench_dureader": Dataset("DuReader", MULTI),
    "longbench_gov_report": Dataset("GovReport", SUMMARY),
    "longbench_qmsum": Dataset("QMSum", SUMMARY),
    "longbench_multi_news": Dataset("MultiNews", SUMMARY),
    "longbench_vcsum": Dataset("VCSUM", SUMMARY),
    "longbench_trec": Dataset("TREC", FEW_SHOT),
    "longbench_triviaqa": Dataset("TriviaQA", FEW_SHOT),
    "longbench_samsum": Dataset("SAMSum", FEW_SHOT),
    "longbench_lsht": Dataset("LSHT", FEW_SHOT),
    "longbench_passage_count": Dataset("PassageCount", SYNTHETIC),
    "longbench_passage_retrieval_en": Dataset("PassageRetrieval-en", SYNTHETIC),
    "longbench_passage_retrieval_zh": Dataset("PassageRetrieval-zh", SYNTHETIC),
    "longbench_lcc": Dataset("LCC", CODE),
    "longbench_repobench-p": Dataset("RepoBench-P", CODE),
}
"""Version 1's datasets in the paper's order, by the harness' name of their task."""
VERSION_2 = "longbench2_"
"""Prefix of the harness' names of version 2's tasks."""
COLUMNS_2 = {
    "Overall": ("difficulty", None),
    "Easy": ("difficulty", "easy"),
    "Hard": ("difficulty", "hard"),
    "Short": ("length", "short"),
    "Medium": ("length", "medium"),
    "Long": ("length", "long"),
}
"""Version 2's columns: the field of a question, and the value by which each column selects."""


def version_2_rows(cases: list[Row]) -> list[Row]:
    """Return a row of kind `longbench2` for each of version 2's columns that has questions."""
    questions = [case for case in cases if case["task"].startswith(VERSION_2) and "score" in case]
    rows = []
    for column, (field, value) in COLUMNS_2.items():
        chosen = [case for case in questions if value is None or case.get(field) == value]
        if chosen:
            correct = sum(case["score"] == 1 for case in chosen)
            low, high = wilson(correct, len(chosen))
            row: Row = {"kind": "longbench2", "column": column, "documents": len(chosen), "correct": correct}
            rows.append(row | {"value": correct / len(chosen), "low": low, "high": high})
    return rows


def paper_tables(models: Mapping[str, EvalScores]) -> list[Table]:
    """Return the tables of both versions, with a row for each model; none for a version that was not
    evaluated."""
    return [*_version_1(models), *_version_2(models)]


def _version_1(models: Mapping[str, EvalScores]) -> list[Table]:
    found: dict[str, dict[str, Row]] = {}
    for name, scores in models.items():
        for row in scores.rows_with(kind="task", metric="score"):
            found.setdefault(row["task"], {})[name] = row
    tasks = [task for task in DATASETS if task in found]
    if not tasks:
        return []
    groups: list[tuple[str, int]] = [("", 1)]
    for task in tasks:
        kind, count = DATASETS[task].kind, 0
        if groups[-1][0] == kind:
            kind, count = groups.pop()
        groups.append((kind, count + 1))
    lines = []
    for name in models:
        cells, values = [], []
        for task in tasks:
            of_model = found[task].get(name)
            cells.append(percent_cell(of_model))
            if of_model:
                values.append(of_model["value"])
        mean = DASH
        if len(values) == len(tasks):
            mean = f"{100 * sum(values) / len(values):.1f}"
        lines.append([name, *cells, mean])
    columns = ["model", *(DATASETS[task].name for task in tasks), "Avg"]
    legend = f"Avg: the mean of these {len(tasks)} datasets; the paper's is over 21, or 16 in English. {SMALL}"
    caption = "LongBench (per cent; each dataset's own metric)"
    return [Table(caption, columns, lines, [*groups, ("", 1)], legend)]


def _version_2(models: Mapping[str, EvalScores]) -> list[Table]:
    found: dict[str, dict[str, Row]] = {}
    for name, scores in models.items():
        for row in scores.rows_with(kind="longbench2"):
            found.setdefault(row["column"], {})[name] = row
    if not found:
        return []
    columns = [column for column in COLUMNS_2 if column in found]
    lines = []
    for name in models:
        cells = [percent_cell(found[column].get(name)) for column in columns]
        lines.append([name, *cells])
    legend = f"The answer is the most likely of four; guessing gives 25. {SMALL}"
    return [Table("LongBench v2 (per cent right)", ["model", *columns], lines, legend=legend)]


SMALL = "In small type: 95% intervals, and the number of questions."


def percent_cell(row: Row | None) -> str:
    """Return a row's value in per cent and, in small type, its interval and number of documents."""
    return value_cell(lambda share: f"{100 * share:.1f}", row)
