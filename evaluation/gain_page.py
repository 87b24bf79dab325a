"""Tables and figures of the evaluation "gain from context" (gain.py).

    blocks = words_and_tables(protocol, models, background)
    figures = gain_figure(models, style, background)        # with which a report on several models begins

Legend: S seeds, D documents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from longreach.evaluation.base import Background
from longreach.evaluation.gain import SPLITS, BestLength, best_of_base, over_base, over_stretches
from longreach.evaluation.scores import Difference, EvalScores, Row, mean_interval
from longreach.infra.lazy import lazy_module

if TYPE_CHECKING:
    import numpy as np

    from longreach.evaluation.blocks import Block, Figure, Table
    from longreach.evaluation.figures import Style
else:
    np = lazy_module("numpy")


def words_and_tables(protocol: str, models: dict[str, EvalScores], background: Background) -> list[Block]:
    """Return the part of a report on these models.

    protocol: sentences that say what was measured, with which the part begins.
    """
    from longreach.evaluation.gain_text import coloured_blocks
    from longreach.evaluation.key_tokens import key_table
    from longreach.evaluation.repeats import repeat_table

    text = f"{protocol} {about_documents(next(iter(models.values())))}"
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


def one_model_figure(scores: EvalScores, background: Background) -> Figure:
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
