"""Tasks of EleutherAI's lm-evaluation-harness (LongBench, LongBench v2, RULER, ...) on our model
object.

Tasks, prompts and metrics are the harness's (extra `eval`); ours is the glue, and one choice: where
a prompt is longer than max_length its middle is cut out, as LongBench's own script does, while the
harness would cut off its beginning.

Datasets come from the hub, or from a folder (`data`): task files in it are known by name, and a
dataset that lies in it under its hub name (DATA/Xnhyacinth/LongBench) or that a task file names
relative to it is read from there.

    longreach evaluate MODEL --eval harness --set tasks=[longbench_qasper] --set limit=20
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from longreach.evaluation.base import Background, Cell, DataFile, EvalChoices, Evaluation, Result
from longreach.evaluation.scores import EvalScores, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from longreach.evaluation.blocks import Figure
    from longreach.evaluation.figures import Style


class Harness(Evaluation):
    """What does the field's common benchmark suite say?"""

    name = "harness"
    title = "Tasks of lm-evaluation-harness"

    class Choices(EvalChoices):
        """Tasks of EleutherAI's lm-evaluation-harness: LongBench, LongBench v2, RULER and all
        others (extra `eval`)."""

        tasks: tuple[str, ...] = Field(min_length=1)
        """The harness's names of tasks or groups, e.g. longbench_qasper."""
        limit: int | None = Field(default=None, ge=1)
        """Documents of each task; without it, all."""
        max_length: int | None = Field(default=None, ge=16)
        """Tokens that a prompt may have, the middle of longer ones is cut out; without it, the
        model's own context."""
        data: DataFile = None
        """A folder with tasks of its own (YAML files, local data), read beside the harness's."""
        task_arguments: dict[str, str | int | tuple[int, ...]] = Field(default_factory=dict)
        """Arguments that are handed to the tasks (RULER: max_seq_lengths)."""

    choices: Choices

    def cells(self) -> list[Cell]:
        """Return a cell for each task.

        Raises:
            ValueError: a task that the harness does not have, or the extra is not installed.
        """
        folder = self.choices.data
        if folder and not Path(folder).is_dir():
            raise ValueError(f"harness.data {folder}: no such folder")
        available = _task_manager(folder).all_tasks
        for task in self.choices.tasks:
            if task not in available:
                near = ", ".join(difflib.get_close_matches(task, available, n=3)) or "none"
                raise ValueError(f"harness.tasks {task!r}: lm-eval has no such task; near: {near}")
        return [{"task": task} for task in self.choices.tasks]

    def measure(self, cell: Cell) -> Result:
        """Return {"rows": one for each metric, "cases"}; ValueError where the task's data cannot be
        reached."""
        from datasets.exceptions import DatasetNotFoundError
        from lm_eval import simple_evaluate

        choices = self.choices
        try:
            with contextlib.chdir(choices.data or "."):
                answer = simple_evaluate(
                    _harness_model(self.model, self.tokenizer, choices.max_length),
                    tasks=[cell["task"]],
                    limit=choices.limit,
                    task_manager=_task_manager(choices.data and "."),
                    metadata={"pretrained": self.model.name_or_path} | choices.task_arguments,
                    bootstrap_iters=1000,
                )
        except AssertionError as error:  # how the harness says that a prompt cannot fit
            place = f"harness task {cell['task']}, max_length {choices.max_length}"
            raise ValueError(f"{place}: {error}; raise it") from error
        except (OSError, DatasetNotFoundError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"harness task {cell['task']}: its data cannot be reached ({reason}): go online, or "
                f"put it into a folder and name that in harness.data"
            ) from error
        cases = []
        for task, samples in answer["samples"].items():
            for sample in samples:
                prompt, expected = str(sample["arguments"]), str(sample["target"])
                cases.append({"task": task, "prompt": prompt, "expected": expected, "got": str(sample["resps"])})
        return {"rows": _metric_rows(answer), "cases": cases}

    @classmethod
    def scores(cls, choices: Choices, results: list[tuple[Cell, Result]]) -> EvalScores:
        """Return rows of kind `task`: one for each metric of each task."""
        rows = [row for _, result in results for row in result["rows"]]
        return EvalScores(
            eval=cls.name,
            protocol="lm-evaluation-harness's own prompts and metrics; the middle of longer prompts is cut out",
            recipe=choices.model_dump(mode="json"),
            rows=rows,
            summary={f"{row['task']}_{row['metric']}": row["value"] for row in rows},
            note="With a limit these are the first documents of a task: no published number.",
            cases=[case for _, result in results for case in result["cases"]],
        )

    @classmethod
    def figures(cls, models: dict[str, EvalScores], style: Style, background: Background) -> list[Figure]:
        """Return a grid of metric x task for each model."""
        from longreach.evaluation.figures import grid

        values = [row["value"] for scores in models.values() for row in scores.rows]
        top = max([1.0, *values])
        figures = []
        for name, scores in models.items():
            cells = {(row["task"], row["metric"]): row["value"] for row in scores.rows}
            metrics = list(dict.fromkeys(metric for _, metric in cells))
            lines = {}
            for task in dict.fromkeys(task for task, _ in cells):
                of_task = [cells.get((task, metric), math.nan) for metric in metrics]
                lines[task] = [(value, f"{value:.3g}" if math.isfinite(value) else "") for value in of_task]
            title, caption = f"{cls.title}: {name}", "Metrics as the harness defines them."
            figures.append(grid(f"harness-{name}.png", title, caption, ("metric", "value"), metrics, lines, top))
        return figures


