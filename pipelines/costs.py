"""Stage `costs`: step time and memory of each arm by row length (LongLoRA, figure 1 and table 1).

Each measurement trains a few steps in new ranks and discards the model (training/trial.py), because
peak memory is per process. At each length the arms take turns, so that the arms of one round can be
compared even if other work slows the machine for a while. Each measurement is saved at once, and an
interrupted stage resumes with the next one.

    longreach run quickstart --set 'costs.lengths=[1024,4096]' --set costs.rounds=2
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from longreach.infra import relay
from longreach.infra.choices import Choices, Location, nearest
from longreach.infra.errors import OutOfMemory, Stopped
from longreach.infra.resources import Resources
from longreach.infra.tracking import metric_part
from longreach.pipelines.artifacts import Costs, ModelCheckpoint, PackedCorpus
from longreach.pipelines.kind import StageRun, stage, stop_file
from longreach.training.attention_recipe import AttentionRecipe
from longreach.training.cost import Shape, predict
from longreach.training.recipe import ArmRecipe, OptimRecipe, RopeRecipe, TrainJob
from longreach.training.summary import CostCell, CostsSummary

if TYPE_CHECKING:
    from longreach.pipelines.recipe import Recipe


SHORTEST = 8  # minimum row length in tokens, as in `pack`


class CostsChoices(Choices):
    """What to measure, for any arms."""

    lengths: tuple[int, ...] = Field(default=(1024, 2048, 4096, 8192, 16384), min_length=1)
    """Row lengths in tokens. Each row is a single document of this length. Groups of S²-Attn grow
    with the row; windows keep their size."""
    steps: int = Field(default=2, ge=1)
    """Timed optimizer steps per measurement, after one warm-up step."""
    rounds: int = Field(default=2, ge=2)
    """How often each arm is measured at each length, in turns with the others (A B A B). Ratios are
    computed within a round, and their spread is shown."""


class CostsRecipe(CostsChoices):
    """Cost by row length: each arm of finetune trains a few steps at each length, and only time and
    memory are recorded."""

    arms: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Arms of finetune to measure. Default: all. They are compared with the arm that tunes all
    weights, or else with the first arm."""
    global_batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens per step. Default: finetune's. Each length uses the nearest number of whole rows that
    divides over the ranks, at least one per rank."""

    def problems(self, recipe: Recipe) -> Iterator[tuple[Location, str]]:
        """Yield choices that do not fit the arms, the base or the ranks."""
        finetune = recipe.finetune
        if finetune is None:
            yield ("costs",), "there is no section finetune, whose arms it measures: add one, or remove costs"
            return
        if len(set(self.lengths)) < len(self.lengths):
            yield ("costs", "lengths"), f"{list(self.lengths)} has a duplicate length"
        arms = finetune.every_arm()
        for name in self.arms or ():
            if name not in arms:
                yield ("costs", "arms"), f"no arm {name!r}{nearest(name, arms, 'finetune has')}"
        trained = recipe.trained_length()
        for length in self.lengths:
            if length < SHORTEST:
                yield ("costs", "lengths"), f"{length} is less than {SHORTEST}, the minimum row length in tokens"
                continue
            try:
                recipe.resources.check_row(length)
            except ValueError as error:
                yield ("costs", "lengths"), str(error)
            for name in self.arms or arms:
                if name not in arms:
                    continue
                try:
                    at_length(arms[name], finetune.pack.seq_len, length)
                    if trained:
                        finetune.rope_of(arms[name]).check_row(length, trained)
                except ValueError as error:
                    yield ("costs", "lengths"), f"{name}: {error}"


class CostedArm(Choices):
    """The choices of an arm that affect its cost."""

    arm: ArmRecipe
    rope: RopeRecipe
    """The stretch that it starts from."""


class CostsStageRecipe(CostsChoices):
    """The choices of the stage."""

    global_batch_tokens: int
    row_tokens: int
    """Row length for which the arms' groups were chosen."""
    arms: dict[str, CostedArm]

    @classmethod
    def of(cls, recipe: Recipe) -> CostsStageRecipe:
        """Return the stage's choices from a recipe's sections `costs` and `finetune`."""
        section, finetune = recipe.costs, recipe.finetune
        assert section, "the stage exists only with the section `costs`"
        assert finetune, "a valid recipe with `costs` has the section `finetune`"
        arms = finetune.every_arm()
        costed = {}
        for name in section.arms or arms:
            # reset fields that do not affect the cost, so that changing them causes no new measurement
            plain: dict[str, Any] = {"rope": None, "seeds": (), "curriculum": ()}
            plain |= {"learning_rate": None, "embedding_learning_rate": None}
            if arms[name].objective == "long_ce":  # its scores are computed before training, outside the steps
                plain |= {"objective": "plain", "short_tokens": None}
            arm = arms[name].model_copy(update=plain)
            costed[name] = CostedArm(arm=arm, rope=finetune.rope_of(arms[name]))
        return cls(
            lengths=tuple(sorted(section.lengths)),
            steps=section.steps,
            rounds=section.rounds,
            global_batch_tokens=section.global_batch_tokens or finetune.global_batch_tokens,
            row_tokens=finetune.pack.seq_len,
            arms=costed,
        )

    def yardstick(self) -> str:
        """Return the arm that the others are compared with."""
        full = [name for name, one in self.arms.items() if one.arm.tune == "all"]
        causal = [name for name in full if self.arms[name].arm.attention.pattern == "causal"]
        return [*causal, *full, *self.arms][0]

    def rows_of_step(self, length: int, resources: Resources) -> int:
        """Return the rows per step: nearest to global_batch_tokens and divisible over the ranks."""
        at_once = resources.rows_at_once(resources.workers)
        return max(1, round(self.global_batch_tokens / length / at_once)) * at_once

    def cells(self) -> list[dict[str, Any]]:
        """Return the measurements in order: at each length, all arms in each round."""
        cells = []
        for length in self.lengths:
            for turn in range(self.rounds):
                for arm in self.arms:
                    cells.append({"length": length, "round": turn, "arm": arm})
        return cells


