"""EvalScores: what an evaluation found, as tidy rows: one measurement a row, every row saying what it measures.

`write` makes a folder that needs no code of ours to be read: scores.json (everything but the cases), scores.parquet
(the rows, typed) and cases.jsonl (what the model was asked and what it said, one case a line).

    python -c "from longreach.evaluation.scores import EvalScores; print(EvalScores.read('scores').summary)"
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class EvalScores:
    """The result of one evaluation of one model."""

    eval: str
    """Name in EVALS."""
    protocol: str
    """What was computed, in a sentence; where there are several, rows name theirs in a column."""
    recipe: dict[str, Any]
    """The evaluation's choices, as JSON."""
    rows: list[dict[str, Any]]
    """Measurements; columns that a row lacks are null in scores.parquet."""
    summary: dict[str, float]
    """The few numbers that stand for the whole, by metric name."""
    note: str = ""
    """What a reader must know before comparing these numbers with others."""
    cases: list[dict[str, Any]] = field(default_factory=list)
    """Generated cases: prompt head and tail, expected, got."""
    model: str = ""
    """The model's name, also the first column of the rows once `named` has set it."""

    def named(self, model: str) -> EvalScores:
        """The same scores under a model's name."""
        return replace(self, model=model, rows=[{"model": model, "eval": self.eval} | row for row in self.rows])

    def write(self, out: Path) -> None:
        """scores.json, scores.parquet and cases.jsonl in the folder `out`; ValueError where a number is not finite."""
        for n, row in enumerate([self.summary, *self.rows]):
            if bad := [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]:
                place = f"row {n - 1}: {row}" if n else "the summary"
                raise ValueError(f"{self.eval}: {', '.join(bad)} in {place} is not finite: no score to keep")
        out.mkdir(parents=True, exist_ok=True)
        content = {key: value for key, value in asdict(self).items() if key != "cases"}
        (out / "scores.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        columns = dict.fromkeys(key for row in self.rows for key in row)
        pq.write_table(pa.table({key: [row.get(key) for row in self.rows] for key in columns}), out / "scores.parquet")
        lines = (json.dumps(case, ensure_ascii=False, allow_nan=False) + "\n" for case in self.cases)
        (out / "cases.jsonl").write_text("".join(lines), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path | str) -> EvalScores:
        """What `write` wrote."""
        content = json.loads((Path(folder) / "scores.json").read_text(encoding="utf-8"))
        with (Path(folder) / "cases.jsonl").open(encoding="utf-8") as lines:
            return cls(**content, cases=[json.loads(line) for line in lines])


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927), 95% by default: stays in [0, 1] and has a width at 0 and at 1."""
    share, shrink = successes / trials, 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / shrink
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_mean(values: np.ndarray, seed: int, resamples: int = 4_000) -> tuple[float, float] | None:
    """Percentile bootstrap 95% interval of the mean of independent `values`; None of fewer than two.

    Percentile intervals of a handful of values are too narrow: print how many there are.
    """
    if len(values) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(values[drawn].mean(-1), [0.025, 0.975])
    return float(low), float(high)


def retrieval_row(kind: str, cases: list[dict[str, Any]], length: int, depth: float | None) -> dict[str, Any]:
    """The mean of some cases in which something was looked for, with Wilson's interval of the share that was found."""
    correct = sum(case["correct"] for case in cases)
    low, high = wilson(correct, len(cases))
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
        "token_accuracy": float(np.mean([case["token_accuracy"] for case in cases])),
        "nll": float(np.mean([case["nll"] for case in cases])),
    }


EFFECTIVE = 0.9
"""Share of pass keys with which a length counts as used, where nothing else is asked for."""


def effective_length(totals: list[dict[str, Any]], bar: float) -> int:
    """The greatest length at which, and at all shorter ones, the accuracy reaches the bar; 0 if at none (RULER,
    arXiv:2404.06654). totals: rows of a retrieval evaluation, one a length."""
    reached = 0
    for row in sorted(totals, key=lambda r: r["length"]):
        if row["accuracy"] < bar:
            break
        reached = row["length"]
    return reached


def paired(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]], length: int, resamples: int = 4_000
) -> dict[str, float]:
    """How two models' scores (their rows) differ on the same tokens: {"nll": ours - theirs, "low", "high", "bins"}.

    The difference is taken in bins of last_tokens positions of each document, up to `length`; the 95% interval
    resamples bins, which are nearly independent where single tokens are not. ValueError unless both read the same
    documents.
    """
    bins = [
        {
            (r["document"], r["start"], r["end"]): r["nll"]
            for r in rows
            if r["kind"] == "position" and r["end"] <= length
        }
        for rows in (ours, theirs)
    ]
    if bins[0].keys() != bins[1].keys() or not bins[0]:
        raise ValueError(f"the two models were not measured on the same tokens up to {length}")
    difference = np.array([bins[0][key] - bins[1][key] for key in bins[0]])
    interval = bootstrap_mean(difference, seed=0, resamples=resamples) or (math.nan, math.nan)
    return {"nll": float(difference.mean()), "low": interval[0], "high": interval[1], "bins": len(difference)}
