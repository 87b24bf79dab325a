"""Reads result files of lm-evaluation-harness as EvalScores, and writes EvalScores as such files.

lm-eval writes OUTPUT_PATH/MODEL/results_DATE.json: for each task its metrics ("acc,none", with
"acc_stderr,none"), the version of the task, and the number of documents used. Leaderboards and
scripts read these files, so our scores can be exported in this format. Tasks of the harness keep
their names; each of our own evaluations becomes the task longreach_NAME with the numbers of its
summary.

    python -c "from longreach.evaluation.lm_eval_files import read_results; print(read_results(FILE).summary)"
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from longreach.evaluation.scores import EvalScores, Row
from longreach.infra.files import write_whole

FORMAT = "0.4"
"""The versions of lm-eval whose files can be read. Others name metrics differently."""
WRITTEN_AS = "0.4.13"
"""The version of lm-eval whose format we write."""
HARNESS = "harness"
"""Name of the evaluation whose rows are tasks of lm-eval."""
Z = 1.96
"""Half the width of a 95% interval, in standard errors."""


def metric_rows(answer: Mapping[str, Any]) -> list[Row]:
    """Return a row for each metric of each task in the harness's result object or file, which name
    them "metric,filter"."""
    rows = []
    for task, values in answer["results"].items():
        counts = answer.get("n-samples", {}).get(task, {})
        better = answer.get("higher_is_better", {}).get(task, {})
        for name, value in values.items():
            metric, _, answer_filter = name.partition(",")
            if metric.isdecimal() and value == -1:
                continue  # RULER's mark for a length that was not requested
            if not isinstance(value, int | float) or not answer_filter or metric.endswith("_stderr"):
                continue  # an alias, or the standard error of another entry
            error = values.get(f"{metric}_stderr,{answer_filter}")
            about: Row = {
                "documents_in_all": counts.get("original"),
                "version": answer.get("versions", {}).get(task),
                "filter": answer_filter,
                "higher_is_better": better.get(metric),
            }
            if answer_filter != "none":
                metric = f"{metric}_{answer_filter}"  # a task may extract answers in several ways
            row: Row = {"kind": "task", "task": task, "metric": metric, "value": float(value)}
            if isinstance(error, float) and error:  # it is 0 if all answers are right, or all wrong
                row |= {"low": value - Z * error, "high": value + Z * error}
            rows.append(row | {"documents": counts.get("effective")} | about)
    return rows


def summary_of(rows: list[Row]) -> dict[str, float]:
    """Return each task's metrics by name: `longbench_qasper_qa_f1_score`."""
    return {f"{row['task']}_{row['metric']}": row["value"] for row in rows}


def result_files(name: str) -> list[Path]:
    """Return the result files of lm-eval for a path: the file itself, or the newest file of each model
    in an output path; empty if there are none."""
    path = Path(name)
    if path.suffix == ".json":
        return [path]
    newest: dict[Path, Path] = {}
    for pattern in ("results_*.json", "*/results_*.json"):
        for file in sorted(path.glob(pattern)):  # sorted by date
            newest[file.parent] = file
    return list(newest.values())


