"""Needle in a haystack: a fact about an invented town is inserted into real text and asked for at
the end (gkamradt's test).

The haystack is the recipe's own held-out text, cut by tokens, so a prompt has exactly the wanted
length. The needle is inserted at the end of a sentence, at a depth from 0 (the beginning) to 1 (the
end). Towns and numbers are drawn anew for each haystack, so no answer can be memorised, and an
answer is right or wrong without a judge. There are two ways of scoring:

  teacher-forced   whether every token of the answer is the argmax (evaluation/reader.py); finer on small models
  generation       whether the needle's number is in the greedy text of `new_tokens` tokens (at least as many as the
                   answer has)

Several needles (`needles`) are spread evenly from the depth to the end, and all are asked for.
`distractors` are facts about other towns, inserted at random away from the tested depths. If a
model has a chat template, the question is asked in it, unless the recipe forbids it.

    longreach evaluate MODEL --eval needle --set lengths=[1024,4096] --set depths=[0,0.5,1]
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from longreach.evaluation.base import (
    Background,
    Cell,
    Count,
    DocumentNames,
    EvalChoices,
    Evaluation,
    Proportion,
    Result,
)
from longreach.evaluation.documents import MARK, chat_around, matching, text_ids
from longreach.evaluation.scores import (
    RULER_THRESHOLD,
    EvalScores,
    Row,
    effective_length,
    gathered,
    mean_of,
    retrieval_row,
    wilson_over_texts,
)
from longreach.infra.lazy import lazy_module

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from longreach.evaluation.blocks import Figure
    from longreach.evaluation.figures import Style
    from longreach.evaluation.reader import Reader
else:
    np = lazy_module("numpy")

TASK = "Read the text below. Somewhere in it a magic number of a town is mentioned; remember it.\n\n"
FACT = " The magic number of {town} is {number}."
QUESTION = "\n\nWhat is the magic number of {town}?"
ANSWER = "The magic number of {town} is"
QUESTIONS = "\n\nWhat are the magic numbers of {town}?"
ANSWERS = "The magic numbers of {town} are"
STARTS = (
    "Bran", "Cal", "Dor", "El", "Fen", "Gar", "Hol", "Ist",
    "Jor", "Kel", "Lor", "Mar", "Nor", "Os", "Pel", "Quin",
)  # fmt: skip
ENDS = ("dale", "ford", "gate", "ham", "mere", "mouth", "stead", "wick")


class Needle(Evaluation):
    """Does the model find a fact that is hidden in a real text?"""

    name = "needle"
    title = "Needle in a haystack"
    revision = 2

    class Choices(EvalChoices):
        """A fact inserted into held-out text and asked for at the end (needle in a haystack,
        gkamradt)."""

        lengths: tuple[Count, ...] = Field(default=(1024, 2048, 4096), min_length=1)
        """Prompt lengths in tokens."""
        depths: tuple[Proportion, ...] = ()
        """Depths of the needle, as shares of the haystack: 0 is the beginning, 1 the end. Default:
        depth_points depths."""
        depth_points: int = Field(default=5, ge=2)
        """Number of depths from 0 to 1, if `depths` is not set."""
        depth_curve: Literal["linear", "sigmoid"] = "linear"
        """Spacing of the depth_points depths: even (linear), or denser at both ends (sigmoid)."""
        needles: int = Field(default=1, ge=1, le=8)
        """Number of facts that are asked for. The first is at the depth; the others are spread
        evenly after it."""
        distractors: int = Field(default=0, ge=0, le=64)
        """Number of facts about other towns, inserted at random away from the tested depths."""
        trials: int = Field(default=1, ge=1)
        """Number of haystacks for each length."""
        documents: DocumentNames = Field(default=("*",), min_length=1)
        """Names (shell patterns) of the held-out documents that make up the haystack."""
        new_tokens: int = Field(default=0, ge=0)
        """Number of tokens to generate as well, to look for the numbers in them (at least the length
        of the answer); 0: score teacher-forced only."""
        chat_template: Literal["auto", "always", "never"] = "auto"
        """Whether to ask in the model's chat template: `auto` if it has one, `always` (fail if it
        has none), or `never`."""

        def every_depth(self) -> list[float]:
            """Return the depths in ascending order."""
            if self.depths:
                return sorted(self.depths)
            depths = []
            for n in range(self.depth_points):
                depth = n / (self.depth_points - 1)
                if self.depth_curve == "sigmoid":
                    depth = 1 / (1 + math.exp(-10 * (depth - 0.5)))
                depths.append(round(depth, 4))
            return depths

    choices: Choices

    def cells(self) -> list[Cell]:
        """Return a cell for each length and trial. A cell has all depths, because their prompts share
        a prefix.

        Raises:
            ValueError: a length is too short for the question, too long for the model or longer than
                the text, or a chat template is required but missing.
        """
        choices = self.choices
        if choices.chat_template == "always" and not self.tokenizer.chat_template:
            raise ValueError(
                "needle.chat_template is 'always', but the model has no chat template: use 'auto' or 'never'"
            )
        text_tokens = len(self._haystack())
        cells = []
        for length, trial in itertools.product(choices.lengths, range(choices.trials)):
            prompt = Prompt.draw(self.tokenizer, choices, length, 0.0, trial)
            self.check_reach(length, max(choices.new_tokens, len(prompt.answer)) - 1)
            room = length - prompt.fixed_tokens
            if room < 1:
                raise ValueError(
                    f"needle length {length}: question and facts alone have {prompt.fixed_tokens} tokens; "
                    f"use a longer length"
                )
            if room > text_tokens:
                raise ValueError(
                    f"needle length {length} needs {room} tokens of text, but the chosen documents have {text_tokens}: "
                    f"lower the length or choose more documents"
                )
            cells.append({"length": length, "trial": trial})
        return cells

    def measure(self, cell: Cell) -> Result:
        """Return {"cases": one for each depth, "read_tokens", "prompt_tokens", "claimed": the context
        length that the model claims}."""
        from longreach.evaluation.reader import Reader

        text = self._haystack()
        ends = sentence_ends(self.tokenizer)
        reader = Reader(self.model, self.tokenizer)
        cases = []
        read_tokens = prompt_tokens = 0
        for depth in self.choices.every_depth():
            prompt = Prompt.draw(self.tokenizer, self.choices, cell["length"], depth, cell["trial"])
            # the last number separates this random stream from that of towns and numbers
            chance = np.random.default_rng([self.choices.seed, cell["length"], cell["trial"], 1])
            ids = prompt.around(text, ends, chance)
            place = {"length": cell["length"], "depth": depth, "trial": cell["trial"]}
            case, read = self._ask(reader, prompt, ids, place)
            cases.append(case)
            read_tokens += read
            prompt_tokens += len(ids)
        return {
            "cases": cases,
            "read_tokens": read_tokens,
            "prompt_tokens": prompt_tokens,
            "claimed": claimed_length(self.model),
        }

    def _haystack(self) -> np.ndarray:
        """Return the tokens of the chosen documents, one after the other."""
        return np.concatenate([document.ids_T for document in matching(self.documents, self.choices.documents)])

    def _ask(self, reader: Reader, prompt: Prompt, ids: list[int], place: Row) -> tuple[Row, int]:
        """Return one case, and the number of tokens that had to be read for it."""
        new_tokens = self.choices.new_tokens
        if new_tokens:
            new_tokens = max(new_tokens, len(prompt.answer))
        answered = reader.answer(ids, prompt.answer, f"needle {place}", new_tokens=new_tokens)
        case = place | {
            "prompt_tokens": len(ids),
            "prompt": str(self.tokenizer.decode(ids)),
            "expected": ", ".join(prompt.numbers),
        }
        case |= answered.as_row()
        if new_tokens:
            given = 0
            for number in prompt.numbers:
                if re.search(rf"(?<!\d){number}(?!\d)", answered.got):
                    given += 1
            case["recall"] = given / len(prompt.numbers)
        return case, answered.read_tokens

    @classmethod
    def scores(cls, choices: Choices, results: list[tuple[Cell, Result]]) -> EvalScores:
        """Return rows of kind `length` and `cell` (length x depth). The summary has the effective
        length."""
        cases = gathered(results, "cases")
        totals = []
        cells = []
        for length in choices.lengths:
            of_length = [case for case in cases if case["length"] == length]
            totals.append(_row("length", of_length, length, None))
            for depth in choices.every_depth():
                of_depth = [case for case in of_length if case["depth"] == depth]
                cells.append(_row("cell", of_depth, length, depth))
        summary = {f"needle_{row['length']}": row["accuracy"] for row in totals}
        summary |= {f"needle_nll_{row['length']}": row["nll"] for row in totals}
        if choices.new_tokens:
            summary |= {f"needle_recall_{row['length']}": row["recall"] for row in totals}
        summary["needle_effective_length"] = effective_length(totals, RULER_THRESHOLD)
        claimed = results[0][1]["claimed"]
        if claimed:
            summary["needle_claimed_length"] = float(claimed)
        summary["needle_tokens_read"] = share_read(results)
        return EvalScores(
            eval=cls.name,
            protocol=f"{choices.needles} needles, {choices.distractors} distractors; `correct`: teacher-forced, every "
            "token of the answer is the argmax; `recall`: share of the numbers in the greedy answer",
            recipe=choices.model_dump(mode="json"),
            rows=totals + cells,
            summary=summary,
            note="Finding a sentence that stands out is the least that a long context is for.",
            cases=cases,
        )

    @classmethod
    def figures(cls, models: dict[str, EvalScores], style: Style, background: Background) -> list[Figure]:
        """Return grids of the answer's NLL, by model and length and by depth and length."""
        from longreach.evaluation.sections import retrieval_figures

        return retrieval_figures(cls.name, "Is the needle found?", models)