def _metric_rows(answer: dict[str, Any]) -> list[Row]:
    """Return a row for each metric of each task in the harness's answer, which names them
    "metric,filter"."""
    rows = []
    for task, values in answer["results"].items():
        documents = answer["n-samples"].get(task, {}).get("effective")
        for name, value in values.items():
            metric, _, answer_filter = name.partition(",")
            if metric.isdecimal() and value == -1:
                continue  # how RULER marks a length that was not asked for
            if not isinstance(value, int | float) or not answer_filter or metric.endswith("_stderr"):
                continue  # an alias, or the error of another entry
            error = values.get(f"{metric}_stderr,{answer_filter}")
            if answer_filter != "none":
                metric = f"{metric}_{answer_filter}"  # a task may read answers in several ways
            row: Row = {"kind": "task", "task": task, "metric": metric, "value": float(value)}
            if isinstance(error, float):
                row |= {"low": value - 1.96 * error, "high": value + 1.96 * error}
            rows.append(row | {"documents": documents})
    return rows


def _task_manager(folder: str | None) -> Any:
    """Return the harness's tasks together with those of a folder; ValueError where it is not
    installed."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError("lm-evaluation-harness is not installed: pip install 'longreach[eval]'") from error
    return TaskManager(include_path=folder)


def _harness_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Any:
    """Return the harness's model around ours, which cuts the middle out of prompts that are too
    long."""
    wrapper = _middle_cutting_model()
    return wrapper(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1, max_length=max_length)


@functools.cache
def _middle_cutting_model() -> Any:
    """Return a subclass of the harness's model class; the harness is imported only here."""
    from lm_eval.models.huggingface import HFLM

    class MiddleCut(HFLM):
        """HFLM that keeps a long prompt's beginning and end."""

        def tok_batch_encode(
            self, strings: Any, *args: Any, left_truncate_len: int | None = None, **kwargs: Any
        ) -> Any:
            ids, mask = super().tok_batch_encode(strings, *args, **kwargs)
            return middle_cut(ids, left_truncate_len), middle_cut(mask, left_truncate_len)

        def _encode_pair(self, context: str, continuation: str) -> Any:
            before, after = super()._encode_pair(context, continuation)
            return middle_cut(before, self.max_length - len(after)), after

    return MiddleCut


def middle_cut(ids: Any, room: int | None) -> Any:
    """Return the first and last room / 2 of a list of ids, or of the columns of a tensor [B, T];
    all if they fit."""
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
