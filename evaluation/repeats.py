"""Finds repeated sequences in a text and their distances, to measure whether distant context is
used.

Most tokens can be predicted from the text right before them, so a mean over all tokens hides the
effect of distant context. LongPPL (arXiv:2410.23771) selects tokens by a model's own scores. Here
the selection depends on the text only: a token counts as repeated at distance d if the sequence of
RUN tokens that ends with it occurred before, the last time d tokens earlier. A model that sees fewer
than d + RUN tokens cannot have copied it.

    >>> repeat_distances([7, 1, 2, 3, 4, 9, 1, 2, 3, 4], last=5)
    array([0, 0, 0, 0, 5])

Legend: T tokens, D documents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from longreach.evaluation.scores import Difference, EvalScores, Row, mean_interval
from longreach.infra.lazy import lazy_module

if TYPE_CHECKING:
    import numpy as np

    from longreach.evaluation.blocks import Table
else:
    np = lazy_module("numpy")

RUN = 4
"""Length of a repeated sequence in tokens. Only its last token is scored."""
FIRST_BAND_END = 1024
"""Upper end of the first band of distances. Each further band ends at twice the previous end."""
MAX_NLL_RISE = 0.5
"""Nats above the NLL at its best length from which a model counts as unable to read a length. (A
base past its trained length is more than 1 nat worse.)"""
MIN_TOKENS = 30
"""Minimum number of tokens of a band that is shown. With fewer, one or two sequences would determine
the mean."""


def repeat_distances(ids_T: Sequence[int], last: int) -> np.ndarray:
    """Return for each of the last `last` tokens the distance to the last earlier occurrence of the RUN
    tokens that end with it; 0 if there is none."""
    ends: dict[tuple[int, ...], int] = {}
    distances = np.zeros(len(ids_T), dtype=np.int64)
    for end in range(RUN, len(ids_T) + 1):
        run = tuple(ids_T[end - RUN : end])
        if run in ends:
            distances[end - 1] = end - ends[run]
        ends[run] = end
    return distances[len(ids_T) - last :]


def nats_by_distance(nll_T: np.ndarray, distances_T: np.ndarray) -> dict[str, list[float]]:
    """Return [number of repeated tokens, sum of their NLL in nats] by the upper end of their band of
    distances. Bands without tokens are left out."""
    bands: dict[str, list[float]] = {}
    for nll, distance in zip(nll_T.tolist(), distances_T.tolist(), strict=True):
        if distance:
            end = FIRST_BAND_END
            while distance > end:
                end *= 2
            band = bands.setdefault(str(end), [0, 0.0])
            band[0] += 1
            band[1] += nll
    return bands


def repeat_rows(place: Row, bands: Mapping[str, Sequence[float]]) -> list[Row]:
    """Return a row of kind `repeat` for each band of one window, with the tokens and their NLL."""
    rows = []
    for up_to, (tokens, nats) in sorted(bands.items(), key=lambda item: int(item[0])):
        rows.append({"kind": "repeat"} | place | {"up_to": int(up_to), "tokens": int(tokens), "nll": nats / tokens})
    return rows


class Repeated(NamedTuple):
    """A model's NLL of the repeated tokens in a band of distances."""

    tokens: int
    nll: float
    better: Difference
    """How much better than a baseline on the same tokens."""


def repeated(ours: Sequence[Sequence[Row]], theirs: Sequence[Row]) -> Repeated | None:
    """Return the NLL of a band's tokens by a model, or the seeds of an arm, compared with `theirs` on
    the same tokens; None if they did not score the same tokens.

    Means are over seeds and tokens, and the interval is over seeds and documents.
    """
    their_nats = _by_document(theirs)
    tokens = {document: count for document, (count, _) in their_nats.items()}
    better_SD, nll = [], []
    for rows in ours:
        our_nats = _by_document(rows)
        if {document: count for document, (count, _) in our_nats.items()} != tokens:
            return None
        better_SD.append([(their_nats[one][1] - our_nats[one][1]) / tokens[one] for one in tokens])
        nll.append(sum(nats for _, nats in our_nats.values()) / sum(tokens.values()))
    better, tokens_D = np.array(better_SD), np.array(list(tokens.values()))
    low, high = mean_interval(better, tokens_D) or (math.nan, math.nan)
    mean = float(np.average(better.mean(0), weights=tokens_D))
    return Repeated(int(tokens_D.sum()), float(np.mean(nll)), Difference(mean, low, high, len(tokens), len(ours)))


