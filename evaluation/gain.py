"""Gain from context: how much better the same tokens are predicted as more of the text before them is seen.

A window is a place in a document where the text is cut off. Its last `score_tokens` tokens are scored at every length
L, each time with the L - score_tokens tokens right before them, so lengths compare: the scored tokens never change. The
unit is the document: windows of one document are averaged, and intervals resample documents.

What an extended model has to beat is what a user has without it: the untrained base at the best of its own lengths.
Which length that is, is chosen on the corpus' validation documents, and the claim is made on its test documents. On
some texts a base predicts worse at 8,192 tokens than at 2,048, so its longest length would be too easy to beat.

    longreach evaluate MODEL --eval gain --set lengths=[2048,8192] --set windows=2

Legend: T tokens, D documents.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field, model_validator

from longreach.evaluation.base import Background, Cell, DocumentNames, EvalChoices, Evaluation, Result
from longreach.evaluation.documents import Document, check_names, first_token_id, matching, with_first
from longreach.evaluation.scores import EvalScores, Row, bootstrap_mean
from longreach.infra.lazy import lazy_module

if TYPE_CHECKING:
    import numpy as np

    from longreach.evaluation.blocks import Block, Figure, Section, Table
    from longreach.evaluation.figures import Style
else:
    np = lazy_module("numpy")

SPLITS = ("test", "validation")
ALL = "*"
"""The document of rows that are means over all of them."""
FEW = 5
"""Documents below which an interval over them says little, and is said to."""


class Gain(Evaluation):
    """How much better are the same tokens predicted, the more of the text before them the model sees?"""

    name = "gain"
    title = "Gain from context"

    class Choices(EvalChoices):
        """Gain from context: the same tokens of held-out documents, predicted with more and more text before them."""

        lengths: tuple[int, ...] = Field(default=(2048, 4096, 8192), min_length=2)
        """Context lengths in tokens, the scored ones included; the shortest is what a model's own gain is counted
        from."""
        score_tokens: int = Field(default=1024, ge=1)
        """How many tokens at the end of each context are scored, the same ones at every length."""
        windows: int = Field(default=1, ge=1)
        """Places of each document at which tokens are scored: one is the document's end, more are spread evenly."""
        documents: DocumentNames = ("*",)
        """Names (shell patterns) of test documents; those shorter than the longest length are left out."""
        choose_on: DocumentNames = ("*",)
        """Names (shell patterns) of validation documents, on which the base's best length is chosen. An empty list, or
        a corpus without any, chooses it on the test documents, which favours the base."""

        @model_validator(mode="after")
        def _room_for_context(self) -> Gain.Choices:
            if min(self.lengths) <= self.score_tokens:
                raise ValueError(
                    f"lengths: {min(self.lengths)} has no room for score_tokens {self.score_tokens} and a token "
                    f"before them: use a length of at least {self.score_tokens + 1}, or fewer score_tokens"
                )
            if len(set(self.lengths)) < 2:
                raise ValueError(f"lengths: {list(self.lengths)} is one length, and a gain needs two or more")
            return self

    choices: Choices

    def cells(self) -> list[Cell]:
        """Return a cell for each pass (document, window, length), and one for each document that is left out.

        Raises:
            ValueError: no test document, or no validation document, is as long as the longest length.
        """
        from longreach.evaluation.likelihood import check_head

        lengths = sorted(set(self.choices.lengths))
        test = [document for document in self.documents if document.split != "validation"]
        chosen = {"test": matching(test, self.choices.documents)}
        validation = [document for document in self.documents if document.split == "validation"]
        patterns = self.choices.choose_on
        if patterns and (validation or patterns != ("*",)):
            chosen["validation"] = matching(validation, patterns)
        cells: list[Cell] = []
        for split, documents in chosen.items():
            check_names([document.name for document in documents])
            _check_reach(documents, lengths[-1], split)
            for document in documents:
                cells += self._cells_of(document, split, lengths)
        check_head(self.model, chosen["test"][0].ids_T)
        return cells

    def _cells_of(self, document: Document, split: str, lengths: list[int]) -> list[Cell]:
        """Return a document's cells, the same windows for each length."""
        tokens = len(document.ids_T)
        place = {"document": document.name, "domain": document.domain, "split": split}
        if tokens < lengths[-1]:
            return [place | {"left_out": tokens}]
        ends = window_ends(tokens, lengths[-1], self.choices.windows, self.choices.score_tokens)
        return [place | {"end": end, "length": length} for end in ends for length in lengths]

    def measure(self, cell: Cell) -> Result:
        """Return {"nll": nats of each scored token, "seconds": of the pass}; nothing of a document left out."""
        from longreach.evaluation.likelihood import token_nll

        if "left_out" in cell:
            return {}
        document = next(d for d in self.documents if d.name == cell["document"])
        began = time.perf_counter()
        context_T = document.ids_T[cell["end"] - cell["length"] : cell["end"]]
        ids_T = with_first(context_T, first_token_id(self.tokenizer))
        nll_T = token_nll(self.model, ids_T, document.name, last=self.choices.score_tokens)
        return {"nll": nll_T.tolist(), "seconds": time.perf_counter() - began}

    @classmethod
    def scores(cls, choices: Choices, results: list[tuple[Cell, Result]]) -> EvalScores:
        """Return rows of kind `pooled` (by length, over a split's documents), `document`, `window` and `left_out`;
        NLL in nats per token, `own_gain` against the shortest length."""
        rows: list[Row] = []
        tokens, seconds = 0, 0.0
        for cell, result in results:
            if "left_out" in cell:
                place = {key: cell[key] for key in ("document", "domain", "split")}
                rows.append({"kind": "left_out"} | place | {"tokens": cell["left_out"]})
                continue
            scored = {"tokens": len(result["nll"]), "nll": float(np.mean(result["nll"]))}
            rows.append({"kind": "window"} | cell | scored)
            tokens += cell["length"]
            seconds += result["seconds"]
        documents = document_rows(rows)
        pooled = pooled_rows(documents, choices.seed)
        shortest = min(choices.lengths)
        summary = {}
        for row in pooled:
            if row["split"] == "test":
                summary[f"gain_nll_{row['length']}"] = row["nll"]
                if row["length"] > shortest:
                    summary[f"own_gain_{row['length']}"] = row["own_gain"]
        summary["gain_tokens_per_s"] = tokens / seconds
        return EvalScores(
            eval=cls.name,
            protocol=f"the same {choices.score_tokens:,} tokens scored at every length, with the nearest tokens before "
            "them; a causal pass for each length",
            recipe=choices.model_dump(mode="json"),
            rows=pooled + documents + rows,
            summary=summary,
            note=f"own_gain: nats per token better than the same model's {shortest:,} tokens.",
        )

    @classmethod
    def section(cls, models: dict[str, EvalScores], style: Style, background: Background) -> Section:
        """Return the NLL by length, each model's own gain, and both by document."""
        from longreach.evaluation.blocks import Section

        first = next(iter(models.values()))
        text = f"{cls.__doc__} Protocol: {first.protocol}. {about_documents(first)}"
        blocks: list[Block] = [text, nll_table(models), own_gain_table(models), *document_tables(models)]
        figures = cls.figures(models, style, background)
        if figures:
            blocks.append(figures)
        return Section(cls.title, blocks)

    @classmethod
    def figures(cls, models: dict[str, EvalScores], style: Style, background: Background) -> list[Figure]:
        """Return one model's own gain, a curve for each document; nothing for several models."""
        if len(models) > 1:
            return []
        (scores,) = models.values()
        return [_one_model_figure(scores, background)]


