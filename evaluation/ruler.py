"""RULER's tasks (Hsieh et al., arXiv:2404.06654), generated offline from a seed: retrieval, variable
tracking, word counting and question answering in a long text.

Each task (evaluation/ruler_tasks.py) is fitted to a length in the model's own tokens. As in RULER,
the length includes the answer. The haystack is the recipe's own held-out text or RULER's noise.
Answers are generated greedily and scored by RULER's rules: the share of the expected strings that
the answer contains, or for `qa` whether it contains one of them.

Questions about one text, and copies of a text with its needle at other depths, are read one after
the other, so that their common prefix is read only once (evaluation/reader.py).

The effective length of a task is the longest length up to which it keeps the share `keep` of its
score at the shortest length, as in NoLiMa (2502.05167). Beside it is the range that it would have
if every score were at the lower or at the upper end of its interval (Wilson's, over texts, because
questions about one text are not independent). RULER's own effective length, of the mean over its
tasks, has a fixed threshold.

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
    Selection,
)
from longreach.evaluation.documents import MARK, chat_around, matching, text_ids
from longreach.evaluation.needle import claimed_length, share_read
from longreach.evaluation.ruler_tasks import NOISE, TASKS, Asked, Draw, Kind, Sample, found_by_words
from longreach.evaluation.scores import (
    KEPT_SHARE,
    RULER_THRESHOLD,
    EvalScores,
    Row,
    effective_length,
    gathered,
    mean_of,
    shares_by_text,
    wilson,
)
from longreach.infra.lazy import lazy_module

if TYPE_CHECKING:
    import numpy as np

    from longreach.evaluation.blocks import Block, Figure, Table
    from longreach.evaluation.figures import Style
    from longreach.evaluation.reader import Reader
else:
    np = lazy_module("numpy")

OWN_TASK = "no_shared_words"
"""The task that is not one of RULER's, and not part of the mean over its tasks."""
LONGEST_PIECE = 50
"""Maximum number of words in a piece of haystack; longer sentences are split."""