def _row(kind: str, cases: list[Row], length: int, depth: float | None) -> Row:
    """Return the mean of cases with intervals over texts, because each text is asked at every depth.
    If text was generated, include the share of the numbers found in it."""
    row = retrieval_row(kind, cases, length, depth, over_texts=True)
    if "recall" in cases[0]:
        complete = [case["recall"] == 1 for case in cases]
        low, high = wilson_over_texts(cases, complete)
        row |= {"recall": mean_of(cases, "recall"), "complete": sum(complete)}
        row |= {"complete_low": low, "complete_high": high}
    return row


def share_read(results: list[tuple[Cell, Result]]) -> float:
    """Return the share of the prompts' tokens that were read. A prefix that a prompt shares with the
    one before it is not read again."""
    read_tokens = prompt_tokens = 0
    for _, result in results:
        read_tokens += result["read_tokens"]
        prompt_tokens += result["prompt_tokens"]
    return read_tokens / prompt_tokens


def claimed_length(model: PreTrainedModel) -> int | None:
    """Return the context length that the model's config claims, in tokens; None if it states no
    limit."""
    claimed = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    if claimed and rope.get("rope_type") == "dynamic":  # other types, longrope too, state the stretched length
        claimed = round(claimed * rope.get("factor", 1))
    return claimed


