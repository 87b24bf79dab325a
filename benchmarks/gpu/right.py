"""Section right: check every kernel against the float64 oracle, causality, streaming and a resumed training.

Legend: B batch, T tokens, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections import defaultdict
from itertools import product
from pathlib import Path

import numpy as np
import torch
from attention_cases import EVERY_PATTERN, HEADS, ROWS, dense, oracle, outputs_and_gradients, positions, qkv
from bench import Bench
from safetensors.torch import load_file
from toy_models import job, train
from transformers import LlamaConfig, LlamaForCausalLM

from longreach.attention import PATTERNS, attend
from longreach.attention.flash import has_flash_attn
from longreach.attention.hf import set_pattern
from longreach.attention.sink_cache import SinkCache
from longreach.attention.verify import verify_attention
from longreach.evaluation.small_cache import streamed_nll
from longreach.training.recipe import ArmRecipe

SMALL = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}
"""Largest allowed error relative to the largest number, which counts as at least 1. Probabilities and output are
rounded once each to 8 or 11 bits, and a gradient adds a few tens of such errors (tests/test_attention_cuda.py)."""
LONG = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Largest allowed norm of the error over the norm, for long rows: a few roundings of 2^-9 (bfloat16) or 2^-12 each."""
NAMES = ("out", "dq", "dk", "dv", "dsink")


