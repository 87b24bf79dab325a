"""Forecast memory and time of training stages, for `longreach plan` (cost model: training/cost.py).

Memory is counted. Time needs the speed of such ranks: from their last training, else from a
two-second test.

    foresee(store, build(recipe), recipe.resources)["finetune[lora]"].sentence  # "about 6.9 GiB on ..."
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import ValidationError

from longreach.infra.artifact import Store
from longreach.infra.errors import CorruptArtifact
from longreach.infra.files import digest_of, write_whole
from longreach.infra.machine import GIB, container_cores, usable_cores, usable_memory
from longreach.infra.resources import Resources
from longreach.pipelines.costs import CostsStageRecipe, at_length
from longreach.pipelines.display import duration
from longreach.pipelines.evaluate import EvaluateStageRecipe
from longreach.pipelines.stage import Stage
from longreach.pipelines.stages import GainsRecipe, MergeRecipe, PackStageRecipe, TokenizerRecipe
from longreach.training.attention_recipe import AttentionRecipe
from longreach.training.convert import known_config
from longreach.training.cost import CONFIG_KEYS, PROCESS_GIB, Machine, Prediction, Shape, predict
from longreach.training.probe import probe
from longreach.training.recipe import ArmRecipe, BaseRecipe, FinetuneStageRecipe, PretrainStageRecipe
from longreach.training.summary import TrainingSummary

TrainingRecipe = FinetuneStageRecipe | PretrainStageRecipe
TRIED = "estimated from a two-second test of this machine; other work makes it slower"
SAME_RANKS = ("workers", "cpus_per_worker", "gpus_per_worker", "dtype", "matmul_precision")
"""Resources that must be equal for a measured speed to apply to other ranks."""


@dataclass(frozen=True)
class Speed:
    """The speed of ranks, and its source."""

    machine: Machine
    source: str  # displayed to users
    slower: float = 1.0
    """Measured over predicted step time when such ranks last trained."""

    def step_s(self, cost: Prediction) -> float:
        """Return the seconds of a step, from a prediction of `predict` with this machine."""
        assert cost.step_s is not None, "the prediction was made without a machine"
        return cost.step_s * self.slower

    def mean_step_s(self, shape: Shape, arm: ArmRecipe, *, rows: int, seq_len: int, resources: Resources) -> float:
        """Return the mean seconds of an arm's steps."""

        def step_s(arm: ArmRecipe) -> float:
            cost = predict(shape, arm, rows=rows, seq_len=seq_len, resources=resources, machine=self.machine)
            return self.step_s(cost)

        return mean_over_steps(arm, step_s)


def mean_over_steps(arm: ArmRecipe, value: Callable[[ArmRecipe], float]) -> float:
    """Return the mean over an arm's steps of what `value` returns for the arm with a step's attention
    pattern."""
    attention = arm.attention
    if attention.anneal_to is None:
        return value(arm)
    last = arm.model_copy(update={"attention": AttentionRecipe.of(pattern=attention.anneal_to)})
    return (1 - attention.anneal_fraction) * value(arm) + attention.anneal_fraction * value(last)


@dataclass(frozen=True)
class Forecast:
    """The forecast cost of a training stage."""

    sentence: str
    refusal: str = ""  # why this machine cannot run it, with a fix; empty if it can


def foresee(store: Store, stages: list[Stage], resources: Resources, *, trying: bool = False) -> dict[str, Forecast]:
    """Return forecasts by label, without stages whose model sizes are not known yet.

    Args:
        trying: If such ranks have never trained, measure this machine's speed once.
    """
    speed = measured(store, resources)
    forecasts = {}
    for stage in stages:
        if not isinstance(stage.recipe, TrainingRecipe | CostsStageRecipe):
            continue
        shape = _shape(store, stage)
        if shape is None:
            continue
        if speed is None and trying:
            speed = tried(store, shape, resources)
            trying = False  # one test, with the sizes of the first model, is enough for all
        if isinstance(stage.recipe, CostsStageRecipe):
            forecasts[stage.label] = _of_costs(stage.recipe, shape, resources, speed)
        else:
            forecasts[stage.label] = _of_training(stage, stage.recipe, shape, resources, speed)
    return forecasts


