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
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, Self

from pydantic import Field, model_validator

from longreach.evaluation.base import Background, Cell, DocumentNames, EvalChoices, Evaluation, Result, Selection
from longreach.evaluation.documents import Document, check_names, first_token_id, matching, named, with_first
from longreach.evaluation.scores import Difference, EvalScores, Row, mean_interval, mean_of
from longreach.infra.choices import New
from longreach.infra.lazy import lazy_module

if TYPE_CHECKING:
    import numpy as np

    from longreach.evaluation.blocks import Block, Figure, Table
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
        over itself at its shortest length."""
        from longreach.evaluation.gain_text import coloured_blocks
        from longreach.evaluation.key_tokens import key_table
        from longreach.evaluation.repeats import repeat_table

        first = next(iter(models.values()))
        text = f"{cls.question()} Protocol: {first.protocol}. {about_documents(first)}"
        by_arm = _by_arm(models, background)
        if max(map(len, by_arm.values())) > 1:
            text += " For an arm with several seeds, numbers are means, and its intervals are over documents and seeds."
        blocks: list[Block] = [text]
        compared = background.of_one_base(models)
        try:
            best = best_of_base(compared, background)
        except ValueError as error:  # no length that the base was trained to
            best = None
            blocks.append(f"No model is compared with the base: {error}.")
        if best:
            blocks += [_base_table(compared, background, best), *_stretch_table(compared, background)]
        yardstick = (background.base, best.length) if best else (None, None)
        compared_by_arm = _by_arm(compared, background)
        repeats = repeat_table(compared_by_arm, *yardstick)
        keys = key_table(compared_by_arm, background)
        tables = [own_gain_table(by_arm), *repeats, *keys, nll_table(by_arm), document_table(by_arm)]
        return [*blocks, *tables, *coloured_blocks(models)]

    @classmethod
    def figures(cls, models: dict[str, EvalScores], style: Style, background: Background) -> list[Figure]:
        """Return the figure of one model's own gain, with a curve for each document. For several
        models return `repeat_figure` (their report begins with `gain_figure`)."""
        if background.related is not None or len(models) > 1:
            return repeat_figure(models, style, background)
        (scores,) = models.values()
        return [_one_model_figure(scores, background)]


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


def about_documents(scores: EvalScores) -> str:
    """Return sentences on the number of documents, those left out, and what the intervals are over."""
    counts = dict.fromkeys(SPLITS, 0)
    for row in scores.rows_with(kind="pooled"):
        counts[row["split"]] = row["documents"]
    text = f"{_counted(counts['test'], 'test document')}"
    if counts["validation"]:
        text += f" and {counts['validation']} for validation, which are used only to choose lengths"
    text += "."
    left_out = [f"{row['document']} ({row['tokens']:,} tokens)" for row in scores.rows_with(kind="left_out")]
    if left_out:
        text += f" Shorter than the longest length, so left out: {', '.join(left_out)}."
    if counts["test"] > 1:
        text += " In small type: 95% intervals over the test documents."
    return text


def _counted(number: int, noun: str) -> str:
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}s"


def about_best(best: BestLength) -> str:
    """Return a phrase that names the base's length used as baseline, and how it was chosen."""
    how = f"chosen on {_counted(best.documents, 'validation document')}"
    if best.split == "test":
        how = "chosen on the test documents themselves, which favours it"
    return f"the base at the best of its own lengths ({best.length:,} tokens, {how})"


def _base_table(models: dict[str, EvalScores], background: Background, best: BestLength) -> Table:
    """Return the table of what each arm and each stretch gains over the base at its best length."""
    caption = f"Nats per token better than {about_best(best)}; below 0: worse"
    return _difference_table(caption, over_base(models, background, best))