def _by_document(rows: Sequence[Row]) -> dict[str, tuple[int, float]]:
    """Return the tokens and nats of each document, summed over its windows, in the order of names."""
    totals: dict[str, tuple[int, float]] = {}
    for row in sorted(rows, key=lambda row: row["document"]):
        tokens, nats = totals.get(row["document"], (0, 0.0))
        totals[row["document"]] = (tokens + row["tokens"], nats + row["tokens"] * row["nll"])
    return totals


Bands = dict[int, list[list[Row]]]
"""Rows of kind `repeat` at one length by the upper end of their band, a list for each seed of an arm."""


def _bands(by_arm: Mapping[str, Sequence[EvalScores]]) -> tuple[dict[tuple[str, int], Bands], dict[int, int]]:
    """Return the rows of each (model, length), and the tokens of each band with at least MIN_TOKENS tokens."""
    found: dict[tuple[str, int], Bands] = {}
    tokens: dict[int, int] = {}
    for name, seeds in by_arm.items():
        for number, scores in enumerate(seeds):
            for row in scores.rows_with(kind="repeat", split="test"):
                of_seeds = found.setdefault((name, row["length"]), {}).setdefault(row["up_to"], [[] for _ in seeds])
                of_seeds[number].append(row)
    for bands in found.values():
        for up_to, (first, *_) in bands.items():
            count = sum(row["tokens"] for row in first)
            if count >= MIN_TOKENS:
                tokens[up_to] = max(tokens.get(up_to, 0), count)
    return found, dict(sorted(tokens.items()))


def over_yardstick(
    by_arm: Mapping[str, Sequence[EvalScores]], base: str, best: int
) -> dict[str, dict[int, Difference]]:
    """Return how much better each model predicts repeated tokens than `base` at `best` tokens, by
    model and upper end of a band.

    Each model is measured at its longest length with an NLL less than MAX_NLL_RISE above its best one.
    """
    found, tokens = _bands(by_arm)
    yardstick = found.get((base, best), {})
    differences: dict[str, dict[int, Difference]] = {}
    for name, seeds in by_arm.items():
        nll = {row["length"]: row["nll"] for row in seeds[0].rows_with(kind="pooled", split="test")}
        sound = [length for length in nll if nll[length] < min(nll.values()) + MAX_NLL_RISE]
        bands = found.get((name, max(sound, default=0)), {})
        for up_to in tokens:
            if up_to in bands and up_to in yardstick:
                one = repeated(bands[up_to], yardstick[up_to][0])
                if one:
                    differences.setdefault(name, {})[up_to] = one.better
    return differences


def repeat_table(by_arm: Mapping[str, Sequence[EvalScores]], base: str | None, best: int | None) -> list[Table]:
    """Return the table of the NLL of repeated tokens: a line for each model and length, a column for
    each band.

    There is no table if no band has MIN_TOKENS tokens, as in scores of earlier versions. The baseline is
    `base` at `best` tokens, if known.
    """
    from longreach.evaluation.blocks import Table
    from longreach.evaluation.sections import DASH

    found, tokens = _bands(by_arm)
    if not tokens:
        return []
    yardstick = found.get((base, best)) if base is not None and best is not None else None
    lines = []
    for (name, length), bands in found.items():
        cells = [f"{name}\nat {length:,} tokens"]
        for up_to in tokens:
            cell = DASH
            theirs = yardstick or bands
            if up_to in bands and up_to in theirs:
                one = repeated(bands[up_to], theirs[up_to][0])
                if one:
                    cell = _cell(one)
            cells.append(cell)
        lines.append(cells)
    heads = ["model", *(f"{_since(up_to)}\n{count:,} tokens" for up_to, count in tokens.items())]
    caption = f"Tokens that repeat a sequence of {RUN}, by the distance to its last occurrence (NLL in nats per token)"
    legend = (
        "A model that reads fewer tokens than this distance cannot copy them, so a benefit of distant context must "
        "show here."
    )
    if yardstick:
        legend += (
            f" In small type: nats per token better than {base} at {best:,} tokens, with the 95% interval over "
            f"documents."
        )
    return [Table(caption, heads, lines, legend=legend)]


def _since(up_to: int) -> str:
    return f"up to {up_to:,}" if up_to == FIRST_BAND_END else f"{up_to // 2 + 1:,} to {up_to:,}"


def _cell(one: Repeated) -> str:
    text = f"{one.nll:.3f}"
    if one.better.low < one.better.high:
        text += f"\n{one.better.nats:+.3f} ({one.better.low:+.3f} to {one.better.high:+.3f})"
    return text
