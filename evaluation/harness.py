"""Tasks of EleutherAI's lm-evaluation-harness (LongBench, LongBench v2, RULER, ...) on a loaded
model.

Tasks, prompts and metrics are those of the harness (extra `eval`), with one difference: if a prompt
is longer than max_length, its middle is cut out, as in LongBench's own script. The harness cuts off
the beginning.

Datasets come from the hub or from a folder (`data`). Task files in the folder are found by name. A
dataset is read from the folder if it is there under its hub name (DATA/Xnhyacinth/LongBench), or if
a task file gives its path relative to the folder.

    longreach evaluate MODEL --eval harness --set tasks=[longbench_qasper] --set limit=20
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from longreach.evaluation.base import Background, Cell, DataFile, EvalChoices, Evaluation, Result
from longreach.evaluation.blocks import Block, Table
from longreach.evaluation.lm_eval_files import metric_rows, summary_of
from longreach.evaluation.longbench import VERSION_2, paper_tables, version_2_rows
from longreach.evaluation.scores import EvalScores, Row
from longreach.evaluation.sections import cells_of, spread, value_cell, with_commas

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from longreach.evaluation.blocks import Figure
    from longreach.evaluation.figures import Style


class Harness(Evaluation):
    """What does the model score in tasks of the field's common benchmark suite?"""

    name = "harness"
    title = "Tasks of lm-evaluation-harness"
    folds_answers = False  # its page has a table of answers with their prompts

    class Choices(EvalChoices):
        """Tasks of EleutherAI's lm-evaluation-harness: LongBench, LongBench v2, RULER and all
        others (extra `eval`)."""

        tasks: tuple[str, ...] = Field(min_length=1)
        """The harness's names of tasks or groups, e.g. longbench_qasper."""
        limit: int | None = Field(default=None, ge=1)
        """Maximum number of documents of each task. Default: all."""
        max_length: int | None = Field(default=None, ge=16)
        """Maximum length of a prompt with its answer, in tokens. The middle of longer prompts is cut
        out. Default: the model's context length."""
        data: DataFile = None
        """A folder with task files (YAML) and local data, which is read in addition to the harness's
        own tasks."""
        task_arguments: dict[str, str | int | tuple[int, ...]] = Field(default_factory=dict)
        """Arguments passed to the tasks (RULER: max_seq_lengths)."""

    choices: Choices

    def cells(self) -> list[Cell]:
        """Return a cell for each task.

        Raises:
            ValueError: the harness has no such task, the folder `data` does not exist, or the extra
                `eval` is not installed.
        """
        folder = self.choices.data
        if folder and not Path(folder).is_dir():
            raise ValueError(f"harness.data {folder}: no such folder")
        available = self._tasks().all_tasks
        for task in self.choices.tasks:
            if task not in available:
                near = ", ".join(difflib.get_close_matches(task, available, n=3)) or "none"
                raise ValueError(f"harness.tasks {task!r}: lm-eval has no such task; similar names: {near}")
        return [{"task": task} for task in self.choices.tasks]

    def measure(self, cell: Cell) -> Result:
        """Return {"rows": one for each metric, "cases"}.

        Raises:
            ValueError: the task's data cannot be loaded, or max_length is too small for a prompt.
        """
        from datasets.exceptions import DatasetNotFoundError
        from lm_eval import simple_evaluate

        choices = self.choices
        model = _harness_model(self.model, self.tokenizer, choices.max_length)
        tasks = self._tasks()
        try:
            with _in_folder(choices.data):
                answer = simple_evaluate(
                    model,
                    tasks=[cell["task"]],
                    limit=choices.limit,
                    task_manager=tasks,
                    bootstrap_iters=1000,
                )
        except AssertionError as error:  # the harness raises it if a prompt cannot fit
            place = f"harness task {cell['task']}, max_length {choices.max_length}"
            raise ValueError(f"{place}: {error}; raise max_length") from error
        except (OSError, DatasetNotFoundError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"harness task {cell['task']}: its data cannot be loaded ({reason}): go online, or put the data into "
                f"a folder and set harness.data to it"
            ) from error
        rows, cases = metric_rows(answer), []
        for task, samples in answer["samples"].items():
            cut = set()
            for sample in samples:
                case = _case(task, sample, model.cut_tokens)
                if case["cut_tokens"]:
                    cut.add(sample["doc_id"])
                cases.append(case)
            facts = {"truncated": len(cut), "max_length": model.max_length, "decoding": _decoding(samples)}
            for row in rows:
                if row["task"] == task:
                    row |= facts
        return {"rows": rows, "cases": cases}

    def _tasks(self) -> Any:
        """Return the harness's tasks and those of the folder, with their arguments."""
        named = {"pretrained": self.model.name_or_path} | self.choices.task_arguments
        return _task_manager(self.choices.data, json.dumps(named))

    @classmethod
    def scores(cls, choices: Choices, results: list[tuple[Cell, Result]]) -> EvalScores:
        """Return a row of kind `task` for each metric of each task, and rows of kind `longbench2`
        (LongBench v2's columns)."""
        rows, cases = _each_task_once(results)
        protocol = "lm-evaluation-harness's own prompts and metrics"
        limits = sorted({row["max_length"] for row in rows if row.get("max_length")})
        if limits:
            protocol += f"; prompts of up to {' or '.join(with_commas(limits))} tokens"
        protocol += "; the middle of longer prompts is cut out"
        decodings = sorted({row["decoding"] for row in rows if row.get("decoding")})
        if decodings:
            protocol += f"; answers: {', '.join(decodings)}"
        return EvalScores(
            eval=cls.name,
            protocol=protocol,
            recipe=choices.model_dump(mode="json"),
            rows=rows + version_2_rows(cases),
            summary=summary_of(rows),
            note="With a limit these are the first documents of a task: no published number.",
            cases=cases,
        )

    @classmethod
    def words_and_tables(cls, models: dict[str, EvalScores], background: Background) -> list[Block]:
        """Return the question and protocol, every metric with its interval and, for one model, a
        sample of prompts with their answers."""
        first = next(iter(models.values()))
        text = f"{cls.question()} Protocol: {first.protocol}. {first.note}"
        return [text, *cls.task_tables(models), *_sample_table(models)]

    @classmethod
    def task_tables(cls, models: Mapping[str, EvalScores]) -> list[Block]:
        """Return LongBench's tables in the format of its papers, and a table of every task and
        metric with a column for each model."""
        found: dict[str, dict[str, Row]] = {}
        for name, scores in models.items():
            for row in scores.rows_with(kind="task"):
                found.setdefault(f"{row['task']}_{row['metric']}", {})[name] = row
        lines = []
        for metric, rows in found.items():
            lines.append([metric, *cells_of(rows, models, _metric_cell)])
        legend = (
            "In small type: 95% intervals, the number n of documents, and the number of prompts that were too long, so "
            "that their middle was cut out."
        )
        return [*paper_tables(models), Table("Every task and metric", ["task", *models], lines, legend=legend)]

    @classmethod
    def figures(cls, models: dict[str, EvalScores], style: Style, background: Background) -> list[Figure]:
        """Return a grid of metric x task for each model."""
        from longreach.evaluation.figures import grid

        top = 1.0
        for scores in models.values():
            for row in scores.rows_with(kind="task"):
                top = max(top, row["value"])
        figures = []
        for name, scores in models.items():
            values = {(row["task"], row["metric"]): row["value"] for row in scores.rows_with(kind="task")}
            metrics = scores.distinct("metric", kind="task")
            lines: dict[str, list[tuple[float, str]]] = {}
            for task in scores.distinct("task", kind="task"):
                lines[task] = []
                for metric in metrics:
                    value = values.get((task, metric), math.nan)
                    text = f"{value:.3g}" if math.isfinite(value) else ""
                    lines[task].append((value, text))
            title, caption = f"{cls.title}: {name}", "Metrics as the harness defines them."
            figures.append(grid(f"harness-{name}.png", title, caption, ("metric", "value"), metrics, lines, top))
        return figures


