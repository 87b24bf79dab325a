"""Measures an evaluation's cells one by one, and writes each result to disk as soon as it is known.

A folder of cells belongs to one evaluation of one model with one recipe. An interrupted grid
resumes where it stopped, and several tasks can share the work, because a cell's result depends only
on the cell.

    dict(measured(Passkey(model, tokenizer, Passkey.Choices()), {0: {"length": 1024, "trial": 0}}))
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from longreach.evaluation.base import Cell, Evaluation, Result
from longreach.infra.files import write_whole


def measured(evaluation: Evaluation, cells: dict[int, Cell]) -> Iterator[tuple[int, Result]]:
    """Yield (number, result) of each cell as soon as it is measured."""
    from longreach.evaluation.likelihood import forget_length

    for number, cell in cells.items():
        forget_length(evaluation.model)
        yield number, evaluation.measure(cell)


class CellFolder:
    """Results on disk, in one file for each cell, which is written atomically."""

    def __init__(self, folder: Path, earlier: Iterable[Path] = (), *, setting: str = "") -> None:
        """Create the folder if it is missing.

        Args:
            folder: folder for this attempt's results.
            earlier: folders of earlier attempts, whose results are reused.
            setting: what else a result depends on (data type, device); results with another setting
                are ignored.
        """
        self.folder = folder
        self.folders = [folder, *earlier]
        self.setting = setting
        folder.mkdir(parents=True, exist_ok=True)

    def known(self, cells: list[Cell]) -> dict[int, Result]:
        """Return the results that are already on disk, by cell number."""
        results = {}
        for number, cell in enumerate(json.loads(json.dumps(cells))):
            for folder in self.folders:
                path = folder / f"{number:05d}.json"
                if not path.is_file():
                    continue
                kept = json.loads(path.read_text(encoding="utf-8"))
                if (kept["cell"], kept["setting"]) == (cell, self.setting):
                    results[number] = kept["result"]
                    break
        return results

    def keep(self, number: int, cell: Cell, result: Result) -> None:
        """Write one cell's result."""
        record = {"cell": cell, "setting": self.setting, "result": result}
        write_whole(self.folder / f"{number:05d}.json", json.dumps(record, ensure_ascii=False))
