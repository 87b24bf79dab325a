"""RULER: what is found, followed, counted and answered in a long text (Hsieh et al.,
arXiv:2404.06654), offline and from a seed.

Each task (evaluation/ruler_tasks.py) is fitted into the wanted length in the model's own tokens,
which, as in RULER, holds the answer too. The haystack is the recipe's own held-out text or RULER's
noise. Answers are generated greedily and scored by RULER's rules: the share of the expected strings
that stand in the answer, or for `qa` whether one does.

Questions about one text, and the same text with its needle at other depths, are read one after the
other: what they begin with is read once (evaluation/reader.py).

A task's effective length is the longest up to which it keeps `keep` of its score at the shortest
length. Its interval comes from those of the scores (Wilson's, over texts, as questions about one
text go wrong together).

    longreach evaluate MODEL --eval ruler --set tasks=[niah_multikey,vt] --set lengths=[1024,4096]
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

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
from longreach.evaluation.needle import RULER_BAR, claimed_length, share_read
from longreach.evaluation.ruler_tasks import NOISE, TASKS, Asked, Draw, Kind, Sample, found_by_words
from longreach.evaluation.scores import EvalScores, Row, effective_length, gathered, mean_of, shares_by_text, wilson
from longreach.infra.lazy import lazy_module

if TYPE_CHECKING:
    import numpy as np

    from longreach.evaluation.blocks import Block, Figure, Table
    from longreach.evaluation.figures import Style
    from longreach.evaluation.reader import Reader
else:
    np = lazy_module("numpy")

OWN = "no_shared_words"
"""The task that is not RULER's and no part of its mean."""
LONGEST_PIECE = 50
"""Words of haystack that are not parted, where no sentence ends sooner."""