class Ruler(Evaluation):
    """Does the model find facts, follow chains, count words and answer questions in a long text?"""

    name = "ruler"
    title = "RULER's tasks"

    class Choices(EvalChoices):
        """Needles of several kinds, chains, word counting and question answering, by length (RULER,
        2404.06654)."""

        tasks: tuple[Kind, ...] = Field(default=tuple(TASKS), min_length=1)
        """Names of the tasks. Default: all."""
        lengths: tuple[Count, ...] = Field(default=(1024, 2048, 4096), min_length=1)
        """Lengths in tokens, of prompt and answer together."""
        trials: int = Field(default=4, ge=1)
        """Number of texts for each task and length."""
        questions: int = Field(default=1, ge=1, le=4)
        """Number of questions about each text, for tasks that allow several: niah_multikey, qa and
        no_shared_words."""
        haystack: Literal["documents", "noise"] = "documents"
        """Text around needles and chains: held-out documents, or RULER's noise."""
        documents: DocumentNames = Field(default=("*",), min_length=1)
        """Names (shell patterns) of the held-out documents that make up the haystack."""
        depths: tuple[Proportion, ...] = ()
        """Depths of the fact that is asked for, 0 is the beginning and 1 the end; the rest of the
        text stays the same. Default: random places, as in RULER."""
        new_tokens: int | None = Field(default=None, ge=1)
        """Maximum number of tokens to generate. Default: RULER's limits (128 for niah tasks, 120 for
        cwe, 50 for fwe, 32 for qa, 30 for vt), and 16 for no_shared_words."""
        keep: float = Field(default=KEPT_SHARE, gt=0, le=1)
        """Share of its score at the shortest length that a task must keep up to its effective
        length."""
        chat_template: Literal["auto", "always", "never"] = "auto"
        """Whether to ask in the model's chat template: `auto` if it has one, `always` (fail if it
        has none), or `never`."""

        @model_validator(mode="after")
        def _one_fact_moves(self) -> Ruler.Choices:
            if not self.depths:
                return self
            fixed = [task for task in self.tasks if not TASKS[task].one_fact]
            if fixed:
                movable = ", ".join(name for name, task in TASKS.items() if task.one_fact)
                raise ValueError(
                    f"depths need tasks that ask for a single fact, but {', '.join(fixed)} ask for several or none: "
                    f"leave depths out, or choose tasks among {movable}"
                )
            if self.questions > 1:
                raise ValueError(
                    f"questions is {self.questions}, but must be 1 with depths, which move a single fact: set "
                    f"questions to 1 or leave depths out"
                )
            return self

        def selected(self) -> list[Selection]:
            """Return what is needed: nothing for noise and for tasks without a haystack."""
            reads = self.haystack == "documents" and any(TASKS[task].in_haystack for task in self.tasks)
            return super().selected() if reads else []

        def every_depth(self) -> list[float] | list[None]:
            """Return the depths in ascending order, or [None] if facts are at random places."""
            return sorted(self.depths) or [None]

    choices: Choices

    def cells(self) -> list[Cell]:
        """Return a cell for each task, length and text, with all its questions or depths.

        Raises:
            ValueError: a length is too long for the model, too short for the question or longer than
                the haystack; an answer already occurs in the haystack, or the tokenizer joins it with
                the prompt or cannot spell it; a chat template is required but missing.
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
                f"ruler length {longest}: the model reads at most {claimed} tokens; lower the length, stretch the "
                f"model (`rope`), or list only models that reach it in ruler.models"
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
        """Return one case, and the number of tokens that had to be read for it."""
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
            of_length = [row["score"] for row in totals if row["length"] == length and row["task"] != OWN_TASK]
            if of_length:
                means.append({"length": length, "accuracy": float(np.mean(of_length))})
                summary[f"ruler_{length}"] = means[-1]["accuracy"]
        if means:
            summary["ruler_effective_length"] = effective_length(means, RULER_THRESHOLD)
        summary["ruler_tokens_read"] = share_read(results)
        return EvalScores(
            eval=cls.name,
            protocol="greedy answers; `score`: share of the expected strings in them (RULER's string_match_all), for "
            "qa whether one is (string_match_part); `by_words`: the same of a search by words, without a model; "
            f"effective length of a task: keeps {choices.keep:g} of its score at the shortest length",
            recipe=choices.model_dump(mode="json"),
            rows=totals + others,
            summary=summary,
            note=f"ruler_effective_length is RULER's: the longest whose mean over its tasks reaches {RULER_THRESHOLD}.",
            cases=cases,
        )

    @classmethod
    def words_and_tables(cls, models: dict[str, EvalScores], background: Background) -> list[Block]:
        """Return the question and the protocol, a table for each model, and sentences on the tasks
        that score 0 at every length."""
        first = next(iter(models.values()))
        blocks: list[Block] = [f"{cls.question()} Protocol: {first.protocol}. {first.note}"]
        for name, scores in models.items():
            blocks.append(_table(name, scores))
            blocks += [f"{name}, {sentence}" for sentence in zeros(scores)]
        return blocks

    @classmethod
    def figures(cls, models: dict[str, EvalScores], style: Style, background: Background) -> list[Figure]:
        """Return a grid of task x length for each model. With depths, also return a figure for each
        task of the answer's NLL by depth, at the longest length."""
        from longreach.evaluation.figures import grid, lines
        from longreach.evaluation.sections import with_commas

        figures = []
        curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for name, scores in models.items():
            lengths = sorted(scores.distinct("length", kind="length"))
            cells: dict[str, list[tuple[float, str]]] = {}
            for row in scores.rows_with(kind="length"):
                cells.setdefault(row["task"], []).append((1 - row["score"], f"{row['score']:.2f}"))
            caption = "In a cell: the share of the expected strings in the answer. Light: all of them; dark: none."
            axes = ("prompt and answer (tokens)", "share missing from the answer")
            file, title = f"ruler-{name}.png", f"{cls.title}: {name}"
            figures.append(grid(file, title, caption, axes, with_commas(lengths), cells, 1.0))
            for row in scores.rows_with(kind="depth", length=lengths[-1]):
                curves.setdefault(row["task"], {}).setdefault(name, []).append((100 * row["depth"], row["nll"]))
        for task, of_task in curves.items():
            axes = ("depth of the fact (%, 0: beginning)", "answer (nats per token)")
            caption = "The same text, in which only the fact moves, at the longest length. Lower is better."
            figures.append(
                lines(f"ruler-depth-{task}.png", f"By depth of the fact: {task}", caption, axes, of_task, style)
            )
        return figures


