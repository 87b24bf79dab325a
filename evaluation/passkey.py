"""Passkey retrieval: a random number is hidden in filler sentences and asked for at the end
(arXiv:2305.16300; LongLoRA, section 4.2).

Answers are scored teacher-forced (evaluation/reader.py), which is equal to greedy decoding. As in
LongLoRA's script, it does not matter what the model would write after the key. The prompt is plain
text that ends with "The pass key is". No chat template is used, even if the model has one.

    longreach evaluate MODEL --eval passkey --set lengths=[1024,2048] --set trials=10
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from longreach.evaluation.base import Background, Cell, Column, Count, EvalChoices, Evaluation, Proportion, Result
from longreach.evaluation.scores import EvalScores, Row, gathered, retrieval_row
from longreach.infra.lazy import lazy_module

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from longreach.evaluation.blocks import Figure
    from longreach.evaluation.figures import Style
    from longreach.evaluation.reader import Reader
else:
    np = lazy_module("numpy")

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
SENTENCES = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
QUESTION = "What is the pass key? The pass key is"
KEYS = (1, 50_000)
"""Range of the key (upper end excluded), as in LongLoRA's script."""


class Passkey(Evaluation):
    """Does the model find a number that is hidden among filler sentences?"""

    name = "passkey"
    title = "Passkey"
    gate = ("passkey", "effective_length")

    class Choices(EvalChoices):
        """A key from 1 to 49,999 hidden in filler sentences (LongLoRA, section 4.2; 2305.16300)."""

        lengths: tuple[Count, ...] = Field(default=(1024, 2048, 4096), min_length=1)
        """Prompt lengths in tokens."""
        depths: tuple[Proportion, ...] = Field(default=(0.1, 0.5, 0.9), min_length=1)
        """Depths of the key, as shares of the filler sentences: 0 is the beginning, 1 the end."""
        trials: int = Field(default=1, ge=1)
        """Number of keys to try for each length and depth."""

    choices: Choices

    def cells(self) -> list[Cell]:
        """Return a cell for each length and trial. A cell has all depths, because their prompts share
        a prefix.

        Raises:
            ValueError: a length is too short for the prompt, or too long for the model.
        """
        for length in self.choices.lengths:
            self.check_reach(f"{fit_prompt(self.tokenizer, length, 0.5, KEYS[1] - 1)} {KEYS[1] - 1}", -1)
        cells: list[Cell] = []
        for length in self.choices.lengths:
            for trial in range(self.choices.trials):
                cells.append({"length": length, "trial": trial})
        return cells

    def measure(self, cell: Cell) -> Result:
        """Return {"cases": one for each depth}.

        A case's key depends only on the seed, its length, depth and trial, so extending a grid does
        not change the existing cases.
        """
        from longreach.evaluation.reader import Reader

        reader = Reader(self.model, self.tokenizer)
        cases = []
        for depth in sorted(self.choices.depths):
            key = draw_key(self.choices.seed, cell["length"], depth, cell["trial"])
            prompt = fit_prompt(self.tokenizer, cell["length"], depth, key)
            place = {"length": cell["length"], "depth": depth, "trial": cell["trial"]}
            cases.append(place | ask(reader, prompt, f" {key}", f"passkey {place}"))
        return {"cases": cases}

    @classmethod
    def scores(cls, choices: Choices, results: list[tuple[Cell, Result]]) -> EvalScores:
        """Return rows of kind `length` and `cell` (length x depth): accuracy with Wilson's 95%
        interval, and NLL in nats per token of the key."""
        cases = gathered(results, "cases")
        totals = []
        cells = []
        for length in choices.lengths:
            of_length = [case for case in cases if case["length"] == length]
            totals.append(retrieval_row("length", of_length, length, None))
            for depth in choices.depths:
                of_depth = [case for case in of_length if case["depth"] == depth]
                cells.append(retrieval_row("cell", of_depth, length, depth))
        accuracies = {f"passkey_{row['length']}": row["accuracy"] for row in totals}
        nlls = {f"passkey_nll_{row['length']}": row["nll"] for row in totals}
        return EvalScores(
            eval=cls.name,
            protocol="teacher-forced: every token of the key is the argmax (equal to greedy decoding); "
            "no chat template",
            recipe=choices.model_dump(mode="json"),
            rows=totals + cells,
            summary=accuracies | nlls,
            note="Synthetic and easy: failing it says more than passing it.",
            cases=cases,
        )

    @classmethod
    def figures(cls, models: dict[str, EvalScores], style: Style, background: Background) -> list[Figure]:
        """Return grids of the answer's NLL, by model and length and by depth and length."""
        from longreach.evaluation.sections import retrieval_figures

        return retrieval_figures(cls.name, "Is the hidden key found?", models)

    @classmethod
    def columns(cls, models: dict[str, EvalScores]) -> list[Column]:
        """Return a column for each length: keys found out of keys tried."""
        columns: dict[int, dict[str, tuple[float, str]]] = {}
        for name, scores in models.items():
            for row in scores.rows_with(kind="length"):
                text = f"{row['correct']}/{row['trials']}"
                columns.setdefault(row["length"], {})[name] = (row["correct"], text)
        return [Column("passkey by prompt length", f"{length:,}", columns[length]) for length in sorted(columns)]


def draw_key(seed: int, length: int, depth: float, trial: int) -> int:
    """Return a case's key, from 1 to 49,999."""
    chance = np.random.default_rng([seed, length, round(depth * 1_000_000), trial])
    return int(chance.integers(*KEYS))


def prompt_text(sentences: int, depth: float, key: int) -> str:
    """Return the prompt with this many filler sentences, and the key after the share `depth` of
    them."""
    filler = [SENTENCES[n % len(SENTENCES)] for n in range(sentences)]
    cut = round(depth * sentences)
    info = f"The pass key is {key}. Remember it. {key} is the pass key."
    parts = [TASK, " ".join(filler[:cut]), info, " ".join(filler[cut:]), QUESTION]
    return "\n".join(filter(None, parts))


def fit_prompt(tokenizer: PreTrainedTokenizerBase, length: int, depth: float, key: int) -> str:
    """Return the longest prompt of at most `length` tokens, special tokens included.

    Raises:
        ValueError: the prompt is too long even without any filler.
    """

    def tokens(sentences: int) -> int:
        return len(tokenizer(prompt_text(sentences, depth, key)).input_ids)

    least = tokens(0)
    if least > length:
        raise ValueError(
            f"passkey length {length}: the prompt has {least} tokens even without any filler; use a longer length"
        )
    per_sentence = (tokens(100) - least) / 100
    sentences = int((length - least) / per_sentence)
    while tokens(sentences) > length:
        sentences -= 1
    while tokens(sentences + 1) <= length:
        sentences += 1
    return prompt_text(sentences, depth, key)


def ask(reader: Reader, prompt: str, answer: str, where: str) -> Row:
    """Return one case: whether greedy decoding would continue `prompt` with `answer`.

    Raises:
        ValueError: the tokenizer joins prompt and answer (see `spelled`).
    """
    from longreach.evaluation.reader import spelled

    prompt_ids, answer_ids = spelled(reader.tokenizer, prompt, answer, where)
    answered = reader.answer(prompt_ids, answer_ids, where)
    return {
        "prompt_tokens": len(prompt_ids),
        "prompt": prompt,
        "expected": answer.strip(),
    } | answered.as_row()