def _stretch_table(models: dict[str, EvalScores], background: Background) -> list[Table]:
    """Return the table of what each arm gains over each untrained stretch, if there are any."""
    lines = {}
    for arm, stretches in over_stretches(models, background).items():
        for stretch, by_length in stretches.items():
            lines[f"{arm} over {stretch}"] = by_length
    if not lines:
        return []
    return [_difference_table("Nats per token better than untrained stretches at the same length", lines)]


def _difference_table(caption: str, lines: Mapping[str, Mapping[int, Difference]]) -> Table:
    from longreach.evaluation.blocks import Table
    from longreach.evaluation.sections import DASH, with_commas

    lengths = sorted(set(chain(*lines.values())))
    rows = []
    for name, by_length in lines.items():
        seeds = max(one.seeds for one in by_length.values())
        if seeds > 1:
            name += f"\n{seeds} seeds"
        cells = []
        for length in lengths:
            cells.append(difference_cell(by_length.get(length)) or DASH)
        rows.append([name, *cells])
    return Table(caption, ["", *with_commas(lengths)], rows)


def difference_cell(found: Difference | None) -> str:
    """Return the text of a difference with its interval in small type; empty for None."""
    if found is None:
        return ""
    text = f"{found.nats:+.3f}"
    if math.isfinite(found.low) and found.low != found.high:
        text += f"\n{found.low:+.3f} to {found.high:+.3f}"
    return text


def _by_arm(models: Mapping[str, EvalScores], background: Background) -> dict[str, list[EvalScores]]:
    """Return the models in their order, with the seeds of an arm as one entry. Seeds that did not
    score the same tokens stay separate."""
    arm_of: dict[str, str] = {}
    for arm, members in background.arms.items():
        measured = [member for member in members if member in models]
        if len({_scored(models[member]) for member in measured}) == 1:
            arm_of |= dict.fromkeys(measured, arm)
    groups: dict[str, list[EvalScores]] = {}
    for name, scores in models.items():
        groups.setdefault(arm_of.get(name, name), []).append(scores)
    return groups


def _scored(scores: EvalScores) -> frozenset[tuple[str, int, int]]:
    """Return (document, end, length) of every scored window of test documents."""
    windows = scores.rows_with(kind="window", split="test")
    return frozenset((row["document"], row["end"], row["length"]) for row in windows)


def nll_table(by_arm: Mapping[str, Sequence[EvalScores]]) -> Table:
    """Return the table of each model's NLL by length, with intervals."""
    return _length_table("NLL of the test documents (nats per token; lower is better) by context length", by_arm, "nll")


def own_gain_table(by_arm: Mapping[str, Sequence[EvalScores]]) -> Table:
    """Return the table of each model's gain over its own shortest length, paired by document and
    seed."""
    shortest = {_shortest(seeds[0]) for seeds in by_arm.values()}
    its = "its shortest length"
    if len(shortest) == 1:
        its = f"{shortest.pop():,} tokens"
    caption = f"Own gain: nats per token better than the same model at {its} (below 0: worse)"
    return _length_table(caption, by_arm, "own_gain")


def _shortest(scores: EvalScores) -> int:
    """Return the shortest length at which a model was measured on test documents."""
    return min(row["length"] for row in scores.rows_with(kind="pooled", split="test"))


def _length_table(caption: str, by_arm: Mapping[str, Sequence[EvalScores]], measure: str) -> Table:
    from longreach.evaluation.blocks import Table
    from longreach.evaluation.sections import with_commas

    means: dict[tuple[str, int], Row] = {}
    for name, seeds in by_arm.items():
        for row in seeds[0].rows_with(kind="pooled", split="test"):
            length = row["length"]
            if measure == "nll" or length > _shortest(seeds[0]):
                if len(seeds) > 1:
                    row = mean_over_seeds(seeds, length, measure)
                means[name, length] = row
    lengths = sorted({length for _, length in means})
    lines = []
    for name, seeds in by_arm.items():
        cells = [_cell(means.get((name, length)), measure) for length in lengths]
        lines.append([_counting(name, seeds), *cells])
    return Table(caption, ["model", *with_commas(lengths)], lines)


