"""Gain from context: how much better a model predicts the same tokens when it sees more text before
them.

A window is a place in a document where the text is cut off. The last `score_tokens` tokens before
it are scored at every context length L, each time with the L - score_tokens tokens right before
them. The scored tokens never change, so lengths can be compared. Windows of one document are
averaged, and confidence intervals are over documents.

The baseline for an extended model is what a user has without it: the untrained base at the best of
its own lengths. That length is chosen on the corpus' validation documents, and the gain is measured
on its test documents. On some texts a base predicts worse at 8,192 tokens than at 2,048, so its
longest length would be too easy to beat.

    longreach evaluate MODEL --eval gain --set lengths=[2048,8192] --set windows=2

Legend: T tokens, D documents.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Self

from pydantic import Field, model_validator

from longreach.evaluation.base import Background, Cell, DocumentNames, EvalChoices, Evaluation, Result, Selection
from longreach.evaluation.documents import Document, check_names, first_token_id, matching, named, with_first
from longreach.evaluation.scores import Difference, EvalScores, Row, mean_interval, mean_of
from longreach.infra.choices import New
from longreach.infra.lazy import lazy_module

if TYPE_CHECKING:
    import numpy as np

    from longreach.evaluation.blocks import Block, Figure
    from longreach.evaluation.figures import Style
else:
    np = lazy_module("numpy")

SPLITS = ("test", "validation")
ALL = "*"
"""The value of `document` in rows that are means over all documents."""


class Gain(Evaluation):
    """How much better does the model predict the same tokens when it sees more of the text before
    them?"""

    name = "gain"
    title = "Gain from context"
    gate = ("gain_over_base", "gain_over_stretches")

    class Choices(EvalChoices):
        """Gain from context: the same tokens of held-out documents, predicted with more and more
        text before them."""

        lengths: tuple[int, ...] = Field(default=(2048, 4096, 8192), min_length=2)
        """Context lengths in tokens, including the scored tokens. A model's own gain is relative to
        the shortest length."""
        base_lengths: New[tuple[int, ...]] = ()
        """Context lengths in tokens at which the untrained base is measured instead of `lengths`.
        The best of them is the baseline for all other models. Default: `lengths`."""
        score_tokens: int = Field(default=1024, ge=1)
        """Number of tokens that are scored at the end of each context. They are the same tokens at
        every length."""
        windows: int = Field(default=1, ge=1)
        """Number of windows in each document. One window ends at the document's end; several are
        spread evenly."""
        documents: DocumentNames = Field(default=("*",), min_length=1)
        """Names (shell patterns) of test documents. Documents shorter than the longest length are
        left out."""
        choose_on: DocumentNames = ("*",)
        """Names (shell patterns) of the validation documents on which the base's best length is
        chosen. If the list is empty, or the corpus has no validation documents, the length is
        chosen on the test documents, which favours the base."""

        @model_validator(mode="after")
        def _room_for_context(self) -> Gain.Choices:
            for name, lengths in (("lengths", self.lengths), ("base_lengths", self.base_lengths or self.lengths)):
                if min(lengths) <= self.score_tokens:
                    raise ValueError(
                        f"{name}: {min(lengths)} has no room for score_tokens {self.score_tokens} and a token "
                        f"before them: use a length of at least {self.score_tokens + 1}, or fewer score_tokens"
                    )
                if len(set(lengths)) < 2:
                    raise ValueError(f"{name}: {list(lengths)} is one length, but a gain needs two or more")
            if self.base_lengths and max(self.base_lengths) > max(self.lengths):
                raise ValueError(
                    f"base_lengths: {max(self.base_lengths)} is more than the longest of `lengths`, "
                    f"{max(self.lengths)}, up to which all models are compared: leave it out, or add it to lengths"
                )
            return self

        def of_model(self, is_base: bool) -> Self:
            """Return the choices for one model; `base_lengths` concerns only the base."""
            own = super().of_model(is_base)
            return own if is_base else own.model_copy(update={"base_lengths": ()})

        def selected(self) -> list[Selection]:
            """Return what is needed; validation documents only if `choose_on` names some."""
            selected: list[Selection] = [("documents", self.documents, ("test",))]
            if self.choose_on and self.choose_on != ("*",):
                selected.append(("choose_on", self.choose_on, ("validation",)))
            return selected

        @property
        def measured_lengths(self) -> list[int]:
            """The lengths at which this model is measured, in ascending order."""
            return sorted(set(self.base_lengths or self.lengths))

        def longest_input(self) -> int:
            """Return the largest number of tokens that this model reads at once."""
            return self.measured_lengths[-1]

    choices: Choices

    def cells(self) -> list[Cell]:
        """Return a cell for each pass (document, window, length), and one for each document that is
        left out.

        Raises:
            ValueError: no test document, or no validation document, has as many tokens as the
                longest length.
        """
        from longreach.evaluation.likelihood import check_head

        longest = max(self.choices.lengths)
        chosen = {"test": self._test_documents()}
        validation = [document for document in self.documents if document.split == "validation"]
        patterns = self.choices.choose_on
        if patterns and (validation or patterns != ("*",)):
            chosen["validation"] = matching(validation, patterns)
        cells: list[Cell] = []
        for split, documents in chosen.items():
            check_names([document.name for document in documents])
            _check_reach(documents, longest, split)
            for document in documents:
                cells += self._cells_of(document, split)
        check_head(self.model)
        self.check_reach(self.choices.longest_input() + (first_token_id(self.tokenizer) is not None))
        return cells

    def _test_documents(self) -> list[Document]:
        """Return the chosen test documents."""
        test = [document for document in self.documents if document.split != "validation"]
        return matching(test, self.choices.documents)

    def _cells_of(self, document: Document, split: str) -> list[Cell]:
        """Return the cells of a document. Its windows are the same for all lengths and models."""
        tokens, longest = len(document.ids_T), max(self.choices.lengths)
        place = {"document": document.name, "domain": document.domain, "split": split}
        if tokens < longest:
            return [place | {"left_out": tokens}]
        ends = window_ends(tokens, longest, self.choices.windows, self.choices.score_tokens)
        cells: list[Cell] = []
        for end in ends:
            for length in self.choices.measured_lengths:
                cells.append(place | {"end": end, "length": length})
        return cells

    def measure(self, cell: Cell) -> Result:
        """Return the measurements of a pass; an empty result for a document that is left out.

        Returns:
            "nll": NLL of each scored token, in nats.
            "repeats": NLL of the tokens that repeat a sequence, by distance (repeats.py).
            "seconds": duration of the pass.
            "texts": texts of the tokens that a page shows; only at the longest length, for a few
                documents.
        """
        from longreach.evaluation.gain_text import KEPT_TOKENS, token_texts
        from longreach.evaluation.likelihood import token_nll
        from longreach.evaluation.repeats import nats_by_distance, repeat_distances

        if "left_out" in cell:
            return {}
        document = named(self.documents, cell["document"])
        began = time.perf_counter()
        context_T = document.ids_T[cell["end"] - cell["length"] : cell["end"]]
        ids_T = with_first(context_T, first_token_id(self.tokenizer))
        nll_T = token_nll(self.model, ids_T, document.name, last=self.choices.score_tokens)
        seconds = time.perf_counter() - began
        whole_T = document.ids_T[cell["end"] - max(self.choices.lengths) : cell["end"]]  # the same for all models
        distances_T = repeat_distances(whole_T.tolist(), self.choices.score_tokens)
        repeats = nats_by_distance(nll_T, distances_T)
        result = {"nll": nll_T.tolist(), "repeats": repeats, "seconds": seconds}
        longest = cell["length"] == self.choices.measured_lengths[-1]
        if longest and cell["end"] == len(document.ids_T) and document.name in self._kept():
            shown = min(KEPT_TOKENS, self.choices.score_tokens)
            result["texts"] = token_texts(self.tokenizer, context_T[-shown:].tolist())
        return result

    def _kept(self) -> list[str]:
        """Return the names of the documents whose tokens' texts are kept."""
        from longreach.evaluation.gain_text import KEPT_DOCUMENTS

        reached = []
        for document in self._test_documents():
            if len(document.ids_T) >= max(self.choices.lengths):
                reached.append(document.name)
        return reached[:KEPT_DOCUMENTS]

    @classmethod
    def scores(cls, choices: Choices, results: list[tuple[Cell, Result]]) -> EvalScores:
        """Return rows of kind `pooled` (by length, over a split's documents), `document`, `window`,
        `repeat` (a window's tokens that repeat a sequence, by distance) and `left_out`. NLL is in
        nats per token; `own_gain` is relative to the shortest length."""
        from longreach.evaluation.gain_text import token_cases
        from longreach.evaluation.repeats import repeat_rows

        rows: list[Row] = []
        tokens, seconds = 0, 0.0
        for cell, result in results:
            if "left_out" in cell:
                place = {key: cell[key] for key in ("document", "domain", "split")}
                rows.append({"kind": "left_out"} | place | {"tokens": cell["left_out"]})
                continue
            scored = {"tokens": len(result["nll"]), "nll": float(np.mean(result["nll"]))}
            rows.append({"kind": "window"} | cell | scored)
            rows += repeat_rows(cell, result.get("repeats", {}))  # cells of earlier versions have none
            tokens += cell["length"]
            seconds += result["seconds"]
        documents = document_rows(rows)
        pooled = pooled_rows(documents)
        shortest = choices.measured_lengths[0]
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
            cases=token_cases(results),
        )

    @classmethod
    def words_and_tables(cls, models: dict[str, EvalScores], background: Background) -> list[Block]:
        """Return what each arm gains over the base at its best length, over untrained stretches, and
        over itself at its shortest length (gain_page.py)."""
        from longreach.evaluation.gain_page import words_and_tables

        protocol = f"{cls.question()} Protocol: {next(iter(models.values())).protocol}."
        return words_and_tables(protocol, models, background)

    @classmethod
    def figures(cls, models: dict[str, EvalScores], style: Style, background: Background) -> list[Figure]:
        """Return the figure of one model's own gain, with a curve for each document. For several
        models return `repeat_figure` (their report begins with `gain_figure`)."""
        from longreach.evaluation.gain_page import one_model_figure, repeat_figure

        if background.related is not None or len(models) > 1:
            return repeat_figure(models, style, background)
        (scores,) = models.values()
        return [one_model_figure(scores, background)]


