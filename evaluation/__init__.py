"""evaluation: a loaded model in, numbers out.

An evaluation is `def name(model, tokenizer, *, recipe, documents=(), progress=silent) -> EvalScores` in a file of its
own, beside `figure(scores)`, plus one line here. `documents` are the held-out ones, for those that read them. Functions
are resolved when asked for: this module and `evaluation.recipe` import no torch.

    python -c "from evaluation import EVALS; print(*EVALS)"
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from evaluation.recipe import EvalRecipe, PasskeyRecipe, PerplexityRecipe, StreamingRecipe


@dataclass(frozen=True)
class Eval:
    """One evaluation: its choices, and where its code is."""

    recipe: type[EvalRecipe]
    """The choices' type."""
    function: str
    """`module:function`."""

    def load(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """(the evaluation, its figure); imports torch."""
        module, _, name = self.function.partition(":")
        code = importlib.import_module(module)
        return getattr(code, name), code.figure


EVALS = {
    "perplexity": Eval(PerplexityRecipe, "evaluation.perplexity:perplexity"),
    "passkey": Eval(PasskeyRecipe, "evaluation.passkey:passkey"),
    "streaming": Eval(StreamingRecipe, "evaluation.streaming:streaming"),
}