def mean_over_seeds(seeds: Sequence[EvalScores], length: int, measure: str) -> Row:
    """Return the mean of a measure over an arm's seeds and all test documents, with the interval
    over both."""
    value_SD = []
    for scores in seeds:
        rows = scores.rows_with(kind="document", split="test", length=length)
        value_SD.append([row[measure] for row in sorted(rows, key=lambda row: row["document"])])
    values = np.array(value_SD)
    row: Row = {measure: float(values.mean())}
    interval = mean_interval(values)
    if interval:
        row[f"{measure}_low"], row[f"{measure}_high"] = interval
    return row


def _counting(name: str, seeds: Sequence[EvalScores]) -> str:
    """Return a model's name and, if there are several seeds, their number in small type."""
    return name if len(seeds) == 1 else f"{name}\n{len(seeds)} seeds"


def _cell(row: Row | None, measure: str) -> str:
    """Return the text of a mean with its interval in small type; a dash for None."""
    from longreach.evaluation.sections import DASH, with_interval

    if row is None:
        return DASH
    shown = "{:+.3f}".format if measure == "own_gain" else "{:.3f}".format
    return with_interval(shown, row[measure], row.get(f"{measure}_low"), row.get(f"{measure}_high"))


def document_table(by_arm: Mapping[str, Sequence[EvalScores]]) -> Table:
    """Return the table of every test document's NLL: a line for each length, a column for each
    model."""
    from longreach.evaluation.blocks import Table
    from longreach.evaluation.sections import DASH

    cells: dict[tuple[str, int], dict[str, str]] = {}
    for name, seeds in by_arm.items():
        nll: dict[tuple[str, int], list[float]] = {}
        for scores in seeds:
            for row in scores.rows_with(kind="document", split="test"):
                nll.setdefault((row["document"], row["length"]), []).append(row["nll"])
        for place, values in nll.items():
            cells.setdefault(place, {})[name] = f"{np.mean(values):.3f}"
    lines = []
    for (document, length), texts in sorted(cells.items()):
        lines.append([f"{document}\nat {length:,} tokens", *(texts.get(name, DASH) for name in by_arm)])
    return Table("By document (nats per token)", ["document", *by_arm], lines)


def gain_figure(models: dict[str, EvalScores], style: Style, background: Background) -> list[Figure]:
    """Draw the gain of each arm, stretch and the base over the base at its best length, by context
    length.

    Return no figure if the base was not measured within its trained length.
    """
    compared = background.of_one_base(models)
    best = _best_if_any(compared, background)
    if best is None:
        return []
    found = over_base(compared, background, best)
    caption = f"Above 0: better than {about_best(best)}, on the same tokens."
    figure = _Compared("gain.png", "Gain from context", "context length (tokens)", caption)
    return [figure.draw(found, best, style, background)]


def repeat_figure(models: dict[str, EvalScores], style: Style, background: Background) -> list[Figure]:
    """Draw how much better each model predicts repeated tokens than the base at its best length, by
    the distance to the last occurrence of the repeated sequence.

    Each model is drawn at the longest length that it can read. Return no figure if there are no
    such tokens, or if the base was not measured within its trained length.
    """
    from longreach.evaluation.repeats import over_yardstick

    compared = background.of_one_base(models)
    best = _best_if_any(compared, background)
    if best is None or background.base is None:
        return []
    found = over_yardstick(_by_arm(compared, background), background.base, best.length)
    found.pop(background.base, None)  # the base is the zero line
    if not found:
        return []
    caption = (
        "Only tokens that end a sequence which occurred before, each model at the longest length that it can read. "
        f"Above 0: better than {about_best(best)}. If the last occurrence is further back than the base reads, only a "
        "model with a longer context can copy it."
    )
    title = "Is distant text used?"
    figure = _Compared("repeats.png", title, "distance to the last occurrence (tokens, up to)", caption)
    return [figure.draw(found, best, style, background)]


