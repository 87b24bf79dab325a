"""Passkey retrieval: a random number hidden in filler sentences, asked for at the end (2305.16300; LongLoRA, 4.2).

Scored by one teacher-forced pass instead of by generation: prompt and key go in together, the head runs on the key's
positions alone. Greedy decoding emits the key's tokens if and only if each of them is the argmax given the prompt and
the key's tokens before it; by induction the two agree exactly on `correct`. (Past its first wrong token `got` is not
what generation would say.) As in LongLoRA's script, what the model would write after the key does not count. The mean
NLL of the key's tokens is finer than right or wrong: it moves long before the first key is found.

The prompt is plain text that ends with "The pass key is"; no chat template is used, whether or not the model has one.

    longreach evaluate MODEL --eval passkey --set lengths=[1024,2048] --set trials=10
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.documents import Document, Progress, silent
from evaluation.figures import new_axes
from evaluation.recipe import PasskeyRecipe
from evaluation.scores import EvalScores, wilson

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SENTENCES = [sentence + "." for sentence in FILLER.rstrip(".").split(". ")]
QUESTION = "What is the pass key? The pass key is"
KEYS = (1, 50_000)
"""The key's range, half open, as in LongLoRA's script."""


def passkey(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    recipe: PasskeyRecipe,
    documents: Iterable[Document] = (),
    progress: Progress = silent,
) -> EvalScores:
    """Rows of kind `cell` (length x depth) and `length`; accuracy with Wilson's interval, NLL in nats per key token.

    A cell's keys depend on the seed, its length and its depth alone, so that a grid can grow without changing.
    `documents` are not read. Raises ValueError for a length that cannot hold the prompt, FloatingPointError for logits
    that are not finite.
    """
    grid = [(n, d, t) for n in recipe.lengths for d in recipe.depths for t in range(recipe.trials)]
    cases = []
    for done, (length, depth, trial) in enumerate(grid):
        progress(done, len(grid))
        key = draw_key(recipe.seed, length, depth, trial)
        prompt = fit_prompt(tokenizer, length, depth, key)
        place = {"length": length, "depth": depth, "trial": trial}
        cases.append(place | ask(model, tokenizer, prompt, f" {key}", str(place)))
    progress(len(grid), len(grid))
    rows = [
        row("cell", length, depth, [c for c in cases if (c["length"], c["depth"]) == (length, depth)])
        for length in recipe.lengths
        for depth in recipe.depths
    ]
    totals = [row("length", length, None, [c for c in cases if c["length"] == length]) for length in recipe.lengths]
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


@torch.inference_mode()
def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, where: str
) -> dict[str, Any]:
    """One teacher-forced pass: is `answer` what greedy decoding would continue `prompt` with?

    ValueError where the tokenizer joins the prompt's end and the answer's beginning into one token: then no
    continuation of the prompt's tokens spells the answer.
    """
    prompt_ids, ids = tokenizer(prompt).input_ids, tokenizer(prompt + answer).input_ids
    if ids[: len(prompt_ids)] != prompt_ids or len(ids) == len(prompt_ids):
        raise ValueError(f"{where}: the tokenizer joins {prompt[-8:]!r} and {answer!r} into one token")
    expected_A = torch.tensor(ids[len(prompt_ids) :], device=model.device)
    x_1T = torch.tensor([ids[:-1]], device=model.device)
    logits_AV = model(input_ids=x_1T, use_cache=False, logits_to_keep=len(expected_A)).logits[0].float()
    if not torch.isfinite(nll_A := torch.nn.functional.cross_entropy(logits_AV, expected_A, reduction="none")).all():
        raise FloatingPointError(f"passkey {where}: the logits of the key's tokens are not finite; check the weights")
    got_A = logits_AV.argmax(-1)
    return {
        "prompt_tokens": len(prompt_ids),
        "prompt_head": prompt[:200],
        "prompt_tail": prompt[-200:],
        "expected": answer.strip(),
        "got": str(tokenizer.decode(got_A)).strip(),
        "correct": bool((got_A == expected_A).all()),
        "token_accuracy": float((got_A == expected_A).double().mean()),
        "nll": float(nll_A.double().mean()),
    }


def row(kind: str, length: int, depth: float | None, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of some cases."""
    correct = sum(case["correct"] for case in cases)
    low, high = wilson(correct, len(cases))
    return {
        "kind": kind,
        "protocol": "teacher_forced",
        "length": length,
        "depth": depth,
        "trials": len(cases),
        "correct": correct,
        "accuracy": correct / len(cases),
        "accuracy_low": low,
        "accuracy_high": high,
        "token_accuracy": float(np.mean([case["token_accuracy"] for case in cases])),
        "nll": float(np.mean([case["nll"] for case in cases])),
    }


def figure(scores: EvalScores) -> Figure:
    """Length x depth: colour and first line are the key's mean NLL, the second line is how many were found."""
    lengths, depths = scores.recipe["lengths"], scores.recipe["depths"]
    cell = {(r["length"], r["depth"]): r for r in scores.rows if r["kind"] == "cell"}
    fig, axes = new_axes(
        f"{scores.model}: is the pass key found, wherever it stands?\n(bright: certain, 0 nats; dark: a guess)",
        "prompt length (tokens)",
        "depth of the key (0 first, 1 last)",
    )
    nll = np.array([[cell[n, d]["nll"] for n in lengths] for d in depths])
    image = axes.imshow(nll, aspect="auto", cmap="cividis_r", vmin=0, vmax=max(4.0, nll.max()))
    axes.grid(visible=False)
    axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{d:g}" for d in depths])
    for y, depth in enumerate(depths):
        for x, length in enumerate(lengths):
            here = cell[length, depth]
            text = f"{here['nll']:.2f} nats\n{here['correct']}/{here['trials']} found"
            axes.text(x, y, text, ha="center", va="center", color="white" if here["nll"] > nll.max() / 2 else "black")
    fig.colorbar(image, label="mean NLL of the key (nats per token)")
    return fig
