"""What the stages that train will cost, for `longreach plan`: memory is counted; time follows from
the speed that such ranks were measured to have when they last trained (training/cost.py).

    foresee(store, build(recipe), recipe.resources)["finetune[lora]"]  # "about 6.9 GiB on ..."
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import ValidationError

from longreach.infra.artifact import CorruptArtifact, Store
from longreach.infra.resources import Resources
from longreach.pipelines.costs import CostsStageRecipe, at_length
from longreach.pipelines.display import duration
from longreach.pipelines.stage import Stage
from longreach.pipelines.stages import PackStageRecipe, TokenizerRecipe
from longreach.training.cost import Machine, Prediction, Shape, predict
from longreach.training.recipe import ArmRecipe, FinetuneStageRecipe, PretrainStageRecipe
from longreach.training.summary import TrainingSummary

SHAPE = ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab", "tied")
"""What the cost model takes from the summary of a converted model."""
SAME_RANKS = ("workers", "cpus_per_worker", "gpus_per_worker", "dtype")
"""Resources in which ranks have to agree for a measured speed to hold."""


def foresee(store: Store, stages: list[Stage], resources: Resources) -> dict[str, str]:
    """Return a sentence on cost by label; stages whose base is not converted yet are left out."""
    machine = measured(store, resources)
    sentences = {}
    for stage in stages:
        if not isinstance(stage.recipe, FinetuneStageRecipe | PretrainStageRecipe | CostsStageRecipe):
            continue
        shape = _shape(store, stage)
        if shape is None:
            continue
        if isinstance(stage.recipe, CostsStageRecipe):
            sentences[stage.label] = _of_costs(stage.recipe, shape, resources, machine)
            continue
        if isinstance(stage.recipe, FinetuneStageRecipe):
            arm = stage.recipe.arm
        else:
            arm = ArmRecipe(attention=stage.recipe.attention)  # pretraining trains all weights
        corpus, optim = stage.inputs["corpus"].recipe, stage.recipe.optim
        assert isinstance(corpus, PackStageRecipe)
        seq_len = corpus.pack.seq_len
        rows = optim.global_batch_tokens // seq_len
        cost = predict(shape, arm, rows=rows, seq_len=seq_len, resources=resources, machine=machine)
        sentences[stage.label] = _in_words(cost, optim.steps, resources.workers)
    return sentences


def _of_costs(recipe: CostsStageRecipe, shape: Shape, resources: Resources, machine: Machine | None) -> str:
    """Return what measuring the cost of all arms by row length will itself cost."""
    cells, steps = recipe.cells(), 1 + recipe.steps
    seconds, most_gib = 0.0, 0.0
    for cell in cells:
        length = cell["length"]
        arm = at_length(recipe.arms[cell["arm"]].arm, recipe.row_tokens, length)
        rows = recipe.rows_of_step(length, resources)
        cost = predict(shape, arm, rows=rows, seq_len=length, resources=resources, machine=machine)
        seconds += steps * (cost.step_s or math.nan)
        most_gib = max(most_gib, cost.peak_gib)
    work = f"{len(cells)} times {steps} steps, at most about {most_gib:.1f} GiB on {_on_ranks(resources.workers)}"
    if math.isnan(seconds):
        return f"{work}; how long, is known once an arm has trained on such ranks"
    return f"{work}: {duration(seconds)} of training, and as many starts of ranks"


def _on_ranks(ranks: int) -> str:
    return "1 rank" if ranks == 1 else f"{ranks} ranks"


def _in_words(cost: Prediction, steps: int, ranks: int) -> str:
    memory = f"about {cost.peak_gib:.1f} GiB on {_on_ranks(ranks)}"
    work = f"{cost.flops * steps / 1e12:,.0f} TFLOP in {steps:,} steps"
    if cost.step_s is None:
        return f"{memory}, {work}; how long, is known once an arm has trained on such ranks"
    return f"{memory}, {work} of {cost.step_s:.2g} s: {duration(cost.step_s * steps)} of training"


def _shape(store: Store, stage: Stage) -> Shape | None:
    """The shape of the model that a stage trains; None if it is a base that is not converted yet."""
    base = stage.inputs["base"]
    if isinstance(base.recipe, TokenizerRecipe):
        facts: dict[str, Any] = {"vocab": base.recipe.vocab_size}
    else:
        facts = _summary(store, base)
    if not isinstance(stage.recipe, PretrainStageRecipe) or stage.recipe.model is None:
        if not facts.keys() >= {*SHAPE}:
            return None
        return Shape(**{key: facts[key] for key in SHAPE})
    if not facts.get("vocab"):
        return None
    fresh = stage.recipe.model
    return Shape(
        layers=fresh.layers,
        hidden=fresh.hidden,
        intermediate=fresh.intermediate,
        heads=fresh.heads,
        kv_heads=fresh.kv_heads,
        head_dim=fresh.hidden // fresh.heads,
        vocab=facts["vocab"] + 1,  # the sink token
        tied=True,
    )


def _summary(store: Store, stage: Stage) -> dict[str, Any]:
    try:
        artifact = store.find(stage.name, stage.fingerprint)
    except CorruptArtifact:  # the plan's own table reports it
        return {}
    return artifact.summary if artifact else {}


def measured(store: Store, resources: Resources) -> Machine | None:
    """Return what the newest arm measured that trained on ranks of the same kind, on whichever host."""
    wanted = resources.model_dump(mode="json", include={*SAME_RANKS})
    machines: list[tuple[str, Machine]] = []
    for manifest in [*store.manifests("finetune"), *store.manifests("pretrain")]:
        if {key: manifest["resources"].get(key) for key in SAME_RANKS} != wanted:
            continue
        try:
            summary = TrainingSummary.model_validate(manifest["summary"])
        except ValidationError:  # another version of longreach wrote it
            continue
        if summary.machine:
            machines.append((manifest["published_at"], summary.machine))
    return max(machines, key=lambda one: one[0])[1] if machines else None