def at_length(arm: ArmRecipe, row_tokens: int, length: int) -> ArmRecipe:
    """Return an arm for rows of another length, with groups of the same share of a row.

    The arm has no annealing, no skipped positions and no curriculum. ValueError if no such groups
    exist.
    """
    choices = arm.attention.model_dump() | {"anneal_to": None, "anneal_fraction": 0.0}
    if "group_tokens" in choices:
        group, rest = divmod(choices["group_tokens"] * length, row_tokens)
        if rest or group % 2:
            fits = 2 * row_tokens // math.gcd(choices["group_tokens"], 2 * row_tokens)
            raise ValueError(
                f"group_tokens {choices['group_tokens']} of rows of {row_tokens} are "
                f"{choices['group_tokens'] * length / row_tokens:g} of rows of {length}, which is not even: "
                f"use a multiple of {fits}"
            )
        choices["group_tokens"] = group
    attention = AttentionRecipe.of(**choices)
    attention.check_row(length)
    return arm.model_copy(update={"attention": attention, "positions": None, "curriculum": ()})


@stage(makes=Costs, revision=1, cpus=lambda resources: 0, saves_when_stopped=True)
def costs(
    corpus: PackedCorpus, base: ModelCheckpoint, *, recipe: CostsStageRecipe, resources: Resources, out: Path,
    run: StageRun,
) -> dict[str, Any]:  # fmt: skip
    """Measure every arm at every length, in turns; cells that do not fit into memory are left out,
    with the reason.

    Raises:
        ValueError: A length exceeds the base's positions, or the corpus has no rows.
        Stopped: The run was asked to stop.
    """
    from longreach.evaluation.cells import CellFolder

    for length in recipe.lengths:
        for one in recipe.arms.values():
            one.rope.check_row(length, base.summary["context_length"])
    cells = recipe.cells()
    folder = CellFolder(
        run.attempt.work / "cells",
        (earlier / "work" / "cells" for earlier in run.earlier),
        setting=f"{platform.node()}: {resources.model_dump_json()}",
    )
    results = folder.known(cells)
    too_large: dict[str, str] = {}  # arm -> why it was left out at a shorter length or in an earlier round
    for number, cell in enumerate(cells):
        if cell["arm"] in too_large:
            results[number] = {"left_out": too_large[cell["arm"]]}
        elif number not in results:
            results[number] = _measured(corpus, base, recipe, resources, run, cell)
            if reason := results[number].get("left_out"):  # not saved: later there may be more free memory
                too_large[cell["arm"]] = reason
            else:
                folder.keep(number, cell, results[number])
        run.spool.progress(number + 1, len(cells), unit="trial")
    summary = CostsSummary(
        yardstick=recipe.yardstick(),
        steps=recipe.steps,
        rounds=recipe.rounds,
        ranks=resources.workers,
        cells=tuple(CostCell(**cell, **results[number]) for number, cell in enumerate(cells)),
    )
    summary.write(out)
    for length in summary.lengths:  # as MLflow's step, so that it draws curves over the row length
        run.spool.metrics(_metrics(summary, length), step=length)
    return summary.to_json()


def _measured(
    corpus: PackedCorpus, base: ModelCheckpoint, recipe: CostsStageRecipe, resources: Resources, run: StageRun,
    cell: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Return the cost of one arm's steps at one length, measured in new ranks; or why it is
    `left_out`."""
    from longreach.infra.launch import run_ranks

    stop = stop_file(run.spool.path.parent)
    if stop.exists() or relay.stop_asked(run.spool):
        raise Stopped("stopped between two measurements: the same command resumes with the next one")
    length, one = cell["length"], recipe.arms[cell["arm"]]
    rows = recipe.rows_of_step(length, resources)
    job = TrainJob(
        rope=one.rope,
        arm=at_length(one.arm, recipe.row_tokens, length),
        optim=OptimRecipe(steps=1 + recipe.steps, global_batch_tokens=rows * length, warmup_steps=0),
        seed=0,
        kind="finetune",
        corpus=str(corpus.path),
        base=str(base.path),
        resources=resources,
        out="",
        work="",
        superseded_file=str(run.attempt.superseded_file),
        stop_file=str(stop),
    )
    needs_gib = None
    shape = Shape.from_summary(base.summary)
    if shape and shape.counts(base.summary["parameters"]):
        predicted = predict(shape, job.arm, rows=rows, seq_len=length, resources=resources)
        needs_gib = predicted.peak_gib / resources.workers
    trial = {"job": job.model_dump(mode="json"), "length": length, "needs_gib": needs_gib}
    try:
        return run_ranks(
            "longreach.training.trial:measure",
            trial,
            resources=resources,
            name="trial",
            storage=run.storage,
            share=run.share,
            note=run.note,
            waited=run.waits_s.append,
        )
    except OutOfMemory as error:
        return {"left_out": str(error)}


def _metrics(summary: CostsSummary, length: int) -> dict[str, float]:
    """Return the measurements at a length by MLflow metric name."""
    metrics = {}
    for arm in summary.arms:
        found = {
            "s_per_1k_tokens": summary.seconds_per_1k(length, arm),
            "peak_gib": summary.peak_gib(length, arm),
            "times_as_fast": summary.times_as_fast(length, arm, summary.yardstick),
        }
        for name, spread in found.items():
            if spread:
                metrics[f"costs/{name}/{metric_part(arm)}"] = spread.median
    return metrics