def _of_training(
    stage: Stage, recipe: TrainingRecipe, shape: Shape, resources: Resources, speed: Speed | None
) -> Forecast:
    """Return the forecast for a training stage."""
    rows, seq_len = _rows_of_step(stage, recipe)
    arm, steps = _arm_of(recipe), recipe.optim.steps

    def cost(arm: ArmRecipe) -> Prediction:
        return predict(shape, arm, rows=rows, seq_len=seq_len, resources=resources, machine=_machine(speed))

    peak_gib = cost(arm).peak_gib
    flops = mean_over_steps(arm, lambda arm: cost(arm).flops)
    sentence = f"about {peak_gib:.1f} GiB on {_on_ranks(resources.workers)}, "
    sentence += f"{flops * steps / 1e12:,.0f} TFLOP in {steps:,} steps"
    if speed is None:
        sentence += "; no time estimate before an arm has trained on ranks like these"
    else:
        step_s = speed.mean_step_s(shape, arm, rows=rows, seq_len=seq_len, resources=resources)
        sentence += f" of {step_s:.2g} s: {duration(step_s * steps)} of training ({speed.source})"
    return Forecast(sentence, _refusal(stage, recipe, shape, resources, peak_gib))


def _cost(stage: Stage, recipe: TrainingRecipe, shape: Shape, resources: Resources) -> Prediction:
    """Return the predicted cost of a step of a training stage, before it anneals."""
    rows, seq_len = _rows_of_step(stage, recipe)
    return predict(shape, _arm_of(recipe), rows=rows, seq_len=seq_len, resources=resources)


def _rows_of_step(stage: Stage, recipe: TrainingRecipe) -> tuple[int, int]:
    """Return the rows of a step of a training stage, and the tokens of a row."""
    corpus = stage.inputs["corpus"].recipe
    assert isinstance(corpus, PackStageRecipe)
    return recipe.optim.global_batch_tokens // corpus.pack.seq_len, corpus.pack.seq_len


def _arm_of(recipe: TrainingRecipe) -> ArmRecipe:
    """Return the arm that is trained; pretraining trains all weights."""
    if isinstance(recipe, FinetuneStageRecipe):
        return recipe.arm
    return ArmRecipe(attention=recipe.attention)


def memory_gib(store: Store, stage: Stage, resources: Resources) -> float:
    """Return the estimated memory of a stage, by which Ray places it: that of all ranks of a training,
    or of the one process that evaluates, scores rows or merges an adapter.

    If the model's sizes are unknown, or it is on a GPU, return the memory of any process.
    """
    if resources.gpus_per_worker:
        return PROCESS_GIB
    recipe = stage.recipe
    if isinstance(recipe, TrainingRecipe) and (shape := _shape(store, stage)):
        return _cost(stage, recipe, shape, resources).peak_gib
    if not isinstance(recipe, EvaluateStageRecipe | GainsRecipe | MergeRecipe):
        return PROCESS_GIB
    shape = _shape_of_base(store, stage)
    if shape is None:
        return PROCESS_GIB
    if isinstance(recipe, MergeRecipe):  # the base, and the tensors of the adapter's layers
        return PROCESS_GIB + 2 * 4 * shape.parameters / GIB
    if isinstance(recipe, GainsRecipe):
        corpus = stage.inputs["corpus"].recipe
        assert isinstance(corpus, PackStageRecipe)
        return PROCESS_GIB + _read_gib(shape, corpus.pack.seq_len, resources)
    return PROCESS_GIB + _read_gib(shape, recipe.choices.longest_input(), resources)


def _read_gib(shape: Shape, tokens: int, resources: Resources) -> float:
    """Return the memory of weights, and of an input's KV cache and one layer's activations."""
    value_bytes = 2 if resources.dtype == "bfloat16" else 4
    kept = 2 * shape.layers * shape.kv_width
    passing = 2 * (shape.hidden + shape.intermediate)
    return value_bytes * (shape.parameters + tokens * (kept + passing)) / GIB


def _shape_of_base(store: Store, stage: Stage) -> Shape | None:
    """Return the shape of the base that a model was made from; None if it has no base, or if the
    base's sizes are not known."""
    if isinstance(stage.recipe, BaseRecipe):
        return Shape.from_summary(_facts(store, stage))
    for name in ("model", "base"):
        if name in stage.inputs:
            return _shape_of_base(store, stage.inputs[name])
    return None


LESS_MEMORY: tuple[dict[str, Any], ...] = (
    {"activation_checkpointing": True},
    {"workers": 1},
    {"workers": 1, "activation_checkpointing": True},
)
"""Changes of resources that save memory without changing the result, fastest training first."""