class Ruler(Evaluation):
    """What is found, followed, counted and answered in a long text?"""

    name = "ruler"
    title = "RULER's tasks"

    class Choices(EvalChoices):
        """Needles of several kinds, chains, counting and questions, by length (RULER,
        2404.06654)."""

        tasks: tuple[Kind, ...] = Field(default=tuple(TASKS), min_length=1)
        """Kinds of questions."""
        lengths: tuple[Count, ...] = Field(default=(1024, 2048, 4096), min_length=1)
        """Tokens of prompt and answer together."""
        trials: int = Field(default=4, ge=1)
        """Texts for each task and length."""
        questions: int = Field(default=1, ge=1, le=4)
        """Questions about each text, where a task has several: niah_multikey, qa,
        no_shared_words."""
        haystack: Literal["documents", "noise"] = "documents"
        """What surrounds needles and chains: held-out documents, or RULER's noise."""
        documents: DocumentNames = ("*",)
        """Names (shell patterns) of held-out documents that the haystack is made of."""
        depths: tuple[Proportion, ...] = ()
        """Where the fact stands that is asked for, 0 first, 1 last, in otherwise one text; without
        it, anywhere, as in RULER."""
        new_tokens: int | None = Field(default=None, ge=1)
        """Tokens that the model may write; without it, RULER's own: 128 for needles, 120 cwe, 50
        fwe, 32 qa, 30 vt."""
        keep: float = Field(default=RULER_BAR, gt=0, le=1)
        """Share of its score at the shortest length that a task has to keep at its effective
        length."""
        chat_template: Literal["auto", "always", "never"] = "auto"
        """Ask as a chat: auto, if the model has a template for it; always, or refuse a model
        without; never."""

        @model_validator(mode="after")
        def _one_fact_moves(self) -> Ruler.Choices:
            if not self.depths:
                return self
            fixed = [task for task in self.tasks if not TASKS[task].one_fact]
            if fixed:
                movable = ", ".join(name for name, task in TASKS.items() if task.one_fact)
                raise ValueError(
                    f"depths: {', '.join(fixed)} ask for several facts or none, which cannot be moved: leave depths "
                    f"out, or choose tasks among {movable}"
                )
            if self.questions > 1:
                raise ValueError(f"depths and questions {self.questions}: one fact is moved, set questions to 1")
            return self

        def every_depth(self) -> list[float] | list[None]:
            """Return the depths, ascending; None alone where facts stand anywhere."""
            return sorted(self.depths) or [None]

    choices: Choices

    def cells(self) -> list[Cell]:
        """Return a cell for each task, length and text, with all its questions or depths.

        Raises:
            ValueError: a length beyond the model's, or that the question does not fit into, or that
                the haystack does not fill; an answer that stands in the haystack already, or that
                the tokenizer joins with the prompt; a chat template is required but missing.
        """
        choices = self.choices
        if choices.chat_template == "always" and not self.tokenizer.chat_template:
            raise ValueError(
                "ruler.chat_template is 'always', but the model has no chat template: use 'auto' or 'never'"
            )
        claimed, longest = claimed_length(self.model), max(choices.lengths)
        self.check_reach(longest)
        if claimed and longest > claimed:
            raise ValueError(
                f"ruler length {longest}: the model reads {claimed} tokens; lower it, stretch the model (`rope`), or "
                f"name the models that reach it in ruler.models"
            )
        haystack = " ".join(self._haystack).lower()
        cells = []
        for task in choices.tasks:
            for length in choices.lengths:
                for trial in range(choices.trials):
                    cell = {"task": task, "length": length, "trial": trial}
                    text = Text(self, cell)
                    if TASKS[task].in_haystack:
                        text.check_absent(haystack)
                    text.check_spelling()
                    if trial == 0:
                        text.fit()
                    cells.append(cell)
        return cells

    def measure(self, cell: Cell) -> Result:
        """Return {"cases": one for each question or depth, "read_tokens", "prompt_tokens"}."""
        from longreach.evaluation.reader import Reader

        text = Text(self, cell)
        pieces = text.fit()
        reader = Reader(self.model, self.tokenizer)
        cases = []
        read_tokens = prompt_tokens = 0
        for number, asked in enumerate(text.sample.asked):
            for depth in self.choices.every_depth():
                case, read = self._ask(reader, text, asked, pieces, depth)
                cases.append(cell | {"question": number, "depth": depth} | case)
                read_tokens += read
                prompt_tokens += case["prompt_tokens"]
        return {"cases": cases, "read_tokens": read_tokens, "prompt_tokens": prompt_tokens}

    @cached_property
    def _haystack(self) -> list[str]:
        """The pieces of the haystack."""
        if not any(TASKS[task].in_haystack for task in self.choices.tasks):
            return []
        if self.choices.haystack == "noise":
            return [NOISE] * max(self.choices.lengths)
        pieces = []
        for document in matching(self.documents, self.choices.documents):
            pieces += sentences(str(self.tokenizer.decode(document.ids_T)))
        return pieces

    def _ask(self, reader: Reader, text: Text, asked: Asked, pieces: int, depth: float | None) -> tuple[Row, int]:
        """Return one case, and how many tokens had to be read for it."""
        task = TASKS[text.cell["task"]]
        prompt = text.prompt(asked, pieces, depth)
        prompt_ids, expected = text.spelled(prompt, asked)
        answered = reader.answer(prompt_ids, expected, text.where, new_tokens=text.new_tokens)
        case = {
            "prompt_tokens": len(prompt_ids),
            "prompt": prompt,
            "expected": ", ".join(asked.answers),
            "asked_as": text.asked_as,
            "score": task.score(answered.got, asked.answers),
        }
        if task.in_haystack or text.sample.facts:
            found = found_by_words(text.sample.shown(pieces, text.moved(asked, depth)), asked)
            case["by_words"] = task.score(found, asked.answers)
        return case | answered.as_row(), answered.read_tokens

    @classmethod
    def scores(cls, choices: Choices, results: list[tuple[Cell, Result]]) -> EvalScores:
        """Return rows of kind `length` (task x length), `depth` (task x length x depth) and
        `effective` (task)."""
        cases = gathered(results, "cases")
        totals = []
        others = []
        summary: dict[str, float] = {}
        for task in choices.tasks:
            of_task = []
            for length in sorted(choices.lengths):
                found = [case for case in cases if (case["task"], case["length"]) == (task, length)]
                row = _row("length", task, length, found)
                of_task.append(row)
                summary[f"ruler_{task}_{length}"] = row["score"]
                for depth in sorted(choices.depths):
                    at_depth = [case for case in found if case["depth"] == depth]
                    others.append(_row("depth", task, length, at_depth) | {"depth": depth})
            effective = effective_row(of_task, choices.keep)
            summary[f"ruler_{task}_effective_length"] = effective["effective_length"]
            totals += of_task
            others.append(effective)
        means = []
        for length in sorted(choices.lengths):
            of_length = [row["score"] for row in totals if row["length"] == length and row["task"] != OWN]
            if of_length:
                means.append({"length": length, "accuracy": float(np.mean(of_length))})
                summary[f"ruler_{length}"] = means[-1]["accuracy"]
        if means:
            summary["ruler_effective_length"] = effective_length(means, RULER_BAR)
        summary["ruler_tokens_read"] = share_read(results)
        return EvalScores(
            eval=cls.name,
            protocol="greedy answers; `score`: share of the expected strings in them (RULER's string_match_all), for "
            "qa whether one is (string_match_part); `by_words`: the same of a search by words, without a model; "
            f"effective length of a task: keeps {choices.keep:g} of its score at the shortest length",
            recipe=choices.model_dump(mode="json"),
            rows=totals + others,
            summary=summary,
            note=f"ruler_effective_length is RULER's: the longest whose mean over its tasks reaches {RULER_BAR}.",
            cases=cases,
        )

    @classmethod
    def words_and_tables(cls, models: dict[str, EvalScores], background: Background) -> list[Block]:
        """Return the question and the protocol, a table for each model, and what is zero
        everywhere."""
        first = next(iter(models.values()))
        blocks: list[Block] = [f"{cls.question()} Protocol: {first.protocol}. {first.note}"]
        for name, scores in models.items():
            blocks.append(_table(name, scores))
            blocks += [f"{name}, {sentence}" for sentence in zeros(scores)]
        return blocks

    @classmethod
    def figures(cls, models: dict[str, EvalScores], style: Style, background: Background) -> list[Figure]:
        """Return a grid of task x length for each model and, with depths, a figure of the answer's
        NLL by depth for each task, at the longest length."""
        from longreach.evaluation.figures import grid, lines
        from longreach.evaluation.sections import with_commas

        figures = []
        curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for name, scores in models.items():
            lengths = sorted(scores.distinct("length", kind="length"))
            cells: dict[str, list[tuple[float, str]]] = {}
            for row in scores.rows_with(kind="length"):
                cells.setdefault(row["task"], []).append((1 - row["score"], f"{row['score']:.2f}"))
            caption = "In a cell: the share of what was asked for that was given. Light: all of it; dark: nothing."
            axes = ("prompt and answer (tokens)", "share that is missing")
            file, title = f"ruler-{name}.png", f"{cls.title}: {name}"
            figures.append(grid(file, title, caption, axes, with_commas(lengths), cells, 1.0))
            for row in scores.rows_with(kind="depth", length=lengths[-1]):
                curves.setdefault(row["task"], {}).setdefault(name, []).append((100 * row["depth"], row["nll"]))
        for task, of_task in curves.items():
            axes = ("place of the fact (%, 0: first)", "answer (nats per token)")
            caption = "One text in which only the fact moves, at the longest length. Lower is better."
            figures.append(
                lines(f"ruler-depth-{task}.png", f"Where the fact stands: {task}", caption, axes, of_task, style)
            )
        return figures


