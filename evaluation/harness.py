"""Tasks of EleutherAI's lm-evaluation-harness (LongBench, LongBench v2, RULER, ...) on our model object.

Tasks, prompts and metrics are the harness's (extra `eval`); ours is the glue, and one choice: where a prompt is longer
than max_length its middle is cut out, as LongBench's own script does, while the harness would cut off its beginning.

Datasets come from the hub, or from a folder (`data`): task files in it are known by name, and a dataset that lies in it
under its hub name (DATA/Xnhyacinth/LongBench) or that a task file names relative to it is read from there.

    longreach evaluate MODEL --eval harness --set tasks=[longbench_qasper] --set limit=20
"""

from __future__ import annotations

import contextlib
import difflib
import functools
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longreach.evaluation.documents import Document
from longreach.evaluation.figures import heatmap
from longreach.evaluation.recipe import HarnessRecipe
from longreach.evaluation.scores import EvalScores


def cells(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, recipe: HarnessRecipe, documents: list[Document]
) -> list[dict[str, Any]]:
    """A task each. ValueError for a task that the harness does not know, or where the extra is not installed."""
    if recipe.data and not Path(recipe.data).is_dir():
        raise ValueError(f"harness.data {recipe.data}: no such folder")
    known = _manager(recipe.data).all_tasks
    for task in recipe.tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, n=3)
            raise ValueError(f"harness.tasks {task!r}: lm-eval has no such task; near: {', '.join(near) or 'none'}")
    return [{"task": task} for task in recipe.tasks]


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    recipe: HarnessRecipe,
    documents: list[Document],
    cell: dict[str, Any],
) -> dict[str, Any]:
    """{"rows": a metric each, "cases"}; ValueError where the task's data cannot be reached."""
    from datasets.exceptions import DatasetNotFoundError
    from lm_eval import simple_evaluate

    try:
        with contextlib.chdir(recipe.data or "."):
            found = simple_evaluate(
                _harness_model(model, tokenizer, recipe.max_length),
                tasks=[cell["task"]],
                limit=recipe.limit,
                task_manager=_manager(recipe.data and "."),
                metadata={"pretrained": model.name_or_path} | recipe.task_arguments,
                bootstrap_iters=1000,
            )
    except AssertionError as error:  # its word for a prompt that cannot fit
        raise ValueError(f"harness task {cell['task']}, max_length {recipe.max_length}: {error}; raise it") from error
    except (OSError, DatasetNotFoundError) as error:
        raise ValueError(
            f"harness task {cell['task']}: its data cannot be reached ({str(error).splitlines()[0]}): go online, or "
            f"put it into a folder and name that in harness.data"
        ) from error
    rows = []
    for task, values in found["results"].items():
        for name, value in values.items():
            metric, _, filtered = name.partition(",")
            if metric.isdecimal() and value == -1:
                continue  # RULER's word for a length that was not asked for
            if isinstance(value, int | float) and filtered and not metric.endswith("_stderr"):
                spread = values.get(f"{metric}_stderr,{filtered}")
                if filtered != "none":
                    metric = f"{metric}_{filtered}"  # a task may read answers in several ways
                row = {"kind": "task", "task": task, "metric": metric, "value": float(value)}
                if isinstance(spread, float):
                    row |= {"low": value - 1.96 * spread, "high": value + 1.96 * spread}
                rows.append(row | {"documents": found["n-samples"].get(task, {}).get("effective")})
    cases = [
        {
            "task": task,
            "prompt": str(sample["arguments"]),
            "expected": str(sample["target"]),
            "got": str(sample["resps"]),
        }
        for task, samples in found["samples"].items()
        for sample in samples
    ]
    return {"rows": rows, "cases": cases}


def collect(recipe: HarnessRecipe, results: list[tuple[dict[str, Any], dict[str, Any]]]) -> EvalScores:
    """Rows of kind `task`: a metric of a task each."""
    rows = [row for _, result in results for row in result["rows"]]
    return EvalScores(
        eval="harness",
        protocol="lm-evaluation-harness's own prompts and metrics; the middle of longer prompts is cut out",
        recipe=recipe.model_dump(mode="json"),
        rows=rows,
        summary={f"{row['task']}_{row['metric']}": row["value"] for row in rows},
        note="With a limit these are the first documents of a task: no published number.",
        cases=[case for _, result in results for case in result["cases"]],
    )


def _manager(data: str | None) -> Any:
    """The harness's tasks, and those of a folder."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError("lm-evaluation-harness is not installed: pip install 'longreach[eval]'") from error
    return TaskManager(include_path=data)


def _harness_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Any:
    """The harness's model around ours, cutting the middle out of prompts that are too long."""
    return _class()(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1, max_length=max_length)


@functools.cache
def _class() -> Any:
    """A subclass of the harness's class, made where that is imported."""
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
    """The first and last room / 2 of a list of ids, or of the columns of a tensor [B, T]; whole if they fit."""
    if isinstance(ids, list):
        return ids if room is None or len(ids) <= room else ids[: room // 2] + ids[len(ids) - (room - room // 2) :]
    if room is None or ids.shape[1] <= room:
        return ids
    import torch

    return torch.cat([ids[:, : room // 2], ids[:, ids.shape[1] - (room - room // 2) :]], 1)


def figure(scores: EvalScores) -> Any:
    """A cell for each task and metric."""
    rows = [row | {"text": f"{row['value']:.3g}"} for row in scores.rows]
    top = max(1.0, *(row["value"] for row in rows), 0.0)
    return heatmap(
        rows, x="metric", y="task", value="value", text="text",
        titles=([f"{scores.model}: tasks of lm-evaluation-harness", "metrics as it defines them"], "metric", "task"),
        value_title="value", top=top, bright_low=False,
    )  # fmt: skip