def _refusal(stage: Stage, recipe: TrainingRecipe, shape: Shape, resources: Resources, needs_gib: float) -> str:
    """Return why a training cannot run on this machine; empty if it can.

    In nine trainings, counted memory was 13% below to 22% above the measured one (RESULTS.md), so a
    training may be refused although it would just fit. GPU memory is not checked here.
    """
    here_gib = usable_memory() / GIB
    if resources.gpus_per_worker or needs_gib <= here_gib:
        return ""
    reason = f"{stage.label} needs about {needs_gib:.1f} GiB on {_on_ranks(resources.workers)}, but this machine has "
    reason += f"{here_gib:.1f} GiB"
    for changes in LESS_MEMORY:
        if "workers" in changes and resources.sequence_parallel > 1:  # several workers share each row
            continue
        gib = _cost(stage, recipe, shape, resources.model_copy(update=changes)).peak_gib
        if gib <= here_gib:
            options = [f"--set resources.{name}={json.dumps(value)}" for name, value in changes.items()]
            return f"{reason}: {' '.join(options)} needs about {gib:.1f} GiB"
    return f"{reason}: lower pack.seq_len, remove the arm, or submit to a cluster with more memory"


def check_fits(forecasts: Iterable[Forecast]) -> None:
    """Raise ValueError if a training cannot run on this machine."""
    for forecast in forecasts:
        if forecast.refusal:
            raise ValueError(forecast.refusal)