def _case(task: str, sample: dict[str, Any], cut_tokens: Mapping[str, int]) -> Row:
    """Return a question as a case: its prompt, the expected answer and the model's answer.

    cut_tokens: number of tokens cut out of the middle of prompts, by prompt.
    """
    requests = sample["arguments"]
    case: Row = {
        "task": task,
        "prompt": str(requests[0][0]),
        "expected": str(sample["target"]),
        "got": _answer(sample),
        "cut_tokens": max(cut_tokens.get(request[0], 0) for request in requests),
    }
    score = sample.get(next(iter(sample["metrics"]), ""))
    if isinstance(score, int | float):
        case["score"] = float(score)
    if task.startswith(VERSION_2):
        case |= {field: str(sample["doc"].get(field, "")) for field in ("difficulty", "length")}
    return case


def _answer(sample: dict[str, Any]) -> str:
    """Return the model's answer: its text, or the most likely of several choices."""
    requests, responses = sample["arguments"], sample["resps"]
    if isinstance(responses[0][0], str):
        return responses[0][0]
    if len(requests) > 1:
        likelihoods = [response[0][0] for response in responses]
        return str(requests[likelihoods.index(max(likelihoods))][1]).strip()
    return str(responses)


def _decoding(samples: list[dict[str, Any]]) -> str:
    """Return how a task's answers were obtained: greedy or sampled text, or the likelihood of given
    answers."""
    settings = []
    for sample in samples:
        for request in sample["arguments"]:
            if isinstance(request[-1], dict):  # generation settings
                settings.append(request[-1])
    if not settings:
        return "likelihood"
    return "sampled" if any(setting.get("do_sample") for setting in settings) else "greedy"