@dataclass(frozen=True)
class Prompt:
    """One question without its haystack: the token ids before and after the haystack, and of the
    facts to insert into it."""

    before: list[int]
    after: list[int]
    needles: list[list[int]]
    """Token ids of the facts that are asked for."""
    distractors: list[list[int]]
    """Token ids of the facts about other towns."""
    distractor_depths: list[float]
    numbers: list[str]
    """The numbers that the needles state, in order."""
    answer: list[int]
    """Token ids of the expected answer."""
    length: int
    """Number of tokens of the prompt with its haystack."""
    depth: float
    """Depth of the first needle."""

    @property
    def fixed_tokens(self) -> int:
        """Number of tokens outside the haystack."""
        facts = sum(map(len, [*self.needles, *self.distractors]))
        return len(self.before) + len(self.after) + facts

    @classmethod
    def draw(
        cls, tokenizer: PreTrainedTokenizerBase, choices: Needle.Choices, length: int, depth: float, trial: int
    ) -> Prompt:
        """Draw the question for one cell of the grid.

        Towns and numbers depend on seed, length and trial, not on the depth. So all depths share one
        haystack, and extending a grid does not change the existing cases.
        """
        chance = np.random.default_rng([choices.seed, length, trial])
        count = choices.needles + choices.distractors
        towns = [town_name(n) for n in chance.choice(len(STARTS) * len(ENDS), count, replace=False)]
        numbers = list(map(str, chance.integers(10_000, 100_000, count)))
        depths = choices.every_depth()
        distractor_depths = [away_from(depths, chance) for _ in range(choices.distractors)]

        facts = []
        for town, number in zip(towns, numbers, strict=True):
            text = FACT.format(town=town, number=number)
            facts.append(list(tokenizer(text, add_special_tokens=False).input_ids))
        wanted_towns = listed(towns[: choices.needles])
        wanted_numbers = numbers[: choices.needles]
        question, opening = QUESTION, ANSWER
        if choices.needles > 1:
            question, opening = QUESTIONS, ANSWERS
        head, tail = question_around(
            tokenizer,
            question.format(town=wanted_towns),
            opening.format(town=wanted_towns),
            choices.chat_template,
        )

        from longreach.evaluation.reader import spelled

        after, answer = spelled(tokenizer, tail, f" {listed(wanted_numbers)}", "needle", special=False)
        return cls(
            before=text_ids(tokenizer, head),
            after=after,
            needles=facts[: choices.needles],
            distractors=facts[choices.needles :],
            distractor_depths=distractor_depths,
            numbers=wanted_numbers,
            answer=answer,
            length=length,
            depth=depth,
        )

    def around(self, text: np.ndarray, ends: set[int], chance: np.random.Generator) -> list[int]:
        """Return the prompt's ids, exactly `length` of them.

        Args:
            text: token ids from which the haystack is cut.
            ends: ids of tokens that end a sentence; facts are inserted after one of them.
            chance: draws the position in `text` at which the haystack begins.
        """
        last_start = len(text) - self.length
        start = int(chance.integers(0, max(1, last_start + 1)))
        haystack = text[start : start + self.length - self.fixed_tokens].tolist()
        inserts = []
        for n, fact in enumerate(self.needles):
            depth = self.depth + (1 - self.depth) * n / len(self.needles)
            inserts.append((sentence_end(haystack, depth, ends), fact))
        for depth, fact in zip(self.distractor_depths, self.distractors, strict=True):
            inserts.append((sentence_end(haystack, depth, ends), fact))
        ids = list(self.before)
        done = 0
        for at, fact in sorted(inserts, key=lambda insert: insert[0]):
            ids += haystack[done:at] + fact
            done = at
        return ids + haystack[done:] + self.after


