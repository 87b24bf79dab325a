"""An evaluation's cells, measured one by one, each kept as soon as it is known.

A folder of cells is private to one evaluation of one model with one recipe: an interrupted grid goes on where it
stopped, and several tasks can share the work, because what a cell's result is depends on nothing but the cell.

    evaluate("passkey", model, tokenizer, recipe=PasskeyRecipe(lengths=(1024,))).summary
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longreach.evaluation import EVALS
from longreach.evaluation.documents import Document, Progress, silent
from longreach.evaluation.likelihood import forget_length
from longreach.evaluation.recipe import EvalRecipe
from longreach.evaluation.scores import EvalScores
from longreach.infra.files import write_whole

Result = dict[str, Any]


def evaluate(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    recipe: EvalRecipe,
    documents: Iterable[Document] = (),
    progress: Progress = silent,
) -> EvalScores:
    """An evaluation in this process, from its checks to its scores."""
    documents, code = list(documents), EVALS[name].load()
    cells = code.cells(model, tokenizer, recipe=recipe, documents=documents)
    found = {}
    progress(0, len(cells))
    for n, result in measured(name, model, tokenizer, recipe=recipe, documents=documents, todo=dict(enumerate(cells))):
        found[n] = result
        progress(len(found), len(cells))
    return code.collect(recipe, [(cell, found[n]) for n, cell in enumerate(cells)])


def measured(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    recipe: EvalRecipe,
    documents: list[Document],
    todo: dict[int, Any],
) -> Iterator[tuple[int, Result]]:
    """(number, result) of each cell in `todo`, as it is known."""
    code = EVALS[name].load()
    for n, cell in todo.items():
        forget_length(model)
        yield n, code.measure(model, tokenizer, recipe=recipe, documents=documents, cell=cell)


class CellFolder:
    """Results on disk, a file a cell, written whole or not at all."""

    def __init__(self, folder: Path, earlier: Iterable[Path] = (), *, setting: str = "") -> None:
        """setting: what else a result depends on (type, device): cells of another one are not taken up."""
        self.folder, self.all, self.setting = folder, [folder, *earlier], setting
        folder.mkdir(parents=True, exist_ok=True)

    def known(self, cells: list[Any]) -> dict[int, Result]:
        """Results that are there already, of this attempt or an earlier one, by the cell's number."""
        plain, found = json.loads(json.dumps(cells)), {}
        for n, cell in enumerate(plain):
            for path in (folder / f"{n:05d}.json" for folder in self.all):
                kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
                if (kept.get("cell"), kept.get("setting")) == (cell, self.setting):
                    found[n] = kept["result"]
                    break
        return found

    def keep(self, n: int, cell: Any, result: Result) -> None:
        """Writes one."""
        record = {"cell": cell, "setting": self.setting, "result": result}
        write_whole(self.folder / f"{n:05d}.json", json.dumps(record, ensure_ascii=False))
