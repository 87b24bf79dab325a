"""EvalScores: the measurements of an evaluation as tidy rows, one measurement per row.

`write` makes a folder that can be read without longreach: scores.json (everything except the
cases), scores.parquet (the rows, typed) and cases.jsonl (what the model was asked and what it
answered, one case per line).

    python -c "from longreach.evaluation.scores import EvalScores; print(EvalScores.read('scores').summary)"
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from longreach.infra.lazy import lazy_module

if TYPE_CHECKING:
    import numpy as np
else:
    np = lazy_module("numpy")

Row = dict[str, Any]
"""One measurement. Its `kind` determines its columns."""


@dataclass(frozen=True)
class EvalScores:
    """The result of one evaluation of one model."""

    eval: str
    """The evaluation's name in EVALS."""
    protocol: str
    """What was computed, in a sentence. If there are several protocols, each row names its protocol
    in a column."""
    recipe: dict[str, Any]
    """The evaluation's choices, as JSON."""
    rows: list[Row]
    """The measurements. Columns that a row lacks are null in scores.parquet."""
    summary: dict[str, float]
    """The few numbers that summarise the scores, by metric name."""
    note: str = ""
    """What a reader must know before comparing these numbers with others."""
    cases: list[Row] = field(default_factory=list)
    """The single questions: prompt, expected answer and the model's answer."""
    model: str = ""
    """The model's name. `named` sets it, and adds it to the rows as their first column."""

    def named(self, model: str) -> EvalScores:
        """Return a copy of these scores with a model's name."""
        return replace(self, model=model, rows=[{"model": model, "eval": self.eval} | row for row in self.rows])

    def rows_with(self, **columns: Any) -> list[Row]:
        """Return the rows whose columns have these values."""
        return [row for row in self.rows if columns.items() <= row.items()]

    def distinct(self, column: str, /, **columns: Any) -> list[Any]:
        """Return the distinct values of a column in the rows whose other columns have these values,
        in the order of the rows."""
        return list(dict.fromkeys(row[column] for row in self.rows_with(**columns)))

    def write(self, out: Path) -> None:
        """Write scores.json, scores.parquet and cases.jsonl into `out`.

        Raises:
            ValueError: a number is not finite.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._check_finite("the summary", self.summary)
        for number, row in enumerate(self.rows):
            self._check_finite(f"row {number}: {row}", row)
        out.mkdir(parents=True, exist_ok=True)
        content = asdict(self)
        del content["cases"]
        text = json.dumps(content, indent=1, allow_nan=False)
        (out / "scores.json").write_text(text + "\n", encoding="utf-8")
        columns = {}
        for key in dict.fromkeys(chain.from_iterable(self.rows)):
            columns[key] = [row.get(key) for row in self.rows]
        pq.write_table(pa.table(columns), out / "scores.parquet")
        with (out / "cases.jsonl").open("w", encoding="utf-8") as lines:
            for case in self.cases:
                lines.write(json.dumps(case, ensure_ascii=False, allow_nan=False) + "\n")

    def _check_finite(self, place: str, numbers: Row) -> None:
        """Raise ValueError if one of the numbers is not finite."""
        bad = []
        for key, value in numbers.items():
            if isinstance(value, float) and not math.isfinite(value):
                bad.append(key)
        if bad:
            raise ValueError(f"{self.eval}: {', '.join(bad)} in {place} is not finite, so the scores are not saved")

    @classmethod
    def read(cls, folder: Path | str) -> EvalScores:
        """Read scores from a folder that `write` made."""
        content = json.loads((Path(folder) / "scores.json").read_text(encoding="utf-8"))
        with (Path(folder) / "cases.jsonl").open(encoding="utf-8") as lines:
            return cls(**content, cases=list(map(json.loads, lines)))


class Difference(NamedTuple):
    """How much better one model predicts than another, in nats per token; below 0: worse."""

    nats: float
    low: float
    """Lower end of the 95% interval over documents and seeds; NaN with one document and one seed."""
    high: float
    documents: int
    seeds: int


def gathered(results: Iterable[tuple[Any, dict[str, Any]]], name: str) -> list[Row]:
    """Return the rows (or cases) that the cells' results have under a name, in one list."""
    rows: list[Row] = []
    for _, result in results:
        rows += result[name]
    return rows


