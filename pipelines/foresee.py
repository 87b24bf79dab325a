"""What the stages that train will cost, for `longreach plan`: memory by counting, time by what ranks like these were
measured to do when they last trained (training/planner.py).

    foresee(store, build(recipe), recipe.resources)["finetune[lora]"]     # "about 6.9 GiB on 2 ranks, ..."
"""

from __future__ import annotations

from typing import Any

from longreach.infra.artifact import CorruptArtifact, Store
from longreach.infra.resources import Resources
from longreach.pipelines.display import duration
from longreach.pipelines.stage import Stage
from longreach.pipelines.stages import PackStageRecipe, TokenizerRecipe
from longreach.training.planner import Machine, Prediction, Shape, predict
from longreach.training.recipe import (
    ArmRecipe,
    FinetuneStageRecipe,
    PretrainStageRecipe,
)


def foresee(store: Store, stages: list[Stage], resources: Resources) -> dict[str, str]:
    """A sentence by label. Stages whose model is not known yet (its base was not converted here) are left out."""
    machine, found = _measured(store, resources), {}
    for stage in stages:
        if not isinstance(stage.recipe, FinetuneStageRecipe | PretrainStageRecipe):
            continue
        if (shape := _shape(store, stage)) is None:
            continue
        corpus = stage.inputs["corpus"].recipe
        assert isinstance(corpus, PackStageRecipe)
        seq_len = corpus.pack.seq_len
        arm = stage.recipe.arm if isinstance(stage.recipe, FinetuneStageRecipe) else ArmRecipe()
        rows = stage.recipe.optim.global_batch_tokens // seq_len
        cost = predict(shape, arm, rows=rows, seq_len=seq_len, resources=resources, machine=machine)
        found[stage.label] = _in_words(cost, stage.recipe.optim.steps, resources.workers)
    return found


def _in_words(cost: Prediction, steps: int, ranks: int) -> str:
    memory = f"about {cost.peak_gib:.1f} GiB on {ranks} rank{'s' * (ranks > 1)}"
    work = f"{cost.flops * steps / 1e12:,.0f} TFLOP in {steps:,} steps"
    if cost.step_s is None:
        return f"{memory}, {work}; how long, is known once an arm has trained on such ranks"
    return f"{memory}, {work} of {cost.step_s:.2g} s: {duration(cost.step_s * steps)} of training"


def _shape(store: Store, stage: Stage) -> Shape | None:
    """Of the stage's model; None if that is an unconverted base."""
    base = stage.inputs["base"]
    known = {} if isinstance(base.recipe, TokenizerRecipe) else _summary(store, base)
    if not isinstance(stage.recipe, PretrainStageRecipe) or stage.recipe.model is None:
        return Shape(**{key: known[key] for key in SHAPE}) if known.keys() >= {*SHAPE} else None
    vocab = base.recipe.vocab_size if isinstance(base.recipe, TokenizerRecipe) else known.get("vocab")
    if not vocab:
        return None
    m = stage.recipe.model
    return Shape(m.layers, m.hidden, m.intermediate, m.heads, m.kv_heads, m.hidden // m.heads, vocab + 1, tied=True)


SHAPE = ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab", "tied")


def _summary(store: Store, stage: Stage) -> dict[str, Any]:
    try:
        artifact = store.find(stage.name, stage.fingerprint)
    except CorruptArtifact:  # the plan's own table says so
        return {}
    return artifact.summary if artifact else {}


def _measured(store: Store, resources: Resources) -> Machine | None:
    """By the newest arm that trained on ranks of the same kind, on the same host or not."""
    wanted = resources.model_dump(mode="json")
    same = ("workers", "cpus_per_worker", "gpus_per_worker", "dtype")
    trained = [
        manifest
        for name in ("finetune", "pretrain")
        for manifest in store.manifests(name)
        if manifest["summary"].get("machine") and all(manifest["resources"].get(key) == wanted[key] for key in same)
    ]
    newest = max(trained, key=lambda m: m["published_at"], default=None)
    return Machine(**newest["summary"]["machine"]) if newest else None
