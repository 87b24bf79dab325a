"""Needle in a haystack: a fact about an invented town, put into real text, asked for at the end (gkamradt's test).

The haystack is the recipe's own held-out text, whole tokens of it, so that a prompt has exactly the asked length. The
needle goes in where a sentence ends, at a depth from 0 (first) to 1 (the very end). Towns and numbers are drawn anew
for each haystack: nothing can be known by heart, and the answer is right or wrong, with no judge. Two ways of scoring:

  teacher-forced   is every token of the answer the argmax (evaluation/reader.py); the finest on small models
  generation       greedy text of `new_tokens` tokens, or as many as the answer has; is the needle's number in it?

Several needles (`needles`) start at the depth and stand evenly spread behind it, and all are asked for; `distractors`
are facts about other towns, drawn into the text away from the tested depths. A model with a chat template is asked in
it, unless told not.

    longreach evaluate MODEL --eval needle --set lengths=[1024,4096] --set depths=[0,0.5,1]
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longreach.evaluation.documents import Document, matching, text_ids
from longreach.evaluation.figures import retrieval_figure
from longreach.evaluation.likelihood import is_dynamic
from longreach.evaluation.reader import Reader, spelled
from longreach.evaluation.recipe import NeedleRecipe
from longreach.evaluation.scores import EvalScores, effective_length, retrieval_row, wilson

TASK = "Read the text below. Somewhere in it a magic number of a town is mentioned; remember it.\n\n"
FACT = " The magic number of {town} is {number}."
QUESTION = "\n\nWhat is the magic number of {town}?"
ANSWER = "The magic number of {town} is"
QUESTIONS = "\n\nWhat are the magic numbers of {town}?"
ANSWERS = "The magic numbers of {town} are"
STARTS = (
    "Bran",
    "Cal",
    "Dor",
    "El",
    "Fen",
    "Gar",
    "Hol",
    "Ist",
    "Jor",
    "Kel",
    "Lor",
    "Mar",
    "Nor",
    "Os",
    "Pel",
    "Quin",
)
ENDS = ("dale", "ford", "gate", "ham", "mere", "mouth", "stead", "wick")
EFFECTIVE = 0.85
"""RULER's bar for an effective length, about Llama-2-7B's score at 4,096 tokens (2404.06654)."""


def cells(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, recipe: NeedleRecipe, documents: list[Document]
) -> list[dict[str, Any]]:
    """One for each length and trial, with all depths, as their prompts begin alike.

    Raises ValueError for a length that the text does not fill or that cannot hold the question, and where a chat
    template is required but missing.
    """
    if recipe.chat_template == "always" and not tokenizer.chat_template:
        raise ValueError("needle.chat_template is 'always', but the model has no chat template: use 'auto' or 'never'")
    text = haystack(recipe, documents)
    for length, trial in itertools.product(recipe.lengths, range(recipe.trials)):
        prompt = Prompt.draw(tokenizer, recipe, length, 0.0, trial)
        if (room := length - prompt.fixed) < 1:
            raise ValueError(
                f"needle length {length}: question and needles alone have {prompt.fixed} tokens; use a longer one"
            )
        if room > len(text):
            raise ValueError(
                f"needle length {length} needs {room} tokens of text, the chosen documents have {len(text)}: "
                f"lower the length or choose more documents"
            )
    return [{"length": length, "trial": trial} for length in recipe.lengths for trial in range(recipe.trials)]


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    recipe: NeedleRecipe,
    documents: list[Document],
    cell: dict[str, Any],
) -> dict[str, Any]:
    """{"cases": one for each depth, "read_tokens", "prompt_tokens", "claimed": the model's context}; FloatingPointError
    for logits that are not finite."""
    text, ends = haystack(recipe, documents), sentence_ends(tokenizer)
    reader, cases, read, total = Reader(model, tokenizer), [], 0, 0
    for depth in recipe.every_depth():
        prompt = Prompt.draw(tokenizer, recipe, cell["length"], depth, cell["trial"])
        ids = prompt.around(text, ends, recipe.seed + cell["trial"])
        place = {"length": cell["length"], "depth": depth, "trial": cell["trial"]}
        room = max(recipe.new_tokens, len(prompt.answer)) if recipe.new_tokens else 0
        found = reader.answer(ids, prompt.answer, f"needle {place}", new_tokens=room)
        read, total = read + found.read_tokens, total + len(ids)
        said = [number for number in prompt.numbers if re.search(rf"(?<!\d){number}(?!\d)", found.got)]
        cases.append(
            place
            | {"prompt_tokens": len(ids), "prompt": str(tokenizer.decode(ids)), "expected": ", ".join(prompt.numbers)}
            | found.as_row()
            | ({"recall": len(said) / len(prompt.numbers)} if recipe.new_tokens else {})
        )
    claimed = getattr(model.config, "max_position_embeddings", None)  # some have no such limit
    if claimed and is_dynamic(model):
        claimed = round(claimed * model.config.rope_parameters.get("factor", 1))
    return {"cases": cases, "read_tokens": read, "prompt_tokens": total, "claimed": claimed}


def collect(recipe: NeedleRecipe, results: list[tuple[dict[str, Any], dict[str, Any]]]) -> EvalScores:
    """Rows of kind `cell` (length x depth) and `length`; summary with the effective length (EFFECTIVE)."""
    cases = [case for _, result in results for case in result["cases"]]

    def row(kind: str, length: int, depth: float | None) -> dict[str, Any]:
        here = [c for c in cases if c["length"] == length and depth in (None, c["depth"])]
        found = retrieval_row(kind, here, length, depth)
        if recipe.new_tokens:
            complete = sum(case["recall"] == 1 for case in here)
            low, high = wilson(complete, len(here))
            found |= {"recall": float(np.mean([case["recall"] for case in here])), "complete": complete}
            found |= {"complete_low": low, "complete_high": high}
        return found

    totals = [row("length", length, None) for length in recipe.lengths]
    claimed = {"needle_claimed_length": float(results[0][1]["claimed"])} if results[0][1]["claimed"] else {}
    read, asked = (sum(result[key] for _, result in results) for key in ("read_tokens", "prompt_tokens"))
    generated = {f"needle_recall_{r['length']}": r["recall"] for r in totals if "recall" in r}
    return EvalScores(
        eval="needle",
        protocol=f"{recipe.needles} needles, {recipe.distractors} distractors; `correct`: teacher-forced, every token "
        "of the answer is the argmax; `recall`: share of the numbers in the greedy answer",
        recipe=recipe.model_dump(mode="json"),
        rows=totals + [row("cell", length, depth) for length in recipe.lengths for depth in recipe.every_depth()],
        summary={f"needle_{r['length']}": r["accuracy"] for r in totals}
        | {f"needle_nll_{r['length']}": r["nll"] for r in totals}
        | generated
        | {"needle_effective_length": effective_length(totals, EFFECTIVE)}
        | claimed
        | {"needle_tokens_read": read / asked},
        note="Finding a sentence that stands out is the least that a long context is for.",
        cases=cases,
    )


class Prompt:
    """One case, in tokens: what stands before and after the haystack, what goes into it, and what is expected."""

    def __init__(
        self, before: list[int], after: list[int], needles: list[list[int]], distractors: list[list[int]],
        numbers: list[str], answer: list[int], length: int, depth: float, elsewhere: list[float],
    ) -> None:  # fmt: skip
        self.before, self.after, self.needles, self.distractors = before, after, needles, distractors
        self.numbers, self.answer, self.length, self.depth = numbers, answer, length, depth
        self.elsewhere = elsewhere
        self.fixed = len(before) + len(after) + sum(map(len, [*needles, *distractors]))
        """Tokens that are no haystack."""

    @classmethod
    def draw(
        cls, tokenizer: PreTrainedTokenizerBase, recipe: NeedleRecipe, length: int, depth: float, trial: int
    ) -> Prompt:
        """The case of a place in the grid. Towns and numbers depend on seed, length and trial, not on the depth: so all
        depths have one haystack, and a grid can grow without changing."""
        chance = np.random.default_rng([recipe.seed, length, trial])
        drawn = chance.choice(len(STARTS) * len(ENDS), recipe.needles + recipe.distractors, replace=False)
        towns = [STARTS[n % len(STARTS)] + ENDS[n // len(STARTS)] for n in drawn]
        numbers = [str(n) for n in chance.integers(10_000, 100_000, len(towns))]

        def ids(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False).input_ids)

        facts = [ids(FACT.format(town=t, number=n)) for t, n in zip(towns, numbers, strict=True)]
        asked, question, opening = towns[: recipe.needles], QUESTION, ANSWER
        if recipe.needles > 1:
            question, opening = QUESTIONS, ANSWERS
        names = " and ".join(filter(None, [", ".join(asked[:-1]), asked[-1]]))
        head, tail = around_chat(
            tokenizer, TASK, question.format(town=names), opening.format(town=names), recipe.chat_template
        )
        before = text_ids(tokenizer, head)
        answer = " " + " and ".join(
            filter(None, [", ".join(numbers[: recipe.needles - 1]), numbers[recipe.needles - 1]])
        )
        needles, others = facts[: recipe.needles], facts[recipe.needles :]
        elsewhere = [away_from(recipe.every_depth(), chance) for _ in others]
        after, expected = spelled(tokenizer, tail, answer, "needle", special=False)
        return cls(before, after, needles, others, numbers[: recipe.needles], expected, length, depth, elsewhere)

    def around(self, text: np.ndarray, ends: set[int], seed: int) -> list[int]:
        """The prompt's ids, exactly `length` of them: text from a start drawn with `seed`, facts at sentence ends."""
        room = self.length - self.fixed
        start = int(np.random.default_rng(seed).integers(0, max(1, len(text) - self.length + 1)))
        hay = text[start : start + room].tolist()
        share = [self.depth + (1 - self.depth) * n / len(self.needles) for n in range(len(self.needles))]
        places = [(at, fact) for at, fact in zip(share, self.needles, strict=True)]
        places += zip(self.elsewhere, self.distractors, strict=True)
        inserts = sorted(((sentence_end(hay, at, ends), fact) for at, fact in places), key=lambda one: one[0])
        ids, last = list(self.before), 0
        for at, fact in inserts:
            ids += hay[last:at] + fact
            last = at
        return ids + hay[last:] + self.after


def away_from(depths: list[float], chance: np.random.Generator) -> float:
    """A place in a text, as far from the tested depths as the middle half of the gaps between them."""
    edges = sorted({0.0, *depths, 1.0})
    gaps = list(itertools.pairwise(edges))
    left, right = gaps[int(chance.choice(len(gaps), p=[b - a for a, b in gaps]))]
    return left + (right - left) * float(chance.uniform(0.25, 0.75))


def around_chat(
    tokenizer: PreTrainedTokenizerBase, task: str, question: str, opening: str, chat: str
) -> tuple[str, str]:
    """(what stands before a text, what stands after it): as a chat if the model has a template for one."""
    if chat == "never" or not tokenizer.chat_template:
        return task, f"{question}\n{opening}"
    mark = "\u2063text\u2063"
    messages = [{"role": "user", "content": f"{task}{mark}{question}"}]
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    before, found, after = whole.partition(mark)
    if not found:
        raise ValueError("the model's chat template changes the user's text: set chat_template 'never'")
    return before, after + opening


def haystack(recipe: NeedleRecipe, documents: list[Document]) -> np.ndarray:
    """The chosen documents, one after the other."""
    return np.concatenate([document.ids_T for document in matching(documents, recipe.documents)])


def sentence_ends(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of tokens that end a sentence."""
    ids = sorted(tokenizer.get_vocab().values())
    texts = tokenizer.batch_decode([[n] for n in ids])  # a byte-level vocabulary spells a Chinese full stop otherwise
    return {n for n, text in zip(ids, texts, strict=True) if text.rstrip("\n")[-1:] in (*".!?。！？",)}


def sentence_end(hay: list[int], depth: float, ends: set[int]) -> int:
    """Where to insert: after the last sentence end at or before the share `depth` of the text, else before all of it;
    a text without any sentence end is cut where it is."""
    at = round(depth * len(hay))
    if ends.isdisjoint(hay):
        return at
    while 0 < at < len(hay) and hay[at - 1] not in ends:
        at -= 1
    return at


def figure(scores: EvalScores) -> Any:
    """Length x depth, as gkamradt's."""
    question = [
        f"{scores.model}: is the needle found, however long the haystack is?",
        "NLL of the answer in nats a token, and how many of the answers were found; bright: certain, dark: a guess",
    ]
    return retrieval_figure(scores, question, "prompt length (tokens)", "depth (0 first, 1 last)", "length", "depth")