@dataclass(frozen=True)
class Text:
    """One text of a task with its questions, as presented to a model."""

    evaluation: Ruler
    cell: Cell

    @property
    def where(self) -> str:
        """Task and length, for error messages."""
        return f"ruler {self.cell['task']}, length {self.cell['length']}"

    @property
    def new_tokens(self) -> int:
        """Maximum number of tokens to generate."""
        return self.evaluation.choices.new_tokens or TASKS[self.cell["task"]].new_tokens

    @cached_property
    def sample(self) -> Sample:
        """The text and its questions; they depend only on seed, task, length and trial."""
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
        """Whether the chat template is used and, if not, why."""
        if not self.evaluation.tokenizer.chat_template:
            return "plain text: no chat template"
        if self.evaluation.choices.chat_template == "never":
            return "plain text: chat_template is never"
        return "chat"

    def moved(self, asked: Asked, depth: float | None) -> tuple[int, float] | None:
        """Return the number of the fact to move and its new depth; None if no fact is moved."""
        return None if depth is None or asked.fact is None else (asked.fact, depth)

    def prompt(self, asked: Asked, pieces: int, depth: float | None = None) -> str:
        """Return the prompt of a question with this many pieces of haystack, up to the answer."""
        context = self.sample.context(pieces, self.moved(asked, depth))
        if self.asked_as != "chat":
            return f"{self.sample.head}{context}{asked.question} {asked.opening}"
        messages = [{"role": "user", "content": f"{self.sample.head}{MARK}{asked.question}"}]
        refusal = "the model's chat template changes the user's text: set ruler.chat_template 'never'"
        before, after = chat_around(self.evaluation.tokenizer, messages, refusal=refusal)
        return f"{before}{context}{after}{asked.opening}"

    def spelled(self, prompt: str, asked: Asked) -> tuple[list[int], list[int]]:
        """Return the token ids of a prompt and of the expected answer; raise ValueError if the
        tokenizer joins them."""
        from longreach.evaluation.reader import spelled

        return spelled(self.evaluation.tokenizer, prompt, asked.expected, self.where)

    def check_spelling(self) -> None:
        """Raise ValueError if the tokenizer joins an answer with its prompt, or cannot spell it."""
        for asked in self.sample.asked:
            _, ids = self.spelled(self.prompt(asked, self.sample.least), asked)
            text = str(self.evaluation.tokenizer.decode(ids))
            if text.strip() != asked.expected.strip():
                raise ValueError(
                    f"{self.where}: the tokenizer spells the answer {asked.expected.strip()!r} as {text.strip()!r}, so "
                    f"no model with this tokenizer can give it: leave the task out of ruler.tasks"
                )

    def check_absent(self, haystack: str) -> None:
        """Raise ValueError if an answer occurs in the haystack, which is given in lower case."""
        for asked in self.sample.asked:
            for answer in asked.answers:
                if answer.lower() in haystack:
                    raise ValueError(
                        f"{self.where}: the answer {answer!r} already occurs in the haystack: choose other documents, "
                        f"another ruler.seed or ruler.haystack 'noise'"
                    )

    def fit(self) -> int:
        """Return the number of pieces of haystack that fit, so that prompt and answer have at most
        `length` tokens for every question and depth.

        Raises:
            ValueError: the shortest prompt of the task is too long, or the whole haystack too short.
        """
        sample, room = self.sample, self.cell["length"] - self.new_tokens
        least = self._tokens(sample.least)
        if least > room:
            raise ValueError(
                f"{self.where}: the shortest prompt has {least} tokens and the answer {self.new_tokens}: use a length "
                f"of at least {least + self.new_tokens}"
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
                f"{self.where}: the prompt must have {room} tokens, but the whole haystack makes only "
                f"{self._tokens(fits)}: lower the length, choose more documents or ruler.haystack 'noise'"
            )
        return fits

    def _tokens(self, pieces: int) -> int:
        """Return the number of tokens of the longest prompt with this many pieces of haystack."""
        most = 0
        for asked in self.sample.asked:
            for depth in self.evaluation.choices.every_depth():
                most = max(most, len(text_ids(self.evaluation.tokenizer, self.prompt(asked, pieces, depth))))
        return most


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, each on one line; sentences of more than LONGEST_PIECE words
    are split."""
    pieces = []
    for sentence in re.split(r"(?<=[.!?。！？])\s+", text):
        words = sentence.split()
        for start in range(0, len(words), LONGEST_PIECE):
            pieces.append(" ".join(words[start : start + LONGEST_PIECE]))
    return pieces


def _row(kind: str, task: str, length: int, cases: list[Row]) -> Row:
    """Return the mean score of cases, with Wilson's 95% interval over their texts."""
    shares = shares_by_text(cases, [case["score"] for case in cases])
    score = float(np.mean(shares))
    low, high = wilson(score * len(shares), len(shares))
    row = {"kind": kind, "task": task, "length": length, "trials": len(shares), "cases": len(cases), "score": score}
    row |= {"score_low": low, "score_high": high, "nll": mean_of(cases, "nll")}
    if "by_words" in cases[0]:
        row["by_words"] = mean_of(cases, "by_words")
    return row | {"prompt_tokens": mean_of(cases, "prompt_tokens")}