class Checks:
    """Counts the comparisons and records those that failed."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.wrong = bench, []
        self.worst: dict[str, list[float]] = defaultdict(list)

    def compare(self, kind: str, about: str, error: float, allowed: float) -> None:
        """Record one error, as a share of the allowed error."""
        share = error / allowed if math.isfinite(error) else math.inf
        self.worst[kind].append(share)
        if not share < 1:
            self.wrong.append(f"{kind}, {about}: {error:.3g}, allowed {allowed:.3g}")
            self.bench.note(f"WRONG {kind}", about=about, error=error, allowed=allowed)

    def report(self, kind: str) -> None:
        """Note the number of comparisons of a kind and the largest error as a share of the allowed one."""
        shares = self.worst[kind]
        failed = sum(not share < 1 for share in shares)
        self.bench.note(kind, compared=len(shares), wrong=failed, worst_over_allowed=max(shares, default=0.0))


def run(bench: Bench) -> None:
    checks = Checks(bench)
    kernels(bench, checks)
    long_rows(bench, checks)
    a_model_trains(bench, checks)
    nobody_sees_the_future(bench, checks)
    streaming(bench, checks)
    resumed(bench, checks)
    predicates(bench, checks)
    if checks.wrong:
        raise AssertionError("\n".join([f"{len(checks.wrong)} comparisons failed:", *checks.wrong[:20]]))


def against_oracle(bench: Bench, checks: Checks, kind: str, kernel: str, pattern, inputs, documents=None, **options):
    """Compare output and gradients with those of the oracle, which computes in float64 on the CPU."""
    on_device = [x.to(bench.device) for x in inputs]
    given = {k: v.to(bench.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    rows = None if documents is None else documents.to(bench.device)
    got = outputs_and_gradients(attend, *on_device, pattern, rows, kernel=kernel, **given)
    expected = oracle(*inputs, pattern, documents, **options)
    for name, a, b in zip(NAMES, got, expected, strict=False):
        error = float((a.double().cpu() - b).abs().max()) / max(1.0, float(b.abs().max()))
        about = f"{name} of {pattern} by {kernel} in {inputs[0].dtype}, {tuple(inputs[0].shape)}"
        checks.compare(kind, about, error, SMALL[inputs[0].dtype])


def kernels(bench: Bench, checks: Checks) -> None:
    """Check every pattern on every row, and every number of heads with sink logits."""
    names = ["sdpa", *(["flash"] if bench.gpu and has_flash_attn() else [])]
    dtypes = [torch.bfloat16, torch.float16] if bench.gpu else [torch.float32]
    sizes = [64, 128] if bench.gpu else [8]
    for kernel, dtype, D in product(names, dtypes, sizes):
        kind = f"{kernel}, {dtype}, head size {D}"
        for pattern, (T, documents) in product(EVERY_PATTERN[:: 1 if bench.gpu else 6], ROWS.values()):
            inputs = qkv(4, 2, T, B=len(documents or [0]), D=D, dtype=dtype)
            rows = None if documents is None else positions(*documents)
            against_oracle(bench, checks, kind, kernel, pattern, inputs, rows, layer=1)
        sparse = PATTERNS["shifted_sparse"](group_tokens=8, sink_tokens=3)
        for (H, K), layer in product(HEADS, (0, 1)):
            sinks, rows = torch.linspace(-2, 3, H), positions((13, 8), (2, 19))
            inputs = qkv(H, K, 21, B=2, D=D, dtype=dtype)
            against_oracle(bench, checks, kind, kernel, sparse, inputs, rows, layer=layer, sink_logit_H=sinks)
        checks.report(kind)


def long_rows(bench: Bench, checks: Checks) -> None:
    """Check rows of thousands of tokens with 32 query and 8 key heads; the oracle runs on the device in float64."""
    T, H, K = (2048, 32, 8) if bench.gpu else (96, 8, 2)
    patterns = [
        PATTERNS["causal"](),
        PATTERNS["shifted_sparse"](group_tokens=T // 4),
        PATTERNS["shifted_sparse"](group_tokens=T // 4, sink_tokens=4),
        PATTERNS["sink_window"](window_tokens=T // 8, sink_tokens=4),
    ]
    rows = positions((T,)), positions((T // 2 - 5, T // 3, T - T // 2 + 5 - T // 3))
    dtypes = [torch.bfloat16, torch.float16] if bench.gpu else [torch.float32]
    sizes = (64, 128) if bench.gpu else (16,)
    for dtype, D, documents, pattern in product(dtypes, sizes, rows, patterns):
        inputs = [x.to(bench.device) for x in qkv(H, K, T, D=D, dtype=dtype)]
        documents, sinks = documents.to(bench.device), torch.linspace(-2, 3, H, device=bench.device)
        direction = torch.randn(inputs[0].shape, device=bench.device, dtype=dtype)
        results = []
        for way, numbers in ((attend, inputs), (dense, [x.double() for x in inputs])):
            leaves = [x.detach().clone().requires_grad_() for x in (*numbers, sinks.double())]
            out = way(*leaves[:3], pattern, documents, leaves[3])
            results.append([out.detach(), *torch.autograd.grad(out, leaves, direction.to(out.dtype))])
            del out, leaves
        for name, a, b in zip(NAMES, *results, strict=True):
            error = float((a.double() - b).norm() / b.norm())
            checks.compare("long rows", f"{name} of {pattern} in {dtype}, head size {D}", error, LONG[dtype])
        bench.free()
    checks.report("long rows")


def small_llama(bench: Bench, tokens: int) -> LlamaForCausalLM:
    """Return a 2-layer Llama with weights large enough that visibility changes its output measurably."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, max_position_embeddings=tokens,
    )  # fmt: skip
    return bench.placed(LlamaForCausalLM(config)).eval()


def a_model_trains(bench: Bench, checks: Checks) -> None:
    """Compare loss and gradients of a model with S² and activation checkpointing with the dense reference."""
    fast = small_llama(bench, 4096)
    slow = copy.deepcopy(fast)
    ids = torch.randint(256, (2, 256), device=bench.device)
    losses = []
    for model, kernel in ((fast, "auto"), (slow, "reference")):
        set_pattern(model, PATTERNS["shifted_sparse"](group_tokens=64, sink_tokens=4), kernel=kernel)
        model.gradient_checkpointing_enable()
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        losses.append(float(loss))
    checks.compare("a model's loss", "S²", abs(losses[0] / losses[1] - 1), 1e-2)
    for (name, a), b in zip(fast.named_parameters(), slow.parameters(), strict=True):
        error = float((a.grad - b.grad).norm() / b.grad.norm())
        checks.compare("a model's gradients", name, error, 5e-2)
    checks.report("a model's loss")
    checks.report("a model's gradients")