def _check_reach(documents: list[Document], longest: int, split: str) -> None:
    """Raise ValueError where no document of a split is as long as the longest length."""
    reach = max(documents, key=lambda document: len(document.ids_T))
    if len(reach.ids_T) < longest:
        advice = "lower the length or choose longer documents"
        if split == "validation":
            advice += ", or set choose_on to [] to choose on the test documents"
        raise ValueError(
            f"length {longest} is longer than every chosen {split} document; the longest, {reach.name}, has "
            f"{len(reach.ids_T)} tokens: {advice}"
        )


def window_ends(tokens: int, longest: int, windows: int, score_tokens: int) -> list[int]:
    """Return where a document's windows end: the last at its end, the others spread evenly down to the first place
    that the longest length reaches; fewer than `windows` where scored tokens would overlap."""
    room = tokens - longest
    count = min(windows, 1 + room // score_tokens)
    if count == 1:
        return [tokens]
    return [longest + room * n // (count - 1) for n in range(count)]


def document_rows(windows: list[Row]) -> list[Row]:
    """Return a row for each document and length: the mean over its windows, and the gain over the shortest length."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in windows:
        if row["kind"] == "window":
            groups.setdefault((row["split"], row["document"], row["length"]), []).append(row)
    shortest: dict[tuple[str, str], float] = {}
    rows = []
    for (split, document, length), of_document in sorted(groups.items()):
        nll = float(np.mean([row["nll"] for row in of_document]))
        short = shortest.setdefault((split, document), nll)  # lengths come in order
        rows.append(
            {
                "kind": "document",
                "document": document,
                "domain": of_document[0]["domain"],
                "split": split,
                "length": length,
                "windows": len(of_document),
                "tokens": sum(row["tokens"] for row in of_document),
                "nll": nll,
                "own_gain": short - nll,
            }
        )
    return rows


def pooled_rows(documents: list[Row], seed: int) -> list[Row]:
    """Return the mean over each split's documents by length, with intervals if there are two documents or more."""
    rows = []
    for split, length in sorted({(row["split"], row["length"]) for row in documents}):
        of_length = [row for row in documents if (row["split"], row["length"]) == (split, length)]
        pooled: Row = {"kind": "pooled", "document": ALL, "split": split, "length": length}
        pooled |= {"documents": len(of_length), "tokens": sum(row["tokens"] for row in of_length)}
        for measure in ("nll", "own_gain"):
            value_D = np.array([row[measure] for row in of_length])
            pooled[measure] = float(value_D.mean())
            interval = bootstrap_mean(value_D, seed)
            if interval:
                pooled[f"{measure}_low"], pooled[f"{measure}_high"] = interval
        rows.append(pooled)
    return rows


class Difference(NamedTuple):
    """How much better one model predicts than another, in nats per token; below 0: worse."""

    nats: float
    low: float
    """Of the 95% interval over documents; NaN with one document."""
    high: float
    documents: int


def difference(ours: list[Row], length: int, theirs: list[Row], their_length: int, seed: int = 0) -> Difference:
    """Return how much better we predict at `length` than they do at `their_length`: the same test tokens, paired.

    Raises:
        ValueError: the two did not score the same tokens.
    """
    our_places, their_places = _places(ours, length), _places(theirs, their_length)
    if our_places != their_places or not our_places:
        raise ValueError(f"at {length} and {their_length} tokens of context not the same tokens were scored")
    our_nll, their_nll = document_nll(ours, length), document_nll(theirs, their_length)
    better_D = np.array([their_nll[document] - our_nll[document] for document in our_nll])
    low, high = bootstrap_mean(better_D, seed) or (math.nan, math.nan)
    return Difference(float(better_D.mean()), low, high, len(better_D))


def document_nll(rows: list[Row], length: int) -> dict[str, float]:
    """Return the NLL of each test document at a length."""
    chosen = {}
    for row in rows:
        if row["kind"] == "document" and row["split"] == "test" and row["length"] == length:
            chosen[row["document"]] = row["nll"]
    return chosen


def _places(rows: list[Row], length: int) -> set[tuple[str, int, int]]:
    """Return which tokens of test documents were scored at a length."""
    places = set()
    for row in rows:
        if row["kind"] == "window" and row["split"] == "test" and row["length"] == length:
            places.add((row["document"], row["end"], row["tokens"]))
    return places


class BestLength(NamedTuple):
    """The length at which a model predicts best."""

    length: int
    split: str
    """Of the documents on which this was decided: validation, or test where there are no others."""
    documents: int


def best_length(rows: list[Row], most: int | None) -> BestLength:
    """Return a model's best length of at most `most` tokens (None: any), chosen on validation documents if there are
    any.

    Raises:
        ValueError: every length is above `most`.
    """
    pooled = [row for row in rows if row["kind"] == "pooled"]
    split = "validation" if any(row["split"] == "validation" for row in pooled) else "test"
    of_split = [row for row in pooled if row["split"] == split]
    reached = [row for row in of_split if most is None or row["length"] <= most]
    if not reached:
        lengths = [row["length"] for row in of_split]
        raise ValueError(f"no length of {lengths} is within the {most:,} tokens that the model was trained to")
    best = min(reached, key=lambda row: row["nll"])
    return BestLength(best["length"], split, best["documents"])


def about_documents(scores: EvalScores) -> str:
    """Say how many documents there are, which were left out, and how sure intervals are."""
    counts = dict.fromkeys(SPLITS, 0)
    for row in scores.rows_with(kind="pooled"):
        counts[row["split"]] = row["documents"]
    text = f"{_counted(counts['test'], 'test document')}"
    if counts["validation"]:
        text += f" and {counts['validation']} for validation, which only choose lengths"
    text += "."
    left_out = [f"{row['document']} ({row['tokens']:,} tokens)" for row in scores.rows_with(kind="left_out")]
    if left_out:
        text += f" Shorter than the longest length and left out: {', '.join(left_out)}."
    if counts["test"] > 1:
        text += " Small: 95% intervals over the test documents."
    if 1 < counts["test"] < FEW:
        text += f" Over so few as {counts['test']} they are too narrow."
    return text


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def nll_table(models: dict[str, EvalScores]) -> Table:
    """Return each model's NLL by length, with intervals."""
    return _length_table("NLL of the test documents (nats per token; lower is better) by context length", models, "nll")


def own_gain_table(models: dict[str, EvalScores]) -> Table:
    """Return what each model gains over its own shortest length, paired by document."""
    shortest = min(min(scores.recipe["lengths"]) for scores in models.values())
    caption = f"Own gain: nats per token better than the same model at {shortest:,} tokens (below 0: worse)"
    return _length_table(caption, models, "own_gain")


def _length_table(caption: str, models: dict[str, EvalScores], measure: str) -> Table:
    from longreach.evaluation.blocks import Table

    rows = {}
    for name, scores in models.items():
        for row in scores.rows_with(kind="pooled", split="test"):
            if measure == "nll" or row["length"] > min(scores.recipe["lengths"]):
                rows[name, row["length"]] = row
    lengths = sorted({length for _, length in rows})
    lines = [[name, *(_cell(rows.get((name, length)), measure) for length in lengths)] for name in models]
    return Table(caption, ["model", *(f"{length:,}" for length in lengths)], lines)


def _cell(row: Row | None, measure: str) -> str:
    """Return a mean and, small, its interval; a dash without a row."""
    from longreach.evaluation.sections import DASH

    if row is None:
        return DASH
    sign = "+" if measure == "own_gain" else ""
    text = f"{row[measure]:{sign}.3f}"
    if row.get(f"{measure}_low") is not None:
        text += f"\n{row[f'{measure}_low']:{sign}.3f} to {row[f'{measure}_high']:{sign}.3f}"
    return text


def document_tables(models: dict[str, EvalScores]) -> list[Table]:
    """Return the NLL of every test document, a line for each length, a column for each model."""
    from longreach.evaluation.blocks import Table
    from longreach.evaluation.sections import DASH

    cells: dict[tuple[str, int], dict[str, str]] = {}
    for name, scores in models.items():
        for row in scores.rows_with(kind="document", split="test"):
            cells.setdefault((row["document"], row["length"]), {})[name] = f"{row['nll']:.3f}"
    lines = []
    for (document, length), texts in sorted(cells.items()):
        lines.append([f"{document}\nat {length:,} tokens", *(texts.get(name, DASH) for name in models)])
    return [Table("By document (nats per token)", ["document", *models], lines)]


def _one_model_figure(scores: EvalScores, background: Background) -> Figure:
    """Draw one model's own gain by length, a curve for each test document and one for their mean."""
    from longreach.evaluation.figures import lines
    from longreach.evaluation.sections import document_style

    whole = "mean over documents"
    curves: dict[str, list[tuple[float, ...]]] = {whole: []}
    for row in scores.rows_with(kind="pooled", split="test"):
        point: tuple[float, ...] = (row["length"], row["own_gain"])
        if row.get("own_gain_low") is not None and row["own_gain"]:
            point += (row["own_gain_low"], row["own_gain_high"])
        curves[whole].append(point)
    for row in scores.rows_with(kind="document", split="test"):
        curves.setdefault(row["document"], []).append((row["length"], row["own_gain"]))
    return lines(
        "own-gain.png",
        f"What a longer context gains: {scores.model}",
        "Higher is better: the same tokens, predicted with more text before them. A fall past the trained length means "
        "that the model breaks there.",
        ("context length (tokens)", "nats per token gained"),
        curves,
        document_style(curves, whole),
        ticks=[point[0] for point in curves[whole]],
        marks=background.marks(),
    )