def town_name(number: int) -> str:
    """Return one of the invented towns."""
    return STARTS[number % len(STARTS)] + ENDS[number // len(STARTS)]


def listed(words: list[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def away_from(depths: list[float], chance: np.random.Generator) -> float:
    """Draw a depth in the middle half of a gap between tested depths, with a probability
    proportional to the gap's width."""
    edges = sorted({0.0, *depths, 1.0})
    gaps = list(itertools.pairwise(edges))
    left, right = gaps[int(chance.choice(len(gaps), p=[end - start for start, end in gaps]))]
    return left + (right - left) * float(chance.uniform(0.25, 0.75))


def question_around(
    tokenizer: PreTrainedTokenizerBase, question: str, opening: str, chat_template: str
) -> tuple[str, str]:
    """Return the texts before and after the haystack, as a chat if the model has a chat template and
    it is not disabled."""
    if chat_template == "never" or not tokenizer.chat_template:
        return TASK, f"{question}\n{opening}"
    messages = [{"role": "user", "content": f"{TASK}{MARK}{question}"}]
    refusal = "the model's chat template changes the user's text: set chat_template 'never'"
    before, after = chat_around(tokenizer, messages, refusal=refusal)
    return before, after + opening


def sentence_ends(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of tokens that end a sentence."""
    ids = sorted(tokenizer.get_vocab().values())
    texts = tokenizer.batch_decode([[n] for n in ids])  # byte-level vocabularies do not contain "。" as such
    ends = set()
    for n, text in zip(ids, texts, strict=True):
        if text.rstrip("\n").endswith((".", "!", "?", "。", "！", "？")):
            ends.add(n)
    return ends


def sentence_end(haystack: list[int], depth: float, ends: set[int]) -> int:
    """Return the index at which to insert a fact.

    This is after the last end of a sentence at or before the share `depth` of the text, or 0 if
    there is none before it. Depth 1 is the end of the text. In a text without any end of a sentence,
    it is at the depth itself.
    """
    at = round(depth * len(haystack))
    if ends.isdisjoint(haystack):
        return at
    while 0 < at < len(haystack) and haystack[at - 1] not in ends:
        at -= 1
    return at