def nobody_sees_the_future(bench: Bench, checks: Checks) -> None:
    """Run verify-attention on a model with each pattern and its default kernel."""
    model = small_llama(bench, 4096)
    for pattern in (PATTERNS["causal"](), PATTERNS["shifted_sparse"](group_tokens=32, sink_tokens=4)):
        set_pattern(model, pattern)
        leaks = verify_attention(model, tokens=256, cuts=32) if bench.gpu else verify_attention(model, cuts=4)
        checks.compare("leaks", f"{pattern}: {'; '.join(map(str, leaks))}", float(len(leaks)), 0.5)
    checks.report("leaks")


def streaming(bench: Bench, checks: Checks) -> None:
    """Check that one pass, SinkCache token by token and SinkCache in chunks give every token the same NLL."""
    model, tokens = small_llama(bench, 1 << 20), 400 if bench.gpu else 150
    ids_T = np.random.default_rng(0).integers(0, 256, tokens)
    one_pass_T = streamed_nll(model, ids_T, 4, 60, "cache", "text")
    x_1T = torch.from_numpy(ids_T)[None].to(bench.device)
    with torch.inference_mode():
        for name, size in (("decoded token by token", 1), ("read in chunks of 64", 64)):
            cache = SinkCache(model.config, 4, 60)
            logits = torch.cat([model(part, past_key_values=cache).logits for part in x_1T[:, :-1].split(size, 1)], 1)
            nll_T = torch.nn.functional.cross_entropy(logits[0].float(), x_1T[0, 1:], reduction="none").cpu().numpy()
            allowed = 0.1 if bench.gpu else 1e-3  # nats; logits up to 30 have an error of 0.06 in bfloat16
            checks.compare("streaming", name, float(np.abs(nll_T - one_pass_T).mean()), allowed)
    checks.report("streaming")


def resumed(bench: Bench, checks: Checks) -> None:
    """Check that a training resumed from its checkpoint ends with the same bits; otherwise measure the difference.

    The bits must be the same with deterministic algorithms. Without them, the difference is bounded.
    """
    arm = ArmRecipe(
        tune="lora+embed+norm",
        attention={"pattern": "shifted_sparse", "group_tokens": 8, "sink_tokens": 2},
    )
    resources = {"gpus_per_worker": int(bench.gpu), "dtype": "bfloat16", "zero_stage": 0, "checkpoint_every_steps": 3}
    shutil.rmtree(bench.work, ignore_errors=True)
    bench.work.mkdir(parents=True)
    for deterministic in (True, False) if bench.gpu else (True,):
        torch.use_deterministic_algorithms(deterministic)
        results = []
        for name in ("straight", "again"):
            todo = job(bench.work, name=f"{name}-{deterministic}", arm=arm, resources=resources)
            if name == "again":  # it resumes from the first run's checkpoint after step 3, as after a kill
                todo["earlier"] = [str(bench.work / f"straight-{deterministic}" / "work")]
            done = train(todo)
            results.append(load_file(Path(todo["out"]) / "adapter_model.safetensors"))
        assert done.resumed_from_step == 3, f"resumed from step {done.resumed_from_step}"
        apart = max(
            float((a.float() - b.float()).abs().max()) for a, b in zip(*(r.values() for r in results), strict=True)
        )
        what = "resumed, deterministic" if deterministic else "resumed, as it is"
        checks.compare(what, "greatest difference of a weight", apart, 1e-30 if deterministic else 1e-2)
        bench.note(what, greatest_difference=apart)
    torch.use_deterministic_algorithms(False)


def predicates(bench: Bench, checks: Checks) -> None:
    """Check FlexAttention. It is last, because each pattern takes about 10 s to compile. On a CPU it has no backward
    pass, and its forward pass is checked in tests/test_attention_kernels.py."""
    if not bench.gpu:
        return
    patterns = [
        PATTERNS["shifted_sparse"](group_tokens=8, sink_tokens=3),
        PATTERNS["sink_window"](window_tokens=8, sink_tokens=3),
        PATTERNS["causal"](),
    ]
    T, documents = ROWS["ragged documents"]
    rows = positions(*documents)
    for pattern, dtype in product(patterns, (torch.float32, torch.bfloat16)):
        if bench.fits(f"flex, {pattern}, {dtype}", 30):
            torch._dynamo.reset()
            inputs = qkv(4, 2, T, B=2, D=64, dtype=dtype)
            against_oracle(bench, checks, "flex", "flex", pattern, inputs, rows, layer=1)
    checks.report("flex")
