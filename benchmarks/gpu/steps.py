"""Section steps: tokens per second, MFU and peak memory of whole optimizer steps, with the planner's predictions.

It covers full fine-tuning, LoRA and LongLoRA on SmolLM2's shape and on a Llama with a billion parameters, with random
weights, rows of 8k to 65k tokens, bfloat16 and ZeRO 0. The goals are: predicted seconds within 25% and memory within
15%, and DeepSpeed takes at most 1.05 times as long as a plain loop that keeps the same float32 weights.

Legend: T tokens of a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from bench import Bench
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from longreach.attention.hf import set_pattern
from longreach.infra.launch import be_the_only_rank
from longreach.infra.resources import Resources
from longreach.training import cost, zero
from longreach.training.cost import Shape, predict
from longreach.training.longlora import apply_arm
from longreach.training.loss import TokenLoss
from longreach.training.recipe import ArmRecipe, OptimRecipe

STEPS = 4
"""Steps of a measurement; the first is a warm-up."""
RATE = 1e-5
SMOLLM2 = LlamaConfig(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    vocab_size=49152, max_position_embeddings=65536, tie_word_embeddings=True,
)  # fmt: skip
BILLION = LlamaConfig(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=65536, tie_word_embeddings=True,
)  # fmt: skip
TINY = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=256, max_position_embeddings=256, tie_word_embeddings=True,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model, a row length and an arm, with a rough duration in seconds."""

    model: str
    config: LlamaConfig
    T: int
    arm: str
    seconds: float
    checkpointing: bool = False

    def recipe(self) -> ArmRecipe:
        """Return the arm's recipe; LongLoRA's groups are a quarter of the row."""
        if self.arm == "longlora":
            sparse = {"pattern": "shifted_sparse", "group_tokens": self.T // 4}
            return ArmRecipe(tune="lora+embed+norm", attention=sparse)
        return ArmRecipe(tune={"full": "all", "lora": "lora"}[self.arm])

    def __str__(self) -> str:
        return f"{self.model}, T {self.T}, {self.arm}"


def cases(bench: Bench) -> list[Case]:
    """Return the cases, the most important first."""
    arms = ("full", "longlora", "lora")
    if not bench.gpu:
        return [Case("tiny", TINY, 64, arm, 0) for arm in arms[:2]]
    return [
        *(Case("SmolLM2", SMOLLM2, 8192, arm, 8) for arm in arms),
        *(Case("SmolLM2", SMOLLM2, 32768, arm, 12) for arm in arms),
        *(Case("1B", BILLION, 8192, arm, 12) for arm in arms),
        *(Case("1B", BILLION, 32768, arm, 20, True) for arm in arms),
        *(Case("1B", BILLION, 65536, arm, 40, True) for arm in ("longlora", "full")),
        Case("SmolLM2", SMOLLM2, 65536, "longlora", 25, True),
    ]


def run(bench: Bench) -> None:
    be_the_only_rank(gpu=bench.gpu)
    failed = []
    for case in cases(bench):
        if not bench.fits(str(case), case.seconds):
            continue
        try:
            measure(bench, case)
        except torch.OutOfMemoryError as error:
            failed.append(str(case))
            bench.note(str(case), out_of_memory=str(error).splitlines()[0])
    case = Case("SmolLM2", SMOLLM2, 8192, "full", 15) if bench.gpu else Case("tiny", TINY, 64, "full", 0)
    if bench.fits("DeepSpeed against a plain loop", case.seconds):
        against_plain(bench, case)
    if failed:
        raise RuntimeError(f"out of memory: {'; '.join(failed)}")


def model_of(bench: Bench, case: Case) -> nn.Module:
    """Return the arm's model with random weights, its pattern set, in the dtype that DeepSpeed uses."""
    torch.manual_seed(0)
    with torch.device(bench.device):
        model = LlamaForCausalLM(case.config)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    arm = case.recipe()
    adapted = bench.placed(apply_arm(model, arm))
    set_pattern(adapted, arm.attention.pattern_at(0, 1))
    return adapted.train()


def batch_of(bench: Bench, case: Case) -> dict[str, torch.Tensor]:
    """Return a batch of one row with one document."""
    ids_1T = torch.randint(case.config.vocab_size, (1, case.T), device=bench.device)
    return {"input_ids": ids_1T, "position_ids": torch.arange(case.T, device=bench.device)[None], "labels": ids_1T}


def deepspeed_step(bench: Bench, case: Case) -> Callable[[], None]:
    """Return a function that runs one step of our DeepSpeed engine."""
    model = model_of(bench, case)
    engine = zero.start_engine(
        TokenLoss(model), OptimRecipe(steps=STEPS, global_batch_tokens=case.T), resources_of(bench, case),
        global_batch_rows=1,
    )  # fmt: skip
    batch = batch_of(bench, case)

    def step() -> None:
        zero.backward(engine, engine(**batch, scale=1 / (case.T - 1)))
        zero.step(engine, RATE)

    return step


def plain_step(bench: Bench, case: Case) -> Callable[[], None]:
    """Return a function that runs one step of a plain loop with float32 master weights."""
    objective = TokenLoss(model_of(bench, case))
    weights = [p for p in objective.parameters() if p.requires_grad]
    masters = [p.detach().float() for p in weights]
    optimizer = torch.optim.AdamW(masters, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    batch = batch_of(bench, case)

    def step() -> None:
        objective(**batch, scale=1 / (case.T - 1)).backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for weight, master in zip(weights, masters, strict=True):
            master.grad = weight.grad.float()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        for weight in weights:
            weight.grad = None
        float(norm)

    return step


def resources_of(bench: Bench, case: Case) -> Resources:
    """Return the resources of one rank on the GPU."""
    return Resources(
        workers=1, gpus_per_worker=int(bench.gpu), dtype="bfloat16", zero_stage=0,
        activation_checkpointing=case.checkpointing,
    )  # fmt: skip


def measure(bench: Bench, case: Case) -> None:
    """Note a case's speed and memory with the planner's prediction."""
    bench.free()
    shape, arm = Shape.of(case.config.to_dict()), case.recipe()
    machine = cost.calibrate(
        shape, tokens=case.T, span=arm.attention.span(case.T),
        process_gib=0.0, device=bench.device, dtype=torch.bfloat16,
    )  # fmt: skip
    bench.free()
    predicted = predict(
        shape, arm, rows=1, seq_len=case.T, resources=resources_of(bench, case), machine=machine, document=case.T
    )
    step = deepspeed_step(bench, case)
    bench.free()  # the initial float32 weights are not part of a step
    seconds = seconds_of(bench, step)
    numbers = {"step_s": seconds, "tokens_per_s": case.T / seconds, "mfu": predicted.flops / seconds / machine.matmul}
    numbers |= {"peak_gib": bench.peak_gib(), "predicted_s": predicted.step_s, "predicted_gib": predicted.peak_gib}
    numbers |= {"seconds_off": predicted.step_s / seconds - 1}
    if bench.gpu:
        numbers |= {"gib_off": predicted.peak_gib / bench.peak_gib() - 1}
    bench.note(str(case), **numbers)
    bench.note(f"{case}, predicted", detail=True, seconds=predicted.seconds, memory=predicted.memory_gib)


def seconds_of(bench: Bench, step: Callable[[], None]) -> float:
    """Return the median of the steps after the first."""
    took = []
    for _ in range(STEPS):
        begun = time.perf_counter()
        step()
        if bench.gpu:
            torch.cuda.synchronize()
        took.append(time.perf_counter() - begun)
    return sorted(took[1:])[(STEPS - 1) // 2]


def against_plain(bench: Bench, case: Case) -> None:
    """Note what DeepSpeed adds, with both ways alternating (A B A B): the lower of each way's two medians."""
    ways = {"DeepSpeed": deepspeed_step(bench, case), "plain": plain_step(bench, case)}
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(2):
        for name, step in ways.items():
            took[name].append(seconds_of(bench, step))
    seconds = {name: min(times) for name, times in took.items()}
    bench.note("DeepSpeed ZeRO 0 over a plain loop", **seconds, ratio=seconds["DeepSpeed"] / seconds["plain"])