def effective_row(totals: list[Row], keep: float) -> Row:
    """Return a task's effective length, and the lengths if every score were at the lower or at the
    upper end of its interval.

    totals: the task's rows, one for each length, in ascending order of length.
    """
    row: Row = {"kind": "effective", "task": totals[0]["task"], "keep": keep}
    bar = keep * totals[0]["score"]
    for name, column in (("", "score"), ("_low", "score_low"), ("_high", "score_high")):
        # The shortest length is the reference, so it always passes. A task that scores 0 there has length 0.
        reached = [{"length": totals[0]["length"], "accuracy": bar}]
        for total in totals[1:]:
            reached.append({"length": total["length"], "accuracy": total[column]})
        row[f"effective_length{name}"] = effective_length(reached, bar) if bar else 0
    return row


def _table(name: str, scores: EvalScores) -> Table:
    """Return a table with a row for each task: its scores by length, its effective length, and the
    score of a search by words."""
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
    legend = (
        "In small type: 95% intervals of the scores; the effective length if every score were at the lower or at the "
        "upper end."
    )
    return Table(f"{name}: score by length", columns, lines, legend=legend)


def zeros(scores: EvalScores) -> list[str]:
    """Return a message for each task that scores 0 at every length, with a sample answer and the
    likely reason."""
    by_task: dict[str, list[Row]] = {}
    for case in scores.cases:
        by_task.setdefault(case["task"], []).append(case)
    found = []
    for task, cases in by_task.items():
        if any(case["score"] for case in cases):
            continue
        case = min(cases, key=lambda case: case["length"])
        got = case["got"][:200] or "nothing"
        reason = "the task is too hard for the model: look at the NLL, which is finer"
        if case["asked_as"] == "plain text: no chat template":
            reason = (
                "this is a base model, which continues text and does not follow instructions; if the model was trained "
                "for chat, its tokenizer lacks the chat template"
            )
        elif case["asked_as"] != "chat":
            reason = "the model has a chat template and was asked without it: set chat_template 'auto'"
        found.append(
            f"{task}: score 0 in all {len(cases)} answers, at every length. Expected: {case['expected']!r}. The model "
            f"wrote: {got!r} (at {case['length']:,} tokens). Likely reason: {reason}."
        )
    return found