@dataclass(frozen=True)
class Text:
    """One text of a task, as a model is asked about it."""

    evaluation: Ruler
    cell: Cell

    @property
    def where(self) -> str:
        """What is asked, for errors."""
        return f"ruler {self.cell['task']}, length {self.cell['length']}"

    @property
    def new_tokens(self) -> int:
        """Tokens that the model may write."""
        return self.evaluation.choices.new_tokens or TASKS[self.cell["task"]].new_tokens

    @cached_property
    def sample(self) -> Sample:
        """The text and its questions, drawn from seed, task, length and trial alone."""
        choices, task = self.evaluation.choices, self.cell["task"]
        name = zlib.crc32(task.encode())
        chance = np.random.default_rng([choices.seed, self.cell["length"], self.cell["trial"], name])
        pieces = self.evaluation._haystack
        if pieces and TASKS[task].in_haystack:
            start = int(chance.integers(len(pieces)))
            pieces = pieces[start:] + pieces[:start]
        joiner = "\n" if choices.haystack == "noise" else " "
        questions = min(choices.questions, TASKS[task].questions)
        return TASKS[task].draw(Draw(chance, pieces, joiner, self.cell["length"], questions))

    @cached_property
    def asked_as(self) -> str:
        """Whether the chat template is used, and if not, why."""
        if not self.evaluation.tokenizer.chat_template:
            return "plain text: no chat template"
        if self.evaluation.choices.chat_template == "never":
            return "plain text: chat_template is never"
        return "chat"

    def moved(self, asked: Asked, depth: float | None) -> tuple[int, float] | None:
        """Return which fact is moved, and where to."""
        return None if depth is None or asked.fact is None else (asked.fact, depth)

    def prompt(self, asked: Asked, pieces: int, depth: float | None = None) -> str:
        """Return a question with n pieces of haystack, up to where the answer goes on."""
        context = self.sample.context(pieces, self.moved(asked, depth))
        if self.asked_as != "chat":
            return f"{self.sample.head}{context}{asked.question} {asked.opening}"
        messages = [{"role": "user", "content": f"{self.sample.head}{MARK}{asked.question}"}]
        refusal = "the model's chat template changes the user's text: set ruler.chat_template 'never'"
        before, after = chat_around(self.evaluation.tokenizer, messages, refusal=refusal)
        return f"{before}{context}{after}{asked.opening}"

    def spelled(self, prompt: str, asked: Asked) -> tuple[list[int], list[int]]:
        """Return the ids of a prompt, and of the answer; ValueError where the tokenizer joins
        them."""
        from longreach.evaluation.reader import spelled

        return spelled(self.evaluation.tokenizer, prompt, asked.expected, self.where)

    def check_spelling(self) -> None:
        """Raise ValueError where the tokenizer joins an answer with its prompt, or cannot spell
        it."""
        for asked in self.sample.asked:
            _, ids = self.spelled(self.prompt(asked, self.sample.least), asked)
            text = str(self.evaluation.tokenizer.decode(ids))
            if text.strip() != asked.expected.strip():
                raise ValueError(
                    f"{self.where}: the tokenizer spells the answer {asked.expected.strip()!r} as {text.strip()!r}: no "
                    f"model with it can give the answer; leave the task out of ruler.tasks"
                )

    def check_absent(self, haystack: str) -> None:
        """Raise ValueError where an answer stands in the haystack, given in lower case."""
        for asked in self.sample.asked:
            for answer in asked.answers:
                if answer.lower() in haystack:
                    raise ValueError(
                        f"{self.where}: the answer {answer!r} stands in the haystack already: choose other documents, "
                        f"another ruler.seed or ruler.haystack 'noise'"
                    )

    def fit(self) -> int:
        """Return how many pieces of haystack fit, so that every question, wherever its fact
        stands, and its answer have at most `length` tokens.

        Raises:
            ValueError: the least that the task needs is too long, or all that there is too short.
        """
        sample, room = self.sample, self.cell["length"] - self.new_tokens
        least = self._tokens(sample.least)
        if least > room:
            raise ValueError(
                f"{self.where}: the shortest prompt has {least} tokens and the answer {self.new_tokens}: use at least "
                f"{least + self.new_tokens}"
            )
        fits, step = sample.least, 1
        while fits + step <= sample.most and self._tokens(fits + step) <= room:
            fits += step
            step *= 2
        while step > 1:
            step //= 2
            if fits + step <= sample.most and self._tokens(fits + step) <= room:
                fits += step
        if fits == sample.most:
            raise ValueError(
                f"{self.where}: the text has to have {room} tokens, all that there is makes {self._tokens(fits)}: "
                f"lower the length, choose more documents or ruler.haystack 'noise'"
            )
        return fits

    def _tokens(self, pieces: int) -> int:
        """Return the tokens of the longest prompt with n pieces of haystack."""
        most = 0
        for asked in self.sample.asked:
            for depth in self.evaluation.choices.every_depth():
                most = max(most, len(text_ids(self.evaluation.tokenizer, self.prompt(asked, pieces, depth))))
        return most


