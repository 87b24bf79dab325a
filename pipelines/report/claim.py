"""What a report says first where the evaluation `gain` was run: what training gained over all that
needs none.

The yardstick is the untrained base at the best of its own lengths, and beside it the best untrained
stretch at the arm's length. Which arm and which length are spoken of is decided on the validation
documents, like the base's length; the numbers are those of the test documents. An interval that
holds zero is no gain, and is said to be none.

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
    about_best,
    best_of_base,
    difference,
    over_base,
    over_itself,
    over_stretches,
)
from longreach.evaluation.scores import EvalScores
from longreach.pipelines.report.findings import Findings

GAIN = Gain.name


@dataclass(frozen=True)
class Claim:
    """Which arm is spoken of, at which length, and what everything is held against."""

    models: dict[str, EvalScores]
    background: Background
    best: BestLength
    over_base: dict[str, dict[int, Difference]]
    """By arm or stretch and length."""
    name: str
    """The arm; where nothing was trained, an untrained stretch."""
    length: int
    candidates: tuple[str, ...]
    """What the arm was chosen from, itself included."""

    def sentences(self) -> list[str]:
        """Say what the arm gains over the base, over stretches and over itself, and what the other
        arms do."""
        background = self.background
        text = f"At {self.length:,} tokens"
        if background.trained_length:
            text += f", {self.length / background.trained_length:.3g} times what the base was trained to"
        base = about_best(self.best)
        found = self.over_base[self.name][self.length]
        text += f", {self.name}"
        if self.name not in background.arms:
            text += ", which is not trained,"
        text += f" predicts held-out documents {verdict(found, base, counts=True)}"
        text += "".join(self._over_the_best_stretch())
        return [f"{text}.", *self._how_chosen(), *self._others(), *self._at_the_greatest_length(), *self._own()]

    def _over_the_best_stretch(self) -> list[str]:
        """Say how the arm compares with the untrained stretch that is hardest to beat at its
        length."""
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
        return [f"It is the best of {len(self.candidates)} {kind} on these very documents."]

    def _others(self) -> list[str]:
        """Say how all other arms, and variants of arms, compare with the base at the same
        length."""
        parts = []
        for name in dict.fromkeys([*self.candidates, *self.background.arms]):
            if name != self.name and self.length in self.over_base.get(name, {}):
                parts.append(f"{name} {brief_verdict(self.over_base[name][self.length])}")
        if not parts:
            return []
        return [f"At this length against the same base: {'; '.join(parts)}."]

    def _at_the_greatest_length(self) -> list[str]:
        """Say how the arm does at the greatest length measured, unless that is the one spoken
        of."""
        greatest = max(self.over_base[self.name])
        if greatest == self.length:
            return []
        return [f"At {greatest:,} tokens {self.name} is {brief_verdict(self.over_base[self.name][greatest])}."]

    def _own(self) -> list[str]:
        """Say what the arm gains over its own shortest context, which training on such texts alone
        would not give."""
        if self.name not in self.background.arms:
            return []
        own, shortest = over_itself(self.models, self.background, self.name, self.length)
        return [f"With {self.length:,} tokens of context instead of {shortest:,}, {self.name} is {brief_verdict(own)}."]

    def ranked(self) -> list[str]:
        """Return the candidates that were measured at the length, best first after the one that is
        spoken of."""
        measured = [name for name in self.candidates if self.length in self.over_base[name]]
        return sorted(measured, key=lambda name: (name != self.name, -self.over_base[name][self.length].nats))

    def against(self, ours: str, theirs: str) -> str:
        """Say how one arm compares with another at the length."""
        rows = []
        for arm in (ours, theirs):
            members = self.background.arms[arm]
            rows.append([self.models[member].rows for member in members if member in self.models])
        return brief_verdict(difference(rows[0], self.length, rows[1], self.length))


@lru_cache(maxsize=1)  # a page asks six times, and each answer pairs all models
def claim_of(found: Findings) -> Claim | None:
    """Return what is claimed; None where `gain` did not measure the base within its trained length
    and an arm or a stretch on the same tokens."""
    background = found.background()
    models = background.of_one_base(found.scores_of(GAIN))
    try:
        best = best_of_base(models, background)
    except ValueError:  # the section of `gain` says so
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
    if best.split == "test":  # choosing a length on the documents that are reported would be a choice of luck
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
    """Return an arm's or a stretch's mean NLL on a split, over its seeds; infinite where it was not
    measured there."""
    values = []
    for member in background.arms.get(name, (name,)):
        if member in models:
            values += [row["nll"] for row in models[member].rows_with(kind="pooled", split=split, length=length)]
    return fmean(values) if values else math.inf


def verdict(found: Difference, what: str, *, counts: bool = False) -> str:
    """Say whether something predicts better than something else, by how much, and how sure that
    is."""
    sure = _interval(found, counts)
    if _is_unsure(found):
        return f"not measurably better or worse than {what} ({found.nats:+.3f} nats per token, {sure})"
    return f"{abs(found.nats):.3f} nats per token {_side(found)} ({sure}) than {what}"


def brief_verdict(found: Difference) -> str:
    """Say the same in a few words, without what it is compared with."""
    sure = _interval(found).removeprefix("95% interval ")
    if _is_unsure(found):
        return f"not measurably better or worse ({found.nats:+.3f}, {sure})"
    return f"{abs(found.nats):.3f} {_side(found)} ({sure})"


def _side(found: Difference) -> str:
    return "better" if found.nats > 0 else "worse"


def _is_unsure(found: Difference) -> bool:
    """Whether the interval holds zero."""
    return found.low <= 0 <= found.high


def _interval(found: Difference, counts: bool = False) -> str:
    """Return the interval in words, turned around where something is worse, and what it is an
    interval over."""
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
        if found.seeds > 1:
            text += f", {found.seeds} seeds"
    return text