def read_results(path: Path) -> EvalScores:
    """Return a result file as scores of the evaluation `harness`, under the model's name.

    Raises:
        ValueError: the file is not a result file of lm-eval, or its version is not supported.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
        raise ValueError(f"{path} is not a result file of lm-eval: it has no `results`")
    _check_format(path, content)
    config = content.get("config") or {}
    facts = [f"lm-eval {content.get('lm_eval_version') or FORMAT}"]
    if content.get("max_length"):
        facts.append(f"prompts of up to {content['max_length']:,} tokens")
    if config.get("limit"):
        facts.append(f"limit {config['limit']:g}")
    rows = metric_rows(content)
    name = str(content.get("model_name") or _pretrained(config) or path.parent.name)
    if Path(name).is_absolute():
        name = Path(name).name
    return EvalScores(
        eval=HARNESS,
        protocol=", ".join(facts),
        recipe={"limit": config.get("limit")},
        rows=rows,
        summary=summary_of(rows),
        note=f"Read from {path.name}.",
    ).named(name)


def _check_format(path: Path, content: dict[str, Any]) -> None:
    """Raise ValueError if a result file has a version with other names of metrics."""
    version = str(content.get("lm_eval_version") or "")
    if not version:  # early files of 0.4 lack the version, but the names of their metrics show it
        names = [name for values in content["results"].values() for name in values]
        version = FORMAT if any("," in name for name in names) else "0.3 or older"
    if not re.match(rf"{re.escape(FORMAT)}(\D|$)", version):
        raise ValueError(
            f"{path} is from lm-eval {version}, but only files of lm-eval {FORMAT} can be read: evaluate again with "
            f"lm-eval {WRITTEN_AS}"
        )


def _pretrained(config: Mapping[str, Any]) -> str:
    """Return the model's name from lm-eval's model_args; empty if it is not there."""
    arguments = config.get("model_args") or ""
    if isinstance(arguments, Mapping):
        return str(arguments.get("pretrained", ""))
    found = re.search(r"pretrained=([^,]+)", str(arguments))
    return found[1] if found else ""


def check_versions(models: Mapping[str, EvalScores]) -> None:
    """Raise ValueError if two models were evaluated with different versions of a task, because prompts
    or metrics then differ."""
    seen: dict[str, tuple[Any, str]] = {}
    for name, scores in models.items():
        for row in scores.rows_with(kind="task"):
            version = row.get("version")
            if version is None:  # scores from before November 2026 have no version
                continue
            first, where = seen.setdefault(row["task"], (version, name))
            if first != version:
                raise ValueError(
                    f"{row['task']} has version {first} in {where} and version {version} in {name}, so their numbers "
                    f"cannot be compared: evaluate one of them again with the other's version of lm-eval"
                )


def write_results(scores: Iterable[EvalScores], model: str, folder: Path, source: str = "") -> Path:
    """Write a model's scores to FOLDER/MODEL/results_DATE.json and return its path.

    Args:
        scores: scores of one model in any evaluations; intervals become standard errors.
        source: where the model comes from, for the file's `model_args`.
    """
    tasks: dict[str, list[Row]] = {}
    limit = None
    for one in scores:
        if one.eval == HARNESS:
            limit = one.recipe.get("limit")
        rows = one.rows_with(kind="task") if one.eval == HARNESS else _own_rows(one)
        for row in rows:
            tasks.setdefault(row["task"], []).append(row)
    now = datetime.now()
    content: dict[str, Any] = {
        "results": {task: _entries(task, rows) for task, rows in tasks.items()},
        "group_subtasks": {task: [] for task in tasks},
        "configs": {task: {"task": task} for task in tasks},
        "versions": {task: rows[0].get("version") for task, rows in tasks.items()},
        "n-shot": {},
        "higher_is_better": {task: _directions(rows) for task, rows in tasks.items()},
        "n-samples": {task: _counts(rows) for task, rows in tasks.items() if rows[0].get("documents")},
        "config": {"model": "longreach", "model_args": f"pretrained={source or model}", "limit": limit},
        "date": time.time(),
        "lm_eval_version": WRITTEN_AS,
        "model_source": "longreach",
        "model_name": model,
        "model_name_sanitized": re.sub(r"[\"<>:/|\\?*\[\]]+", "__", model),
    }
    target = folder / content["model_name_sanitized"] / f"results_{now.isoformat().replace(':', '-')}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return target


def _own_rows(scores: EvalScores) -> list[Row]:
    """Return the summary of one of our own evaluations as rows of one task."""
    task = f"longreach_{scores.eval}"
    return [{"task": task, "metric": metric, "value": value} for metric, value in scores.summary.items()]


def _entries(task: str, rows: list[Row]) -> dict[str, Any]:
    """Return a task's metrics under lm-eval's names, with standard errors or "N/A"."""
    entries: dict[str, Any] = {"name": task, "alias": task}
    if rows[0].get("documents"):
        entries["sample_len"] = rows[0]["documents"]
    for row in rows:
        metric, answer_filter = _metric_and_filter(row)
        entries[f"{metric},{answer_filter}"] = row["value"]
        error: Any = "N/A"
        if row.get("low") is not None:
            error = (row["high"] - row["low"]) / (2 * Z)
        entries[f"{metric}_stderr,{answer_filter}"] = error
    return entries


def _metric_and_filter(row: Row) -> tuple[str, str]:
    """Return the name of a row's metric in its task, and the filter that extracted the answers."""
    answer_filter = row.get("filter") or "none"
    return row["metric"].removesuffix(f"_{answer_filter}"), answer_filter


def _directions(rows: list[Row]) -> dict[str, Any]:
    """Return for each metric whether higher is better; None if the task does not state it."""
    return {_metric_and_filter(row)[0]: row.get("higher_is_better") for row in rows}


def _counts(rows: list[Row]) -> dict[str, int]:
    """Return the numbers of documents of a task, all and used, in lm-eval's format."""
    asked = rows[0]["documents"]
    return {"original": rows[0].get("documents_in_all") or asked, "effective": asked}