def sentences(text: str) -> list[str]:
    """Return a text's sentences on one line each; what has no sentence end for long is parted."""
    pieces = []
    for sentence in re.split(r"(?<=[.!?。！？])\s+", text):
        words = sentence.split()
        for start in range(0, len(words), LONGEST_PIECE):
            pieces.append(" ".join(words[start : start + LONGEST_PIECE]))
    return pieces


def _row(kind: str, task: str, length: int, cases: list[Row]) -> Row:
    """Return the mean score of cases, with Wilson's interval over their texts."""
    shares = shares_by_text(cases, [case["score"] for case in cases])
    score = float(np.mean(shares))
    low, high = wilson(score * len(shares), len(shares))
    row = {"kind": kind, "task": task, "length": length, "trials": len(shares), "cases": len(cases), "score": score}
    row |= {"score_low": low, "score_high": high, "nll": mean_of(cases, "nll")}
    if "by_words" in cases[0]:
        row["by_words"] = mean_of(cases, "by_words")
    return row | {"prompt_tokens": mean_of(cases, "prompt_tokens")}


def effective_row(totals: list[Row], keep: float) -> Row:
    """Return a task's effective length and the interval that those of its scores leave.

    totals: its rows, one for each length, the shortest first.
    """
    row: Row = {"kind": "effective", "task": totals[0]["task"], "keep": keep}
    bar = keep * totals[0]["score"]
    for name, column in (("", "score"), ("_low", "score_low"), ("_high", "score_high")):
        # The shortest length is its own measure, and a task that fails there keeps nothing.
        reached = [{"length": totals[0]["length"], "accuracy": bar}]
        for total in totals[1:]:
            reached.append({"length": total["length"], "accuracy": total[column]})
        row[f"effective_length{name}"] = effective_length(reached, bar) if bar else 0
    return row


