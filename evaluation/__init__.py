"""evaluation: a loaded model in, numbers out.

An evaluation is a file with four functions, and one line here:

    cells(model, tokenizer, *, recipe, documents) -> list of cells      checks everything, measures nothing
    measure(model, tokenizer, *, recipe, documents, cell) -> result     one cell; the same result wherever it runs
    collect(recipe, results) -> EvalScores                              tidy rows from [(cell, result), ...]
    figure(scores) -> chart

Cells and results are plain JSON, so that evaluation/cells.py can spread them and go on where a run was interrupted.
`documents` are the held-out ones, for those that read them. Files are imported when asked for: this module and
`longreach.evaluation.recipe` import no torch.

    python -c "from longreach.evaluation import EVALS; print(*EVALS)"
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from longreach.evaluation.recipe import (
    EvalRecipe,
    HarnessRecipe,
    LostInTheMiddleRecipe,
    NeedleRecipe,
    PasskeyRecipe,
    PerplexityRecipe,
    SinksRecipe,
    StreamingRecipe,
)


@dataclass(frozen=True)
class Eval:
    """One evaluation: its choices, and the module of its four functions."""

    recipe: type[EvalRecipe]
    """The choices' type."""
    module: str
    """Imported by `load`."""

    def load(self) -> Any:
        """The module; imports torch."""
        return importlib.import_module(self.module)


EVALS = {
    "perplexity": Eval(PerplexityRecipe, "longreach.evaluation.perplexity"),
    "passkey": Eval(PasskeyRecipe, "longreach.evaluation.passkey"),
    "needle": Eval(NeedleRecipe, "longreach.evaluation.needle"),
    "lost_in_the_middle": Eval(LostInTheMiddleRecipe, "longreach.evaluation.lost_in_the_middle"),
    "streaming": Eval(StreamingRecipe, "longreach.evaluation.streaming"),
    "sinks": Eval(SinksRecipe, "longreach.evaluation.sinks"),
    "harness": Eval(HarnessRecipe, "longreach.evaluation.harness"),
}