def _check_reach(documents: list[Document], longest: int, split: str) -> None:
    """Raise ValueError if no document of a split has as many tokens as the longest length."""
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
    """Return the token positions at which a document's windows end.

    The last window ends with the document. The others are spread evenly, down to the first position
    with `longest` tokens before it. There are fewer than `windows` if scored tokens would overlap.
    """
    room = tokens - longest
    count = min(windows, 1 + room // score_tokens)
    if count == 1:
        return [tokens]
    return [longest + room * n // (count - 1) for n in range(count)]


def document_rows(windows: list[Row]) -> list[Row]:
    """Return a row for each document and length: the mean over the document's windows, and the gain
    over the shortest length."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in windows:
        if row["kind"] == "window":
            groups.setdefault((row["split"], row["document"], row["length"]), []).append(row)
    shortest: dict[tuple[str, str], float] = {}
    rows = []
    for (split, document, length), of_document in sorted(groups.items()):
        nll = mean_of(of_document, "nll")
        short = shortest.setdefault((split, document), nll)  # lengths are in ascending order
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


def pooled_rows(documents: list[Row]) -> list[Row]:
    """Return the mean over each split's documents by length, with intervals if there are at least
    two documents."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in documents:
        groups.setdefault((row["split"], row["length"]), []).append(row)
    rows = []
    for (split, length), of_length in sorted(groups.items()):
        pooled: Row = {"kind": "pooled", "document": ALL, "split": split, "length": length}
        pooled |= {"documents": len(of_length), "tokens": sum(row["tokens"] for row in of_length)}
        for measure in ("nll", "own_gain"):
            value_D = np.array([row[measure] for row in of_length])
            pooled[measure] = float(value_D.mean())
            interval = mean_interval(value_D)
            if interval:
                pooled[f"{measure}_low"], pooled[f"{measure}_high"] = interval
        rows.append(pooled)
    return rows


def difference(ours: Sequence[list[Row]], length: int, theirs: Sequence[list[Row]], their_length: int) -> Difference:
    """Return how much better `ours` at `length` predicts the same test tokens than `theirs` at
    `their_length`, paired by document.

    Args:
        ours: the rows of a model, or of each seed of an arm.
        theirs: the rows of the models to compare with. If there are as many as in `ours`, they are
            compared one to one. Otherwise each of `ours` is compared with their mean, and the
            interval does not cover their seeds.

    Raises:
        ValueError: the two did not score the same tokens.
    """
    groups = [list(theirs)] * len(ours)
    if len(ours) == len(theirs):
        groups = [[their_rows] for their_rows in theirs]
    better_SD = []
    for our_rows, their_group in zip(ours, groups, strict=True):
        our_places = _places(our_rows, length)
        if not our_places or any(_places(rows, their_length) != our_places for rows in their_group):
            raise ValueError(f"the tokens scored at context lengths {length} and {their_length} are not the same")
        our_nll = document_nll(our_rows, length)
        their_nll = [document_nll(rows, their_length) for rows in their_group]
        better = []
        for document in sorted(our_nll):
            better.append(mean_of(their_nll, document) - our_nll[document])
        better_SD.append(better)
    value_SD = np.array(better_SD)
    low, high = mean_interval(value_SD) or (math.nan, math.nan)
    seeds, documents = value_SD.shape
    return Difference(float(value_SD.mean()), low, high, documents, seeds)


def document_nll(rows: list[Row], length: int) -> dict[str, float]:
    """Return the NLL of each test document at a length."""
    chosen = {}
    for row in rows:
        if row["kind"] == "document" and row["split"] == "test" and row["length"] == length:
            chosen[row["document"]] = row["nll"]
    return chosen


def _places(rows: list[Row], length: int) -> set[tuple[str, int, int]]:
    """Return (document, end, tokens) of every window of test documents scored at a length."""
    places = set()
    for row in rows:
        if row["kind"] == "window" and row["split"] == "test" and row["length"] == length:
            places.add((row["document"], row["end"], row["tokens"]))
    return places


class BestLength(NamedTuple):
    """The length at which a model predicts best."""

    length: int
    split: str
    """Split on which the length was chosen: validation, or test if there are no validation
    documents."""
    documents: int


def best_length(rows: list[Row], most: int | None) -> BestLength:
    """Return a model's best length of at most `most` tokens (None: no limit), chosen on validation
    documents if there are any.

    Raises:
        ValueError: every length is above `most`, or there are no lengths.
    """
    pooled: dict[str, list[Row]] = {"test": []}
    for row in rows:
        if row["kind"] == "pooled":
            pooled.setdefault(row["split"], []).append(row)
    split = "validation" if "validation" in pooled else "test"
    if not pooled[split]:
        raise ValueError("the scores have no row of kind pooled, so there is no length to choose: evaluate gain again")
    reached = [row for row in pooled[split] if most is None or row["length"] <= most]
    if not reached:
        lengths = [row["length"] for row in pooled[split]]
        raise ValueError(f"no length of {lengths} is within the {most:,} tokens that the model was trained to")
    best = min(reached, key=lambda row: row["nll"])
    return BestLength(best["length"], split, best["documents"])


def best_of_base(models: Mapping[str, EvalScores], background: Background) -> BestLength | None:
    """Return the base's best length within its trained length; None if the base was not measured.

    Raises:
        ValueError: the base was measured only at longer lengths.
    """
    if background.base is None or background.base not in models:
        return None
    return best_length(models[background.base].rows, background.trained_length)


def over_base(
    models: Mapping[str, EvalScores], background: Background, best: BestLength
) -> dict[str, dict[int, Difference]]:
    """Return how much better each arm, each stretch and the base predict than the base at its best
    length, by length.

    An arm with several seeds is one entry. Models that did not score the same tokens as the base
    are left out.
    """
    assert background.base is not None, "its best length is known"
    base = models[background.base].rows
    found = {}
    for name, rows in _subjects(models, background).items():
        by_length = _differences(rows, [base], best.length)
        if by_length:
            found[name] = by_length
    return found


def over_stretches(
    models: Mapping[str, EvalScores], background: Background
) -> dict[str, dict[str, dict[int, Difference]]]:
    """Return how much better each arm predicts than each untrained stretch at the same length, by
    arm, stretch and length."""
    subjects = _subjects(models, background)
    found: dict[str, dict[str, dict[int, Difference]]] = {}
    for arm in background.arms:
        for stretch in background.stretches:
            if arm in subjects and stretch in subjects:
                by_length = _differences(subjects[arm], subjects[stretch])
                if by_length:
                    found.setdefault(arm, {})[stretch] = by_length
    return found


def over_itself(
    models: Mapping[str, EvalScores], background: Background, arm: str, length: int
) -> tuple[Difference, int]:
    """Return how much better an arm predicts at `length` tokens than at its own shortest length, and
    that shortest length."""
    rows = _subjects(models, background)[arm]
    shortest = min(row["length"] for row in rows[0] if row["kind"] == "pooled")
    return difference(rows, length, rows, shortest), shortest


def _subjects(models: Mapping[str, EvalScores], background: Background) -> dict[str, list[list[Row]]]:
    """Return the rows of the base, the stretches and the arms that were measured, a list of rows for
    each seed."""
    groups = {name: (name,) for name in (background.base, *background.stretches) if name}
    subjects = {}
    for name, members in (groups | dict(background.arms)).items():
        measured = [models[member].rows for member in members if member in models]
        if measured:
            subjects[name] = measured
    return subjects


def _differences(
    ours: list[list[Row]], theirs: list[list[Row]], their_length: int | None = None
) -> dict[int, Difference]:
    """Return the differences by length to `theirs` at `their_length`, or (None) at the same length."""
    lengths = sorted({row["length"] for row in ours[0] if row["kind"] == "pooled" and row["split"] == "test"})
    found = {}
    for length in lengths:
        try:
            found[length] = difference(ours, length, theirs, their_length or length)
        except ValueError:  # `theirs` read other documents, or was not measured at this length
            continue
    return found