def _best_if_any(models: Mapping[str, EvalScores], background: Background) -> BestLength | None:
    """Return the base's best length; None if it was not measured within its trained length."""
    try:
        return best_of_base(models, background)
    except ValueError:
        return None


class _Compared(NamedTuple):
    """A figure of differences to the base at its best length, which is the zero line."""

    file: str
    title: str
    axis: str  # label of the x axis, which counts tokens on a log scale
    caption: str

    def draw(
        self, found: Mapping[str, Mapping[int, Difference]], best: BestLength, style: Style, background: Background
    ) -> Figure:
        """Draw the differences by model and x value, each with its interval."""
        from longreach.evaluation.figures import GREY, Look, lines

        ticks = sorted(set(chain(*found.values())))
        low, high = _picture(found, background)
        zero = f"the base at its best ({best.length:,})"
        curves: dict[str, list[tuple[float, ...]]] = {zero: [(tick, 0.0) for tick in ticks]}
        below = []
        step = min(0.04, 0.24 / len(found))  # octaves; 12,288 and 16,384 are 0.4 apart
        for number, (name, by_tick) in enumerate(found.items()):
            curves[name] = []
            beside = 2 ** (step * (number - (len(found) - 1) / 2))  # so that bars of one length do not overlap
            for tick, one in by_tick.items():
                if one.nats < low:
                    below.append(f"{name} at {tick:,} ({one.nats:+.2f})")
                point: tuple[float, ...] = (tick * beside, one.nats)
                if one.high > one.low:
                    point += (one.low, one.high)
                curves[name].append(point)
        sentences = [self.caption, *_about_bars(found)]
        if below:
            sentences.append(f"Below the range of the figure: {', '.join(below)}.")
        return lines(
            self.file,
            self.title,
            " ".join(sentences),
            (self.axis, "nats per token better than the base's best"),
            curves,
            style.with_looks({zero: Look(GREY, line="dashed")}),
            ticks=ticks,
            marks=background.marks(),
            y_range=(low, high),
        )


def _about_bars(found: Mapping[str, Mapping[int, Difference]]) -> list[str]:
    """Return a sentence on the error bars of a figure of differences, or nothing if it has none."""
    documents = seeds = 0
    for by_length in found.values():
        for one in by_length.values():
            documents = max(documents, one.documents)
            seeds = max(seeds, one.seeds)
    if documents < 2:
        return []
    over = f"{documents} test documents"
    if seeds > 1:
        over += " and an arm's seeds"
    return [f"Bars, drawn side by side at each length: paired 95% intervals over {over}."]


def _picture(found: Mapping[str, Mapping[int, Difference]], background: Background) -> tuple[float, float]:
    """Return the range of the y axis: around the arms, or around all models if there are no arms.

    A base that breaks past its trained length is several nats away, and would compress all other
    curves into one line.
    """
    arms = found.keys() & background.arms.keys()
    inner, outer = [0.0], [0.0]
    for name, by_length in found.items():
        for one in by_length.values():
            ends = list(filter(math.isfinite, (one.nats, one.low, one.high)))
            outer += ends
            if name in arms or not arms:
                inner += ends
    span = max(max(inner) - min(inner), 0.02)
    low, high = max(min(outer), min(inner) - 0.6 * span), min(max(outer), max(inner) + 0.6 * span)
    return low - 0.08 * span, high + 0.15 * span  # the label of the vertical line is at the top


def _one_model_figure(scores: EvalScores, background: Background) -> Figure:
    """Draw one model's own gain by length: a curve for each test document and one for their mean."""
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
        f"Gain from a longer context: {scores.model}",
        "Higher is better: the same tokens, predicted with more text before them. A drop past the trained length means "
        "that the model breaks there.",
        ("context length (tokens)", "nats per token gained"),
        curves,
        document_style(curves, whole),
        ticks=[point[0] for point in curves[whole]],
        marks=background.marks(),
    )