def _metric_cell(row: Row | None) -> str:
    """Return a metric's value and, in small type, its interval, documents and cut prompts."""
    text = value_cell("{:.4g}".format, row)
    if row is not None and row.get("truncated") is not None:
        text += f", {row['truncated']} cut"
    return text


SAMPLES = 10
"""Number of questions that a page shows with their answers."""
ENDS = 300
"""Number of characters that a page shows at each end of a prompt."""


def _sample_table(models: Mapping[str, EvalScores]) -> list[Table]:
    """Return a table of SAMPLES questions of one model, spread evenly over its tasks; none on a page
    that compares models."""
    (scores, *others) = models.values()
    if others or not scores.cases:
        return []
    lines = []
    for case in spread(scores.cases, SAMPLES):
        prompt = case["prompt"]
        if len(prompt) > 2 * ENDS:
            prompt = f"{prompt[:ENDS]} […] {prompt[-ENDS:]}"
        lines.append([case["task"], prompt, case["expected"], case["got"]])
    caption = f"{len(lines)} of {len(scores.cases)} questions and their answers"
    legend = "The whole prompts are in cases.jsonl, with the number of tokens cut out of each."
    return [Table(caption, ["task", "prompt", "expected", "answer"], lines, legend=legend, prose=True)]


@contextlib.contextmanager
def _in_folder(folder: str | None) -> Iterator[None]:
    """Change to the folder of local data, with an empty cache of `datasets`.

    That cache identifies local data by the last part of the folder's name and its card. So it could
    return data of another folder, or earlier data of this one.
    """
    if folder is None:
        yield
        return
    from datasets import config

    usual = config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory() as cache, contextlib.chdir(folder):
        config.HF_DATASETS_CACHE = Path(cache)
        try:
            yield
        finally:
            config.HF_DATASETS_CACHE = usual


def _task_manager(folder: str | None, arguments: str = "{}") -> Any:
    """Return the harness's tasks together with those of a folder. All get the arguments (JSON).

    Raises:
        ValueError: the harness is not installed.
    """
    return _read_tasks(str(Path(folder).resolve()) if folder else None, arguments)


@functools.cache  # reading the files of the harness' 14,683 tasks takes 6 to 8 CPU seconds
def _read_tasks(folder: str | None, arguments: str) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError("lm-evaluation-harness is not installed: pip install 'longreach[eval]'") from error
    return TaskManager(include_path=folder, metadata=json.loads(arguments))


def _each_task_once(results: list[tuple[Cell, Result]]) -> tuple[list[Row], list[Row]]:
    """Return the rows and cases of all cells. A task that two cells ran, as with a group and one of
    its members, counts only once."""
    rows: list[Row] = []
    cases: list[Row] = []
    counted: set[str] = set()
    for _, result in results:
        rows += [row for row in result["rows"] if row["task"] not in counted]
        cases += [case for case in result["cases"] if case["task"] not in counted]
        counted |= {row["task"] for row in [*result["rows"], *result["cases"]]}
    return rows, cases


def _harness_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Any:
    """Return our model wrapped in the harness's model class, which cuts the middle out of prompts that
    are too long."""
    wrapper = _middle_cutting_model()
    return wrapper(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1, max_length=max_length)


@functools.cache
def _middle_cutting_model() -> Any:
    """Return a subclass of the harness's model class; defined here to import the harness only when
    needed."""
    from lm_eval.models.huggingface import HFLM

    class MiddleCut(HFLM):
        """An HFLM that keeps the beginning and end of prompts that are too long."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.cut_tokens: dict[str, int] = {}
            """Number of tokens cut out of each prompt that was too long."""
            super().__init__(*args, **kwargs)

        def tok_batch_encode(
            self, strings: Any, *args: Any, left_truncate_len: int | None = None, **kwargs: Any
        ) -> Any:
            ids, mask = super().tok_batch_encode(strings, *args, **kwargs)
            for prompt, tokens in zip(strings, mask.sum(1).tolist(), strict=True):
                self._note(prompt, tokens, left_truncate_len)
            return middle_cut(ids, left_truncate_len), middle_cut(mask, left_truncate_len)

        def _encode_pair(self, context: str, continuation: str) -> Any:
            before, after = super()._encode_pair(context, continuation)
            room = self.max_length - len(after)
            self._note(context, len(before), room)
            return middle_cut(before, room), after

        def _note(self, prompt: str, tokens: int, room: int | None) -> None:
            if room is not None and tokens > room:
                self.cut_tokens[prompt] = tokens - room

    return MiddleCut


def middle_cut(ids: Any, room: int | None) -> Any:
    """Return the first and last room / 2 items of a list of ids, or columns of a tensor [B, T]; all of
    them if they fit."""
    is_list = isinstance(ids, list)
    length = len(ids) if is_list else ids.shape[1]
    if room is None or length <= room:
        return ids
    head = room // 2
    tail = length - (room - head)
    if is_list:
        return ids[:head] + ids[tail:]
    import torch

    return torch.cat([ids[:, :head], ids[:, tail:]], 1)