def no_room(stage: Stage, resources: Resources, nodes: Sequence[Mapping[str, float]]) -> str:
    """Return why these nodes can never run a stage, with a fix; empty if they can.

    Without this check, Ray would wait forever.

    Args:
        nodes: Each node's resources, by Ray's names. Nodes that an autoscaler could start do not
            count, as in infra/launch.py.
    """
    at_once, each, fields = 1, {"CPU": stage.kind.cpus(resources), "GPU": stage.kind.gpus(resources)}, []
    if isinstance(stage.recipe, EvaluateStageRecipe | GainsRecipe):  # per task; several tasks may run one by one
        each = {"CPU": resources.eval_cpus, "GPU": resources.gpus_per_worker}
        fields = ["resources.eval_cpus"]
    elif isinstance(stage.recipe, TrainingRecipe | CostsStageRecipe):
        at_once, each = resources.workers, {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
        fields = ["resources.workers", "resources.cpus_per_worker"]
    each = {kind: amount for kind, amount in each.items() if amount}
    if not each:
        return ""
    room = sum(int(min(node.get(kind, 0) / amount for kind, amount in each.items())) for node in nodes)
    if room >= at_once:
        return ""
    if "GPU" in each:
        fields.append("resources.gpus_per_worker")
    largest = max(nodes, key=lambda node: [node.get(kind, 0) for kind in reversed(each)], default={})
    needs = f"{_amounts(each)} on one node"
    if at_once > 1:
        needs = f"{at_once} ranks of {_amounts(each)} each, but there is room for {room}"
    has = _amounts({kind: largest.get(kind, 0) for kind in each})
    lower = f"lower {' or '.join(fields)}, or " if fields else ""
    return f"{stage.label} needs {needs}; the largest node has {has}: {lower}connect to a larger cluster"


def _amounts(asked: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {kind}{'s' * (amount != 1)}" for kind, amount in asked.items())


def this_node(resources: Resources) -> dict[str, float]:
    """Return the CPUs and GPUs that Ray would offer on this machine, never fewer.

    Ray respects a container's CPU limit, but not this process's CPU affinity.
    """
    limit = container_cores()
    cpus = (os.cpu_count() or 1) if limit is None else limit
    gpus = 0
    if resources.gpus_per_worker and shutil.which("nvidia-smi"):  # comes with the driver, as in training/probe.py
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
        gpus = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return {"CPU": cpus, "GPU": gpus}


def _of_costs(recipe: CostsStageRecipe, shape: Shape, resources: Resources, speed: Speed | None) -> Forecast:
    """Return the forecast for the stage `costs`, which measures all arms by row length."""
    cells, steps = recipe.cells(), 1 + recipe.steps
    seconds, most_gib = 0.0, 0.0
    for cell in cells:
        length = cell["length"]
        arm = at_length(recipe.arms[cell["arm"]].arm, recipe.row_tokens, length)
        rows = recipe.rows_of_step(length, resources)
        cost = predict(shape, arm, rows=rows, seq_len=length, resources=resources, machine=_machine(speed))
        if speed:
            seconds += steps * speed.step_s(cost)
        most_gib = max(most_gib, cost.peak_gib)
    work = f"{len(cells)} times {steps} steps, at most about {most_gib:.1f} GiB on {_on_ranks(resources.workers)}"
    if speed is None:
        sentence = f"{work}; no time estimate before an arm has trained on ranks like these"
    else:
        sentence = f"{work}: {duration(seconds)} of training, plus as many starts of ranks ({speed.source})"
    return Forecast(sentence)


def _machine(speed: Speed | None) -> Machine | None:
    return speed.machine if speed else None


def _on_ranks(ranks: int) -> str:
    return "1 rank" if ranks == 1 else f"{ranks} ranks"


def _shape(store: Store, stage: Stage) -> Shape | None:
    """Return the shape of the model that a stage trains; None if it is unknown before conversion,
    or if the cost model does not cover its architecture."""
    base = stage.inputs["base"]
    if isinstance(base.recipe, TokenizerRecipe):
        facts: dict[str, Any] = {"vocab": base.recipe.vocab_size}
    else:
        facts = _facts(store, base)
    if not isinstance(stage.recipe, PretrainStageRecipe) or stage.recipe.model is None:
        shape = Shape.from_summary(facts)
        if shape is None or not shape.counts(facts.get("parameters", shape.parameters)):
            return None
        return shape
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


def _facts(store: Store, base: Stage) -> dict[str, Any]:
    """Return the sizes of a base from its conversion or, as far as they are known, from its
    config."""
    return _summary(store, base) or _before_conversion(base)


def _summary(store: Store, stage: Stage) -> dict[str, Any]:
    try:
        artifact = store.find(stage.name, stage.fingerprint)
    except CorruptArtifact:  # the plan's own table reports it
        return {}
    return artifact.summary if artifact else {}


def _before_conversion(stage: Stage) -> dict[str, Any]:
    """Return the sizes of a base that is not converted yet; empty if they are unknown."""
    if not isinstance(stage.recipe, BaseRecipe):
        return {}
    config = known_config(stage.recipe.source)
    # excluded: a mixture of experts does not use all its parameters for each token
    counted = all(isinstance(config.get(key), int) and config[key] > 0 for key in CONFIG_KEYS)
    if not counted or any("expert" in key for key in config):
        return {}
    return asdict(Shape.of(config))


def measured(store: Store, resources: Resources) -> Speed | None:
    """Return the speed of the newest training on ranks of the same kind, on any host; None if
    none."""
    wanted = resources.model_dump(mode="json", include={*SAME_RANKS})
    usual = Resources().model_dump(mode="json")  # values for fields that an older manifest does not have
    speeds: list[tuple[str, Speed]] = []
    for manifest in [*store.manifests("finetune"), *store.manifests("pretrain")]:
        if {key: manifest["resources"].get(key, usual[key]) for key in SAME_RANKS} != wanted:
            continue
        try:
            summary = TrainingSummary.model_validate(manifest["summary"])
        except ValidationError:  # another version of longreach wrote it
            continue
        if summary.machine:
            speed = Speed(summary.machine, f"as ranks like these last trained, {manifest['published_at'][:10]}")
            if summary.predicted and summary.predicted.step_s:
                speed = replace(speed, slower=summary.step_s_median / summary.predicted.step_s)
            speeds.append((manifest["published_at"], speed))
    if not speeds:
        return None
    _, newest = max(speeds, key=lambda one: one[0])
    return newest


def tried(store: Store, shape: Shape, resources: Resources) -> Speed | None:
    """Return the speed of such ranks on this machine, from a two-second test whose result is
    cached.

    Returns None if the ranks do not fit on this machine, or, with a line on stderr, if the test
    fails.
    """
    asked = {"host": platform.node(), "cores": usable_cores(), "shape": asdict(shape)}
    asked["ranks"] = resources.model_dump(mode="json", include={*SAME_RANKS})
    kept = store.scratch / f"speed-{digest_of(asked)}.json"
    if kept.is_file():
        return Speed(Machine(**json.loads(kept.read_text())), TRIED)
    print("ranks like these have not trained here yet: measuring their speed once for two seconds", file=sys.stderr)
    try:
        machine = probe(shape, resources)
    except RuntimeError as error:
        print(f"{error}: no time forecast", file=sys.stderr)
        return None
    if machine is None:
        return None
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_whole(kept, json.dumps(asdict(machine)))
    return Speed(machine, TRIED)