def _table(name: str, scores: EvalScores) -> Table:
    """Return a row for each task: its scores by length, its effective length, what a search by
    words scores."""
    from longreach.evaluation.blocks import Table
    from longreach.evaluation.sections import DASH, with_commas

    lengths = sorted(scores.distinct("length", kind="length"))
    lines = []
    for effective in scores.rows_with(kind="effective"):
        of_task = scores.rows_with(kind="length", task=effective["task"])
        line = [effective["task"]]
        for row in of_task:
            line.append(f"{row['score']:.2f}\n{row['score_low']:.2f} to {row['score_high']:.2f}")
        low, high = effective["effective_length_low"], effective["effective_length_high"]
        line.append(f"{effective['effective_length']:,}\n{low:,} to {high:,}")
        by_words = of_task[-1].get("by_words")
        line.append(DASH if by_words is None else f"{by_words:.2f}")
        lines.append(line)
    columns = ["task", *with_commas(lengths), "effective length", "search by words"]
    return Table(f"{name}: score by length, with 95% intervals", columns, lines)


def zeros(scores: EvalScores) -> list[str]:
    """Return a sentence for each task that scores 0 at every length: what came, and why
    probably."""
    by_task: dict[str, list[Row]] = {}
    for case in scores.cases:
        by_task.setdefault(case["task"], []).append(case)
    found = []
    for task, cases in by_task.items():
        if any(case["score"] for case in cases):
            continue
        case = min(cases, key=lambda case: case["length"])
        got = case["got"][:200] or "nothing"
        reason = "the task is too hard for it: look at the NLL, which is finer"
        if case["asked_as"] == "plain text: no chat template":
            reason = (
                "a base model continues text and follows no instruction; if it was trained for chats, its tokenizer "
                "lacks the template"
            )
        elif case["asked_as"] != "chat":
            reason = "the model has a chat template and was asked without it: set chat_template 'auto'"
        found.append(
            f"{task}: 0 in all {len(cases)} answers, at every length. Expected: {case['expected']!r}; it wrote: "
            f"{got!r} ({case['length']:,} tokens). Probably {reason}."
        )
    return found