def mean_of(rows: Iterable[Row], column: str) -> float:
    """Return the mean of a column over rows."""
    return float(np.mean([row[column] for row in rows]))


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a proportion (1927). It stays within [0, 1], and its width is
    not zero at 0 and 1."""
    z = 1.96
    share = successes / trials
    shrink = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / shrink
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)


def wilson_over_texts(cases: list[Row], values: Sequence[float]) -> tuple[float, float]:
    """Return Wilson's 95% interval of the mean of the cases' values (each from 0 to 1), over texts.

    Several questions about one text, or one question at several depths of it, are not independent
    trials.
    """
    shares = shares_by_text(cases, values)
    return wilson(sum(shares), len(shares))


def shares_by_text(cases: list[Row], values: Sequence[float]) -> list[float]:
    """Return the mean of the cases' values for each text. The `trial` of a case identifies its
    text."""
    by_text: dict[int, list[float]] = {}
    for case, value in zip(cases, values, strict=True):
        by_text.setdefault(case["trial"], []).append(value)
    return [float(np.mean(of_text)) for of_text in by_text.values()]


def mean_interval(value_SD: np.ndarray, weight_D: np.ndarray | None = None) -> tuple[float, float] | None:
    """Return the 95% interval of a mean over D documents [D], or over S seeds and D documents,
    crossed [S, D]; None for a single document, since seeds alone say nothing about other texts.

    The interval is Student's t, which accounts for small samples. Bootstrap percentiles do not:
    their 95% interval misses the mean of ten normal values 11 times in a hundred, and of three
    values 25 times. Documents and seeds are both random factors: their variances are added, and
    their degrees of freedom pooled (Satterthwaite 1946). Their interaction is in both variances, so
    the interval is rather too wide than too narrow.

    weight_D: weight of each document in the mean, such as its number of tokens; None: equal weights.
    """
    from scipy.special import stdtrit

    if value_SD.shape[-1] < 2:
        return None
    value_SD = np.atleast_2d(value_SD)
    documents = value_SD.shape[1]
    share_D = np.full(documents, 1.0)
    if weight_D is not None:
        share_D = weight_D / weight_D.mean()
    mean = float((value_SD * share_D).mean())
    around_D = share_D * (value_SD.mean(0) - mean)  # each document's contribution to the error of a ratio of sums
    around_S = (value_SD * share_D).mean(1) - mean
    variance, pooled = 0.0, 0.0
    for around in (around_D, around_S):
        if len(around) > 1:
            of_mean = float((around**2).sum()) / (len(around) * (len(around) - 1))
            variance += of_mean
            pooled += of_mean**2 / (len(around) - 1)
    half = 0.0
    if variance:
        half = float(stdtrit(variance**2 / pooled, 0.975)) * math.sqrt(variance)
    return mean - half, mean + half


def retrieval_row(kind: str, cases: list[Row], length: int, depth: float | None, *, over_texts: bool = False) -> Row:
    """Return the mean over cases in which something had to be found, with Wilson's 95% interval of
    the share found.

    over_texts: compute the interval over texts instead of cases; needed if each text is asked about
    several times.
    """
    found = [case["correct"] for case in cases]
    correct = sum(found)
    low, high = wilson(correct, len(cases))
    if over_texts:
        low, high = wilson_over_texts(cases, found)
    return {
        "kind": kind,
        "protocol": "teacher_forced",
        "length": length,
        "depth": depth,
        "trials": len(cases),
        "correct": correct,
        "accuracy": correct / len(cases),
        "accuracy_low": low,
        "accuracy_high": high,
        "token_accuracy": mean_of(cases, "token_accuracy"),
        "nll": mean_of(cases, "nll"),
    }


RULER_THRESHOLD = 0.856
"""RULER's threshold for an effective length: Llama-2-7B's score at 4,096 tokens (2404.06654)."""
KEPT_SHARE = 0.85
"""Share of the score at the shortest length that must be kept, as in NoLiMa (2502.05167)."""
PASSKEY_BAR = 0.9
"""Default of the share of pass keys that must be found for a length to count as used."""


def effective_length(totals: list[Row], bar: float) -> int:
    """Return the effective length: the longest length up to which the accuracy is at least `bar` at
    every length, or 0 if there is none (RULER, arXiv:2404.06654).

    totals: one row for each length, from an evaluation in which something has to be found.
    """
    reached = 0
    for row in sorted(totals, key=lambda row: row["length"]):
        if row["accuracy"] < bar:
            break
        reached = row["length"]
    return reached


def paired(ours: list[Row], theirs: list[Row], length: int, beyond: int = 0) -> dict[str, float]:
    """Return how the perplexity rows of two models differ on the same tokens: {"nll": ours - theirs,
    "low", "high", "documents"}, in nats per token.

    The difference is computed in bins of last_tokens positions of each document that end after its
    token `beyond` and at or before `length`. The 95% interval is over documents, weighted by their
    tokens, because bins of one document are not independent. With a single document, the interval
    is over its bins, and says nothing about other texts.

    Raises:
        ValueError: the two models did not read the same documents.
    """
    our_bins = _nll_by_bin(ours, length, beyond)
    their_bins = _nll_by_bin(theirs, length, beyond)
    if our_bins.keys() != their_bins.keys() or not our_bins:
        raise ValueError(f"the two models were not measured on the same tokens from {beyond:,} to {length:,}")
    differences: dict[str, list[float]] = {}
    widths: dict[str, list[int]] = {}
    for place, our_nll in our_bins.items():
        document, start, end = place
        differences.setdefault(document, []).append(our_nll - their_bins[place])
        widths.setdefault(document, []).append(end - start)  # the last bin of a text may have only one token
    if len(differences) > 1:
        means = [np.average(differences[name], weights=widths[name]) for name in differences]
        difference, width = np.array(means), np.array([sum(of_one) for of_one in widths.values()])
    else:
        (of_bins,), (of_widths,) = differences.values(), widths.values()
        difference, width = np.array(of_bins), np.array(of_widths)
    low, high = mean_interval(difference, width) or (math.nan, math.nan)
    nll = float(np.average(difference, weights=width))
    return {"nll": nll, "low": low, "high": high, "documents": len(differences)}


def _nll_by_bin(rows: list[Row], length: int, beyond: int) -> dict[tuple[str, int, int], float]:
    """Return the NLL of each bin (document, start, end) that ends after token `beyond` and at or
    before token `length`.

    If the model's rotary frequencies depend on the length (`position_in_pass`), the bins are those
    of the pass of `length` tokens.
    """
    of_pass = [row for row in rows if row["kind"] == "position_in_pass" and row["pass"] == length]
    bins = {}
    for row in of_pass or [row for row in rows if row["kind"] == "position"]:
        if beyond < row["end"] <= length:
            bins[row["document"], row["start"], row["end"]] = row["nll"]
    return bins
