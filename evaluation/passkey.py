"""Passkey retrieval: a random number hidden in filler sentences, asked for at the end (2305.16300; LongLoRA, 4.2).

Scored teacher-forced (evaluation/reader.py), which is equal to greedy decoding. As in LongLoRA's script, what the model
would write after the key does not count. The prompt is plain text that ends with "The pass key is"; no chat template is
used, whether or not the model has one.

    longreach evaluate MODEL --eval passkey --set lengths=[1024,2048] --set trials=10
"""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longreach.evaluation.documents import Document
from longreach.evaluation.figures import retrieval_figure
from longreach.evaluation.reader import Reader, spelled
from longreach.evaluation.recipe import PasskeyRecipe
from longreach.evaluation.scores import EvalScores, retrieval_row

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SENTENCES = [sentence + "." for sentence in FILLER.rstrip(".").split(". ")]
QUESTION = "What is the pass key? The pass key is"
KEYS = (1, 50_000)
"""The key's range, half open, as in LongLoRA's script."""


def cells(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, recipe: PasskeyRecipe, documents: list[Document]
) -> list[dict[str, Any]]:
    """One for each length and trial, with all depths, as their prompts begin alike. `documents` are not read.

    Raises ValueError for a length that cannot hold the prompt.
    """
    for length in recipe.lengths:
        fit_prompt(tokenizer, length, 0.5, KEYS[1] - 1)
    return [{"length": length, "trial": trial} for length in recipe.lengths for trial in range(recipe.trials)]


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    recipe: PasskeyRecipe,
    documents: list[Document],
    cell: dict[str, Any],
) -> dict[str, Any]:
    """{"cases": one for each depth}. A case's key depends on the seed, its length, depth and trial alone, so that a
    grid can grow without changing. Raises FloatingPointError for logits that are not finite."""
    reader, cases = Reader(model, tokenizer), []
    for depth in sorted(recipe.depths):
        key = draw_key(recipe.seed, cell["length"], depth, cell["trial"])
        prompt = fit_prompt(tokenizer, cell["length"], depth, key)
        place = {"length": cell["length"], "depth": depth, "trial": cell["trial"]}
        cases.append(place | ask(reader, prompt, f" {key}", f"passkey {place}"))
    return {"cases": cases}


def collect(recipe: PasskeyRecipe, results: list[tuple[dict[str, Any], dict[str, Any]]]) -> EvalScores:
    """Rows of kind `cell` (length x depth) and `length`; accuracy with Wilson's interval, NLL in nats per key token."""
    cases = [case for _, result in results for case in result["cases"]]
    rows = [
        retrieval_row("cell", [c for c in cases if (c["length"], c["depth"]) == (length, depth)], length, depth)
        for length in recipe.lengths
        for depth in recipe.depths
    ]
    totals = [retrieval_row("length", [c for c in cases if c["length"] == n], n, None) for n in recipe.lengths]
    return EvalScores(
        eval="passkey",
        protocol="teacher-forced: every token of the key is the argmax (equal to greedy decoding); no chat template",
        recipe=recipe.model_dump(mode="json"),
        rows=totals + rows,
        summary={f"passkey_{r['length']}": r["accuracy"] for r in totals}
        | {f"passkey_nll_{r['length']}": r["nll"] for r in totals},
        note="Synthetic and easy: failing it says more than passing it.",
        cases=cases,
    )


def draw_key(seed: int, length: int, depth: float, trial: int) -> int:
    """The cell's key, from 1 to 49,999."""
    return int(np.random.default_rng([seed, length, round(depth * 1_000_000), trial]).integers(*KEYS))


def prompt_text(sentences: int, depth: float, key: int) -> str:
    """The prompt with so many filler sentences, the key after the share `depth` of them."""
    filler = [SENTENCES[n % len(SENTENCES)] for n in range(sentences)]
    cut = round(depth * sentences)
    info = f"The pass key is {key}. Remember it. {key} is the pass key."
    parts = [TASK, " ".join(filler[:cut]), info, " ".join(filler[cut:]), QUESTION]
    return "\n".join(part for part in parts if part)


def fit_prompt(tokenizer: PreTrainedTokenizerBase, length: int, depth: float, key: int) -> str:
    """The longest such prompt of at most `length` tokens, special ones included."""

    def tokens(sentences: int) -> int:
        return len(tokenizer(prompt_text(sentences, depth, key)).input_ids)

    if (least := tokens(0)) > length:
        raise ValueError(f"passkey length {length}: the prompt alone has {least} tokens without any filler; use more")
    per_sentence = (tokens(100) - least) / 100
    sentences = int((length - least) / per_sentence)
    while tokens(sentences) > length:
        sentences -= 1
    while tokens(sentences + 1) <= length:
        sentences += 1
    return prompt_text(sentences, depth, key)


def ask(reader: Reader, prompt: str, answer: str, where: str) -> dict[str, Any]:
    """One case: is `answer` what greedy decoding would continue `prompt` with? ValueError as `spelled`."""
    prompt_ids, answer_ids = spelled(reader.tokenizer, prompt, answer, where)
    found = reader.answer(prompt_ids, answer_ids, where)
    asked = {"prompt_tokens": len(prompt_ids), "prompt": prompt, "expected": answer.strip()}
    return asked | found.as_row()


def figure(scores: EvalScores) -> Any:
    """Length x depth: colour and first line are the key's mean NLL, the second line is how many were found."""
    question = [
        f"{scores.model}: is the pass key found, wherever it stands?",
        "NLL of the answer in nats a token, and how many of the answers were found; bright: certain, dark: a guess",
    ]
    return retrieval_figure(scores, question, "prompt length (tokens)", "depth (0 first, 1 last)", "length", "depth")
