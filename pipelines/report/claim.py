"""The first sentences of a report with the evaluation `gain`: the gain of training over all
untrained models.

The arm is compared with the untrained base at its best own length, and with the best untrained
stretch at the arm's length. The arm and the length are chosen on the validation documents, as is
the base's length; the numbers are those of the test documents. If an interval contains zero, the
sentence says that there is no measurable gain.

    claim_of(gather(artifacts)).sentences()
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

from longreach.evaluation.base import Background
from longreach.evaluation.gain import (
    BestLength,
    Difference,
    Gain,
    best_of_base,
    difference,
    over_base,
    over_itself,
    over_stretches,
)
from longreach.evaluation.gain_page import about_best
from longreach.evaluation.scores import EvalScores
from longreach.pipelines.report.findings import Findings

GAIN = Gain.name
MOST_OTHERS = 6  # arms that the sentences compare with the base beside the chosen one; the tables have all


@dataclass(frozen=True)
class Claim:
    """The chosen arm and length, and the gains over the base."""

    models: dict[str, EvalScores]
    background: Background
    best: BestLength
    over_base: dict[str, dict[int, Difference]]
    """Gain by arm or stretch, and by length."""
    name: str
    """The chosen arm; if nothing was trained, an untrained stretch."""
    length: int
    candidates: tuple[str, ...]
    """The names that the arm was chosen from, including its own."""

    def sentences(self) -> list[str]:
        """Return sentences on the arm's gain over the base, over stretches and over its own short
        context, and on the other arms."""
        background = self.background
        text = f"At {self.length:,} tokens"
        if background.trained_length:
            text += f", {self.length / background.trained_length:.3g} times what the base was trained to"
        base = about_best(self.best)
        found = self.over_base[self.name][self.length]
        text += f", {self.name}"
        if self.name not in background.arms:
            text += ", which is not trained,"
        trained = self.name in background.arms
        text += f" predicts held-out documents {verdict(found, base, counts=True, trained=trained)}"
        text += "".join(self._over_the_best_stretch())
        return [f"{text}.", *self._how_chosen(), *self._others(), *self._at_the_greatest_length(), *self._own()]

    def _over_the_best_stretch(self) -> list[str]:
        """Return a clause that compares the arm with the best untrained stretch at its length."""
        stretches = over_stretches(self.models, self.background).get(self.name, {})
        there = {}
        for stretch, by_length in stretches.items():
            if self.length in by_length:
                there[stretch] = by_length[self.length]
        if not there:
            return []
        hardest = min(there, key=lambda stretch: there[stretch].nats)
        what = f"{hardest} without any training"
        if len(there) > 1:
            what += f", the best of {len(there)} stretches there"
        return [f", and {verdict(there[hardest], what)}"]

    def _how_chosen(self) -> list[str]:
        if len(self.candidates) < 2:
            return []
        kind = "arms" if self.name in self.background.arms else "stretches"
        if self.best.split == "validation":
            return [f"On the validation documents it is the best of {len(self.candidates)} {kind}, at its best length."]
        return [f"It was chosen as the best of {len(self.candidates)} {kind} on these same documents."]

    def _others(self) -> list[str]:
        """Return a sentence that compares the other arms and variants with the base at the same
        length: the best of them, if there are more than MOST_OTHERS."""
        there = {}
        for name in dict.fromkeys([*self.candidates, *self.background.arms]):
            if name != self.name and self.length in self.over_base.get(name, {}):
                there[name] = self.over_base[name][self.length]
        if not there:
            return []
        who, names = "", list(there)
        if len(names) > MOST_OTHERS:
            who = f", the {MOST_OTHERS} of {len(names)} others with the largest gains on these documents"
            names = sorted(names, key=lambda name: -there[name].nats)[:MOST_OTHERS]
        parts = [f"{name} {brief_verdict(there[name])}" for name in names]
        return [f"At this length, compared with the same base{who}: {'; '.join(parts)}."]

    def _at_the_greatest_length(self) -> list[str]:
        """Return a sentence on the arm at the greatest measured length, unless that is the chosen
        one."""
        greatest = max(self.over_base[self.name])
        if greatest == self.length:
            return []
        return [f"At {greatest:,} tokens {self.name} is {brief_verdict(self.over_base[self.name][greatest])}."]

    def _own(self) -> list[str]:
        """Return a sentence on the arm's gain over its own shortest context, which cannot come from
        training on such texts alone."""
        if self.name not in self.background.arms:
            return []
        own, shortest = over_itself(self.models, self.background, self.name, self.length)
        return [f"With {self.length:,} tokens of context instead of {shortest:,}, {self.name} is {brief_verdict(own)}."]

    def ranked(self) -> list[str]:
        """Return the candidates measured at the length: the chosen one, then the others, best
        first."""
        measured = [name for name in self.candidates if self.length in self.over_base[name]]
        return sorted(measured, key=lambda name: (name != self.name, -self.over_base[name][self.length].nats))

    def against(self, ours: str, theirs: str) -> str:
        """Return a phrase that compares one arm with another at the length."""
        rows = []
        for arm in (ours, theirs):
            members = self.background.arms[arm]
            rows.append([self.models[member].rows for member in members if member in self.models])
        return brief_verdict(difference(rows[0], self.length, rows[1], self.length))


@lru_cache(maxsize=1)  # a page calls it six times, and each call pairs all models
def claim_of(found: Findings) -> Claim | None:
    """Return the claim; None unless `gain` measured the base within its trained length, and an arm
    or stretch on the same tokens."""
    background = found.background()
    models = background.of_one_base(found.scores_of(GAIN))
    try:
        best = best_of_base(models, background)
    except ValueError:  # the report's section on `gain` shows this error
        return None
    if best is None:
        return None
    compared = over_base(models, background, best)
    finetuned = found.of("finetune")
    candidates = tuple(name for name in compared if name in finetuned)
    if not candidates:
        candidates = tuple(name for name in compared if name in background.stretches)
    if not candidates:
        return None
    measured: set[int] = set()
    for name in candidates:
        measured.update(compared[name])
    lengths = sorted(measured)
    trained = background.trained_length or 0
    beyond = [length for length in lengths if length > trained] or lengths
    if best.split == "test":  # choosing a length on the reported documents would bias the result
        beyond = beyond[-1:]
    nll = {}
    for name in candidates:
        for length in beyond:
            if length in compared[name]:
                nll[name, length] = _mean_nll(models, background, name, length, best.split)
    if not nll:
        return None
    name, length = min(nll, key=lambda place: nll[place])
    return Claim(models, background, best, compared, name, length, candidates)


def _mean_nll(models: dict[str, EvalScores], background: Background, name: str, length: int, split: str) -> float:
    """Return the mean NLL of an arm or stretch on a split over its seeds; infinite if not
    measured."""
    values = []
    for member in background.arms.get(name, (name,)):
        if member in models:
            values += [row["nll"] for row in models[member].rows_with(kind="pooled", split=split, length=length)]
    return fmean(values) if values else math.inf


def verdict(found: Difference, what: str, *, counts: bool = False, trained: bool = False) -> str:
    """Return a phrase on whether a model predicts better than another, by how much, and with which
    confidence interval.

    Args:
        counts: Name the numbers of documents and, of a `trained` model, of seeds.
    """
    sure = _interval(found, counts, trained)
    if _is_unsure(found):
        return f"not measurably better or worse than {what} ({found.nats:+.3f} nats per token, {sure})"
    return f"{abs(found.nats):.3f} nats per token {_side(found)} ({sure}) than {what}"


def brief_verdict(found: Difference) -> str:
    """Return a short form of `verdict` that does not name the other model."""
    sure = _interval(found).removeprefix("95% interval ")
    if _is_unsure(found):
        return f"not measurably better or worse ({found.nats:+.3f}, {sure})"
    return f"{abs(found.nats):.3f} {_side(found)} ({sure})"


def _side(found: Difference) -> str:
    return "better" if found.nats > 0 else "worse"


def _is_unsure(found: Difference) -> bool:
    """Whether the interval contains zero."""
    return found.low <= 0 <= found.high


def _interval(found: Difference, counts: bool = False, trained: bool = False) -> str:
    """Return the interval as text, with signs turned if the model is worse; with `counts` also the
    number of documents and, of a `trained` model, of seeds."""
    if not math.isfinite(found.low):
        return "one document, no interval"
    low, high = f"{found.low:+.3f}", f"{found.high:+.3f}"
    if found.low > 0:
        low, high = f"{found.low:.3f}", f"{found.high:.3f}"
    elif found.high < 0:
        low, high = f"{-found.high:.3f}", f"{-found.low:.3f}"
    text = f"95% interval {low} to {high}"
    if counts:
        text += f", {found.documents} document"
        if found.documents != 1:
            text += "s"
        if trained:
            text += f", {found.seeds} seed"
            text += "s" if found.seeds > 1 else ""
    return text
