"""Questions in an endless stream (StreamEval; StreamingLLM, arXiv:2309.17453, section 4.4).

The stream has lines that each state a number and, after every few lines, a question about a number
stated some lines before. Facts and questions go through one cache that never grows, so a question
can be answered only if its fact is still in the cache. The distance at which accuracy drops is how
far back a stream can look, whatever its length. The right answer is inserted after each question,
so all models and caches read the same stream.

An answer is right if each of its tokens is the argmax given the tokens before it, as greedy decoding
would write. `dense` keeps everything, and breaks once the stream is longer than the model's trained
length.

    longreach evaluate MODEL --eval stream_questions --set cache_tokens=[256,1024] --set questions=200
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from longreach.evaluation.base import Background, Cell, Count, EvalChoices, Evaluation, Result
from longreach.evaluation.scores import EvalScores, Row, mean_of, retrieval_row
from longreach.infra.lazy import lazy_module

if TYPE_CHECKING:
    import numpy as np
    from transformers import Cache

    from longreach.evaluation.blocks import Figure
    from longreach.evaluation.figures import Style
else:
    np = lazy_module("numpy")

ADJECTIVES = (
    "amber", "brave", "calm", "dusty", "early", "faint", "gentle", "hollow", "icy", "jolly", "keen", "lonely",
    "mild", "noble", "oval", "pale", "quiet", "rusty", "silent", "tall", "upper", "vivid", "warm", "young",
)  # fmt: skip
NOUNS = (
    "anchor", "bridge", "candle", "desert", "engine", "forest", "garden", "harbour", "island", "jacket", "kettle",
    "ladder", "meadow", "needle", "orchard", "pillar", "quarry", "river", "saddle", "tower", "umbrella", "valley",
    "window", "yard",
)  # fmt: skip
MOST_FACTS = len(NOUNS) * (len(ADJECTIVES) + len(ADJECTIVES) * (len(ADJECTIVES) - 1) // 2)
"""Number of names with one or two adjectives."""
NUMBERS = (10_000, 100_000)
"""Range of the numbers (upper end excluded)."""


class StreamQuestions(Evaluation):
    """In a stream through a cache that never grows, how far back can the model find the answer to a
    question?"""

    name = "stream_questions"
    title = "Questions in a stream"
    revision = 3

    class Choices(EvalChoices):
        """StreamEval: questions in an endless stream of facts (StreamingLLM, 2309.17453, section
        4.4)."""

        questions: int = Field(default=100, ge=1)
        """Number of questions in the stream. They use the distances in turn."""
        every_lines: int = Field(default=10, ge=1)
        """Mean number of lines with a fact before each question. It varies by up to half of this, since
        at distances that it divides, all facts would otherwise stand right after a question."""
        distances: tuple[Count, ...] = Field(default=(5, 10, 20, 40), min_length=1)
        """Distances in lines from a fact to its question; 1 is the last line before it. If that fact
        was asked for before, the nearest other one is used. The paper has 20."""
        cache_tokens: tuple[Count, ...] = Field(default=(256, 1024), min_length=1)
        """Cache sizes in tokens, sinks included; each size is measured in a separate stream."""
        sink_tokens: int = Field(default=4, ge=1)
        """Number of first tokens that the way `sinks` keeps."""
        ways: tuple[Literal["dense", "window", "sinks"], ...] = Field(default=("sinks",), min_length=1)
        """Which tokens stay in the cache: all (dense), the most recent ones (window), or the first
        and the most recent ones (sinks)."""

        @model_validator(mode="after")
        def _fits(self) -> StreamQuestions.Choices:
            facts = self.first_lines() + (self.questions - 1) * self.every_lines + self.most_shifted()
            if facts > MOST_FACTS:
                raise ValueError(
                    f"questions {self.questions}, one after every {self.every_lines} lines, need {facts} lines, but "
                    f"there are only {MOST_FACTS} names for them: lower questions, every_lines or distances"
                )
            if min(self.cache_tokens) <= self.sink_tokens:
                raise ValueError(
                    f"sink_tokens {self.sink_tokens} leave no room in cache_tokens {min(self.cache_tokens)}: use fewer "
                    f"sinks or a larger cache"
                )
            return self

        def first_lines(self) -> int:
            """Return the number of lines before the first question."""
            return max(self.every_lines, *self.distances)

        def most_shifted(self) -> int:
            """Return the largest number of lines by which a question comes later than `every_lines` lines
            after another."""
            return self.every_lines // 2

        def longest_input(self) -> int:
            """Return the largest cache size in tokens, or 0 for `dense`, whose size is not known."""
            return 0 if "dense" in self.ways else max(self.cache_tokens)

    choices: Choices

    def cells(self) -> list[Cell]:
        """Return a cell for each way and cache size.

        Raises:
            ValueError: the model cannot stream, or cannot read as many tokens as a cache holds.
        """
        from longreach.evaluation.likelihood import check_attention
        from longreach.evaluation.small_cache import check_rope

        check_attention(self.model)
        limit = getattr(self.model.config, "max_position_embeddings", None)
        largest = max(self.choices.cache_tokens)
        if limit and largest >= limit and set(self.choices.ways) != {"dense"}:
            raise ValueError(
                f"cache_tokens {largest} and the token after them are more than the {limit} tokens that the model can "
                f"read: lower cache_tokens to at most {limit - 1}"
            )
        check_rope(self.model, sum(len(ids) for ids, _, _ in self._pieces()), largest)
        self.check_reach(sum(len(ids) for ids, _, _ in self._pieces()))
        cells: list[Cell] = []
        for way in self.choices.ways:
            sizes = (0,) if way == "dense" else self.choices.cache_tokens
            cells += [{"way": way, "cache_tokens": size} for size in sizes]
        return cells

    def measure(self, cell: Cell) -> Result:
        """Return {"cases": one for each question}; raise FloatingPointError if logits are not finite."""
        from longreach.evaluation.small_cache import answered_in_stream

        pieces = list(self._pieces())
        stream = [(ids, answer_ids) for ids, answer_ids, _ in pieces]
        found = answered_in_stream(self.model, self._cache(cell), stream)
        cases = []
        for (_, answer_ids, about), (nll, got_ids) in zip(pieces, found, strict=True):
            hits = [a == b for a, b in zip(got_ids, answer_ids, strict=True)]
            answered = {"correct": all(hits), "token_accuracy": sum(hits) / len(hits), "nll": nll}
            cases.append(cell | about | {"got": str(self.tokenizer.decode(got_ids)).strip()} | answered)
        return {"cases": cases}

    def _cache(self, cell: Cell) -> Cache:
        from transformers import DynamicCache

        from longreach.attention.sink_cache import SinkCache

        if cell["way"] == "dense":
            return DynamicCache(config=self.model.config)
        sinks = self.choices.sink_tokens if cell["way"] == "sinks" else 0
        return SinkCache(self.model.config, sinks, cell["cache_tokens"] - sinks)

    def _pieces(self) -> Iterator[tuple[list[int], list[int], Row]]:
        """Yield the stream in pieces of lines, a question and its answer.

        Yields:
            (token ids of the piece, ids of the answer at its end, columns of the question's case).
        """
        from longreach.evaluation.documents import text_ids
        from longreach.evaluation.reader import spelled

        choices, draw = self.choices, np.random.default_rng(self.choices.seed)
        names = _names(draw)
        facts: list[tuple[str, str, int]] = []  # name, number, and tokens of the stream before it
        asked: set[int] = set()  # indices in `facts`
        before = shifted = 0
        for question in range(choices.questions):
            ids = text_ids(self.tokenizer, "\n", first=False) if question else []  # ends the line of the last answer
            lines = (choices.every_lines if question else choices.first_lines()) - shifted
            shifted = int(draw.integers(choices.most_shifted() + 1))
            for _ in range(lines + shifted):
                name, number = names[len(facts)], str(draw.integers(*NUMBERS))
                facts.append((name, number, before + len(ids)))
                start = not before and not ids  # the tokenizer's first token comes only once
                ids += text_ids(self.tokenizer, f"The number of the {name} is {number}.\n", first=start)
            distance = choices.distances[question % len(choices.distances)]
            # answers stay in the stream, so each fact is asked for only once; take the one nearest to the distance
            unasked = [fact for fact in range(len(facts)) if fact not in asked]
            fact = min(unasked, key=lambda fact: abs(len(facts) - fact - distance))
            asked.add(fact)
            name, number, place = facts[fact]
            prompt = f"Question: What is the number of the {name}? Answer: The number of the {name} is"
            prompt_ids, answer_ids = spelled(
                self.tokenizer, prompt, f" {number}", f"question {question}", special=False
            )
            about: Row = {"question": question, "distance": distance, "name": name, "expected": number}
            about["lines_back"] = len(facts) - fact
            about["tokens_back"] = before + len(ids) + len(prompt_ids) - place
            ids += prompt_ids + answer_ids
            yield ids, answer_ids, about
            before += len(ids)

    @classmethod
    def scores(cls, choices: Choices, results: list[tuple[Cell, Result]]) -> EvalScores:
        """Return a row of kind `distance` for each way, cache size and distance: accuracy with
        Wilson's 95% interval, and NLL in nats per token of the answer."""
        rows: list[Row] = []
        cases: list[Row] = []
        for cell, result in results:
            cases += result["cases"]
            for distance in sorted(choices.distances):
                asked = [case for case in result["cases"] if case["distance"] == distance]
                if asked:
                    tokens_back = round(mean_of(asked, "tokens_back"))
                    row = retrieval_row("distance", asked, tokens_back, None)
                    rows.append(row | cell | {"distance": distance})
        summary = {}
        for row in rows:
            size = f"_{row['cache_tokens']}" if row["cache_tokens"] else ""
            summary[f"stream_{row['way']}{size}_at_{row['distance']}"] = row["accuracy"]
        return EvalScores(
            eval=cls.name,
            protocol=f"{choices.questions} questions in one stream, one after every {choices.every_lines} lines; an "
            "answer is right if greedy decoding would write it; the right one is put into the stream",
            recipe=choices.model_dump(mode="json"),
            rows=rows,
            summary=summary,
            note="length: tokens from a fact to its answer. A fact that has left the cache cannot be known. Intervals "
            "treat the questions of this one stream as independent.",
            cases=cases,
        )

    @classmethod
    def figures(cls, models: dict[str, EvalScores], style: Style, background: Background) -> list[Figure]:
        """Return a figure of accuracy by distance for each model, with a curve for each cache."""
        from longreach.evaluation.figures import Style, lines

        figures = []
        for name, scores in models.items():
            curves: dict[str, list[tuple[float, ...]]] = {}
            for row in scores.rows_with(kind="distance"):
                cache = row["way"] if row["way"] == "dense" else f"{row['way']}, {row['cache_tokens']:,} tokens"
                point = (row["distance"], row["accuracy"], row["accuracy_low"], row["accuracy_high"])
                curves.setdefault(cache, []).append(point)
            caption = "A curve should drop to 0 where the fact has left the cache, and not before."
            axes = ("lines between the fact and its question", "share of right answers")
            file, title = f"stream_questions-{name}.png", f"{cls.title}: {name}"
            ticks = sorted(scores.distinct("distance", kind="distance"))
            figures.append(lines(file, title, caption, axes, curves, Style.of(curves), ticks=ticks, y_range=(0, 1)))
        return figures


def _names(draw: np.random.Generator) -> list[str]:
    """Return MOST_FACTS distinct names in random order, those with two adjectives last. A repeated
    name would have two numbers, and its question two answers."""
    short = [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
    long = [f"{one} {other} {noun}" for one, other in combinations(ADJECTIVES, 2) for noun in NOUNS]
    draw.shuffle(short)
    draw.shuffle(long)
    return short + long
