"""Measure what S²-Attn, LoRA and the fused loss save together in a whole optimizer step, in time and memory.

    python benchmarks/step.py                 # two threads, about a quarter of an hour

A step is forward, backward and AdamW on one row, with a randomly initialised Llama of 8 layers of width 512, groups of
T / 4, in float32. The ratios depend on width and length. At the width of a 7B model, matrices take a larger share and
attention a smaller one: counting FLOPs gives 1.14x at 8k for full against S² attention, and 1.86x at 64k.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timing import extra_mib, interleaved, medians, ratio
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from longreach.attention import PATTERNS
from longreach.attention.hf import set_pattern
from longreach.training.longlora import apply_arm
from longreach.training.loss import TokenLoss, fused_linear_cross_entropy
from longreach.training.recipe import ArmRecipe


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    tune: str = "all"
    sparse: bool = False
    fused: bool = True
    vocabulary: int = 4096
    checkpointing: bool = False


def step(arm: Arm, T: int) -> Callable[[], None]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=arm.vocabulary, max_position_embeddings=T, tie_word_embeddings=True,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    if arm.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = apply_arm(model, ArmRecipe(tune=arm.tune))
    if arm.sparse:
        set_pattern(model, PATTERNS["shifted_sparse"](group_tokens=T // 4))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids_BT = torch.randint(arm.vocabulary, (1, T))
    objective = TokenLoss(model)

    def loss() -> Tensor:
        if arm.fused:
            return objective(ids_BT, torch.arange(T)[None], ids_BT, scale=1 / (T - 1))
        return model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss

    def forward_backward_step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return forward_backward_step


def lm_loss(fused: bool, T: int) -> Callable[[], None]:
    """The loss alone: from hidden states and the weight of a vocabulary of 49,152 to the gradients of both."""
    torch.manual_seed(0)
    hidden_BTE, weight_VE = torch.randn(1, T, 576, requires_grad=True), torch.randn(49152, 576, requires_grad=True)
    labels_BT = torch.randint(49152, (1, T))

    def forward_backward() -> None:
        if fused:
            loss = fused_linear_cross_entropy(hidden_BTE, weight_VE, labels_BT, scale=1 / (T - 1))
        else:
            logits_TV = (hidden_BTE @ weight_VE.t())[0, :-1].float()
            loss = nn.functional.cross_entropy(logits_TV, labels_BT[0, 1:])
        torch.autograd.grad(loss, (hidden_BTE, weight_VE))

    return forward_backward


MEMORY: dict[str, Callable[[int], Callable[[], None]]] = {
    "loss, full logits": lambda T: lm_loss(False, T),
    "loss, ours": lambda T: lm_loss(True, T),
    "step, S², full logits": lambda T: step(Arm("all", True, False, 49152, True), T),
    "step, S², ours": lambda T: step(Arm("all", True, True, 49152, True), T),
}


def compare(title: str, slow: Callable[[], None], fast: Callable[[], None], rounds: int) -> None:
    rows = interleaved(slow, fast, rounds=rounds)
    before, after = medians(rows)
    print(f"{title}: {before / 1e3:.1f} s / {after / 1e3:.1f} s of CPU: {ratio(rows, 0, 1):.2f}x", flush=True)


def main() -> None:
    torch.set_num_threads(2)
    if sys.argv[1:]:  # each peak is measured in its own process
        MEMORY[sys.argv[1]](64)()
        print(f"{extra_mib(MEMORY[sys.argv[1]](8192)):.0f}")
        return
    for T, rounds in ((4096, 5), (8192, 3), (16384, 3)):
        compare(f"T = {T}, full fine-tuning, full / S² attention", step(Arm(), T), step(Arm(sparse=True), T), rounds)
    for size in (4096, 49152):
        slow = step(Arm(fused=False, vocabulary=size), 8192)
        fast = step(Arm("lora+embed+norm", sparse=True, vocabulary=size), 8192)
        compare(f"T = 8192, vocabulary {size}, full fine-tuning with logits / LongLoRA", slow, fast, 3)
    compare("the loss alone, 8,192 x 49,152, full logits / ours", lm_loss(False, 8192), lm_loss(True, 8192), 3)
    for name in MEMORY:
        got = subprocess.run([sys.executable, __file__, name], check=True, capture_output=True, text=True)
        print(f"extra peak memory at T = 8192, {name}: {got.stdout.strip()} MiB", flush=True)


if __name__ == "__main__":
    main()
